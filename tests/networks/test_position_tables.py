"""Positions of another size of the image are interpolated, as the grid of patches is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from medseg_reg.errors import MedsegError
from medseg_reg.networks.build import Network, build_network
from medseg_reg.networks.position_tables import fitting_table, resize_table
from medseg_reg.networks.pretrained import load_pretrained
from tests.networks.small_foreign import SMALL

NAME = "network.vit.patch_embedding.position_embeddings"


def unetr(*size: int) -> Network:
    arguments = {**SMALL["monai.UNETR"], "img_size": list(size)}
    return build_network(in_channels=1, classes=2, head="softmax", name="monai.UNETR", **arguments)


@pytest.mark.parametrize("after", [(3, 8), (9, 5), (4, 6)])
def test_a_table_is_interpolated_as_by_timm(after: tuple[int, int]) -> None:
    table = torch.randn(1, 2 + 4 * 6, 5)
    found = resize_table(table, (4, 6), after, prefix=2)
    wanted = resample_abs_pos_embed(table, list(after), [4, 6], num_prefix_tokens=2)
    torch.testing.assert_close(found, wanted)


def test_a_gradient_over_the_image_stays_one() -> None:
    rows = torch.arange(4.0).repeat_interleave(4).view(1, 16, 1)
    found = resize_table(rows, (4, 4), (8, 8)).view(8, 8)
    torch.testing.assert_close(found[:, 0], found[:, 5])
    inner = found[2:-2, 0]
    assert inner.tolist() == pytest.approx([0.75 + i / 2 for i in range(4)], abs=0.05)


def test_the_grid_of_a_file_has_the_proportions_of_the_network_or_is_square() -> None:
    wide = unetr(32, 64)  # 2 x 4 patches
    columns = torch.arange(8.0).repeat(4).view(1, 32, 1).expand(-1, -1, 16)
    found = fitting_table(wide, NAME, columns)  # from 4 x 8
    assert found is not None
    torch.testing.assert_close(found[0, :4], found[0, 4:])
    square = torch.arange(3.0).repeat(3).view(1, 9, 1).expand(-1, -1, 16)
    found = fitting_table(wide, NAME, square)  # from 3 x 3
    assert found is not None
    torch.testing.assert_close(found[0, :4], found[0, 4:])
    assert fitting_table(wide, NAME, torch.rand(1, 7, 16)) is None
    assert fitting_table(wide, NAME, torch.rand(1, 9, 12)) is None
    assert fitting_table(wide, "network.vit.norm.weight", torch.rand(9)) is None


def test_an_encoder_of_another_image_size_is_loaded_and_the_report_says_so(tmp_path: Path) -> None:
    source, target = unetr(64, 64), unetr(32, 64)
    weights = {k: v for k, v in source.state_dict().items() if k.startswith("network.vit.")}
    save_file(weights, tmp_path / "w.safetensors")
    report = load_pretrained(target, tmp_path / "w.safetensors")
    assert (report.part, len(report.taken), report.resized) == ("encoder", 161, (NAME,))
    assert f"1 interpolated to the image size ({NAME})" in str(report)
    found = target.state_dict()
    assert torch.equal(found[NAME], resize_table(weights.pop(NAME), (4, 4), (2, 4)))
    assert all(torch.equal(found[k], v) for k, v in weights.items())


def test_positions_that_fit_no_grid_are_refused_with_both_sizes(tmp_path: Path) -> None:
    target = unetr(32, 32)
    weights = {k: v for k, v in target.state_dict().items() if k.startswith("network.vit.")}
    save_file({**weights, NAME: torch.zeros(1, 7, 16)}, tmp_path / "w.safetensors")
    with pytest.raises(MedsegError, match=r"shape \(1, 7, 16\), the network's .* \(1, 4, 16\)"):
        load_pretrained(target, tmp_path / "w.safetensors")

"""The summary of a network counts what a hand count gives, and changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from medseg_reg.errors import MedsegError
from medseg_reg.insertion import insert, place
from medseg_reg.networks import AttentionUNet, UNet, UNet3Plus
from medseg_reg.networks.build import build_network
from medseg_reg.networks.summary import summarize
from medseg_reg.summary import main
from tests.stores import make_store
from tests.training import tiny_config, write_config


def convolutions(sizes: list[tuple[int, int, int, int]]) -> int:
    """Multiply-adds of convolutions, each (pixels, kernel, in, out)."""
    return sum(pixels * kernel * a * b for pixels, kernel, a, b in sizes)


def test_the_counts_of_a_u_net_are_those_of_its_convolutions() -> None:
    numbers = summarize(UNet(2, 3, 2, channels=(4, 8)), (1, 3, 16, 32)).numbers()
    full, half = 16 * 32, 8 * 16
    assert numbers["multiply_adds"] == convolutions(
        [
            *((full, 9, 3, 4), (full, 9, 4, 4), (half, 9, 4, 8), (half, 9, 8, 8)),
            (half, 4, 8, 4),  # the transposed convolution makes four pixels of each
            *((full, 9, 8, 4), (full, 9, 4, 4), (full, 1, 4, 2)),
        ]
    )
    convs = 9 * (3 * 4 + 4 * 4 + 4 * 8 + 8 * 8 + 8 * 4 + 4 * 4) + 4 * 8 * 4 + 4 + 4 * 2 + 2
    assert numbers["parameters"] == convs + 2 * 2 * (4 + 8 + 4)
    assert numbers["input"] == [1, 3, 16, 32]


@pytest.mark.parametrize(
    "network",
    [
        AttentionUNet(2, 1, 2, channels=(4, 6, 8)),
        UNet3Plus(2, 1, 2, channels=(4, 6), cat_channels=3, deep_supervision=True),
        UNet(3, 1, 2, channels=(4, 6)),
    ],
    ids=lambda network: type(network).__name__,
)
def test_the_parts_add_up_to_the_whole(network: torch.nn.Module) -> None:
    dims = 3 if isinstance(network, UNet) and network.spatial_dims == 3 else 2
    summary = summarize(network, (1, 1, *[16] * dims))
    whole, parts = summary.rows[0], [row for row in summary.rows if row.depth == 1]
    assert whole.multiply_adds == sum(part.multiply_adds for part in parts) > 0
    assert whole.parameters == sum(part.parameters for part in parts)
    assert whole.outputs == ((1, 2, *[16] * dims),)


def test_a_summary_leaves_the_network_as_it_was() -> None:
    network = UNet(2, 1, 2, channels=(4, 6))
    place(network, "dropout", ["*"], {"p": 0.5})
    before = {key: value.clone() for key, value in network.state_dict().items()}
    state = torch.get_rng_state()
    summary = summarize(network, (1, 1, 512, 512))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(module.training for module in network.modules())
    assert all(not module._forward_hooks for module in network.modules())
    assert len([row for row in summary.rows if row.kind == "Dropout"]) == 12


def test_a_module_with_two_names_keeps_its_weights() -> None:
    network = build_network(
        in_channels=1,
        classes=2,
        head="softmax",
        name="monai.DynUNet",
        kernel_size=[3, 3, 3],
        strides=[1, 2, 2],
        upsample_kernel_size=[2, 2],
        filters=[4, 6, 8],
    )
    summarize(network, (1, 1, 16, 16))
    assert all(value.device.type == "cpu" for value in network.state_dict().values())
    assert network(torch.rand(1, 1, 16, 16)).isfinite().all()


def test_the_table_shows_the_layers_that_were_put_in_and_no_empty_slots() -> None:
    network = UNet(2, 1, 2, channels=(4, 6))
    place(network, "dropout", ["head"], {"p": 0.5})
    table = summarize(network, (1, 1, 16, 16)).table(depth=2)
    assert "  head (Slot)" in table
    assert "    0 (Dropout)" in table
    assert "input" not in table.split("for one image")[0]
    assert len({len(line) for line in table.splitlines()[:-1]}) == 1


def test_a_foreign_network_has_a_summary() -> None:
    network = build_network(
        in_channels=1, classes=2, head="softmax", name="monai.UNet", channels=[4, 8], strides=[2]
    )
    insert(network, "dropout", "head", example=torch.rand(1, 1, 8, 8), p=0.5)
    numbers = summarize(network, (1, 1, 15, 16)).numbers()
    # 3x3: down by a stride of 2, one convolution below, up by a transposed one to two classes.
    assert numbers["multiply_adds"] == convolutions(
        [(8 * 8, 9, 1, 4), (8 * 8, 9, 4, 8), (8 * 8, 9, 12, 2)]
    )


def test_the_command_reads_what_the_store_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_store(tmp_path / "store", size=(20, 24), classes=3, channels=3)
    config = write_config(tmp_path / "c.yaml", tiny_config(tmp_path / "store", tmp_path / "run"))
    main(["--config", str(config), "--depth", "1"])
    said = capsys.readouterr().out
    assert "UNet                      3x20x24 " in said
    assert "for one image of 3x20x24:" in said
    assert "not there" not in said
    assert not (tmp_path / "run").exists()


def test_the_command_works_without_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "c.yaml", tiny_config(tmp_path / "none", tmp_path / "run"))
    main(["--config", str(config), "--classes", "4", "network.channels=[4,6,8]"])
    said = capsys.readouterr().out
    assert "for one image of 1x8x8:" in said
    assert "none is not there: 1 channel(s), 4 classes." in said
    with pytest.raises(MedsegError, match="is not a run directory"):
        main(["--run", str(tmp_path / "run")])


def test_channels_and_classes_are_refused_where_the_data_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_store(tmp_path / "store")
    config = write_config(tmp_path / "c.yaml", tiny_config(tmp_path / "store", tmp_path / "run"))
    for source in (["--config", str(config)], ["--run", str(tmp_path / "run")]):
        with pytest.raises(SystemExit):
            main([*source, "--classes", "4"])
        assert "--channels and --classes" in capsys.readouterr().err

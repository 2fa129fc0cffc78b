"""Vision transformers of timm that classify slices, with and without a distillation token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from medseg_reg.errors import MedsegError
from medseg_reg.networks.pretrained import load_pretrained
from medseg_reg.networks.slice_classifier import both_logits, build_classifier

TINY = {"patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3}
TAUGHT = "deit_tiny_distilled_patch16_224"


def built(name: str = TAUGHT, size: tuple[int, int] = (32, 24), **more: Any) -> Any:
    torch.manual_seed(0)
    return build_classifier(name, 1, 2, size, **{**TINY, **more})


def test_training_returns_both_logits_and_evaluation_their_mean() -> None:
    network, image = built(), torch.rand(3, 1, 32, 24)
    logits, taught = network(image)
    assert not torch.allclose(logits, taught)
    mean = network.eval()(image)  # it has no dropout
    torch.testing.assert_close(mean, (logits + taught) / 2)


def test_the_second_token_has_a_position_a_head_and_a_gradient_of_its_own() -> None:
    network = built()
    assert network.pos_embed.shape == (1, 2 + 4 * 3, 12)
    _, taught = network(torch.rand(1, 1, 32, 24))
    taught.sum().backward()
    assert network.head.weight.grad is None
    assert network.head_dist.weight.grad.abs().sum() > 0
    assert network.dist_token.grad.abs().sum() > 0


def test_without_the_token_the_same_logits_are_for_labels_and_teacher() -> None:
    output = built("deit_tiny_patch16_224")(torch.rand(1, 1, 32, 24))
    assert both_logits(output) == (output, output)


def test_a_published_file_fits_but_for_its_heads(tmp_path: Path) -> None:
    theirs = build_classifier(TAUGHT, 3, 10, (64, 64), **TINY)
    save_file(theirs.state_dict(), tmp_path / "deit.safetensors")
    network = built()
    report = load_pretrained(network, tmp_path / "deit.safetensors", strict=False)
    heads = {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}
    assert set(report.new) == heads
    assert report.adapted == ("patch_embed.proj.weight",)
    assert report.resized == ("pos_embed",)
    assert torch.equal(network.pos_embed[:, :2], theirs.pos_embed[:, :2])
    with pytest.raises(MedsegError, match="does not fit"):
        load_pretrained(network, tmp_path / "deit.safetensors")


def test_a_pre_training_without_labels_fits_but_for_the_head(tmp_path: Path) -> None:
    theirs = build_classifier("vit_tiny_patch16_224", 1, 1, (64, 64), **TINY)
    names = {f"network.encoder.model.{name}": one for name, one in theirs.state_dict().items()}
    encoder = {name: one for name, one in names.items() if ".head." not in name}
    save_file(encoder, tmp_path / "pretrained.safetensors")
    network = built("deit_tiny_patch16_224")
    report = load_pretrained(network, tmp_path / "pretrained.safetensors", strict=False)
    assert (report.new, report.left_out) == (("head.weight", "head.bias"), ())
    assert torch.equal(network.blocks[1].mlp.fc1.weight, theirs.blocks[1].mlp.fc1.weight)


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("deit_tiny_destilled_patch16_224", {}, "Did you mean 'deit_tiny_distilled_patch16_224'"),
        ("resnet18", {}, "has no vision transformer 'resnet18'"),
        ("hf-hub:someone/model", {}, "has no vision transformer"),
        ("vit_relpos_small_patch16_224", {}, "has no vision transformer"),
        (TAUGHT, {"pretrained": True}, "pretrained: is said by the data or the run"),
        (TAUGHT, {"num_heds": 3}, "num_heds"),
        (TAUGHT, {"num_heads": 5}, "divisible"),
    ],
)
def test_what_cannot_be_built_is_told(name: str, more: dict[str, Any], said: str) -> None:
    with pytest.raises(MedsegError, match=said):
        built(name, **more)


def test_a_size_that_patches_do_not_fill_is_refused_with_one_that_works() -> None:
    with pytest.raises(
        MedsegError, match=r"does not go into 30x24\. Set data\.image\.size=\[32, 24"
    ):
        built(size=(30, 24))

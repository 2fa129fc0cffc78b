"""UNet 3+ keeps the contract of networks, and every decoder node joins what the paper draws."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import pytest
import torch
from torch.nn import functional as F

from medseg_reg.insertion import measure, place
from medseg_reg.networks import GuidedLogits, UNet3Plus, presence_loss
from medseg_reg.networks.guided import guide
from tests.networks.contract import tensors
from tests.networks.own_contract import OwnContract
from tests.networks.test_unet import PARTS

SMALL: dict[str, Any] = {"channels": (4, 6, 8), "cat_channels": 3}
PLACES = {
    "input",
    "head",
    *(f"bottleneck.{part}" for part in PARTS),
    *(f"{side}.{i}.{part}" for side in ("encoder", "decoder") for i in (0, 1) for part in PARTS),
    *(f"skip.{i}.{j}" for i in range(3) for j in range(2)),
}
CHANGES: dict[str, Any] = {
    "channels": (4, 8),
    "norm": "instance",
    "activation": "leakyrelu",
    "upsample": "deconv",
    "cat_channels": 5,
    "deep_supervision": True,
    "classification_guided": True,
}


class TestUNet3Plus(OwnContract):
    network = UNet3Plus
    arguments = SMALL
    places: ClassVar[set[str]] = PLACES
    changes = CHANGES
    golden = (-0.1617, 0.31391, 0.28558, 0.22748, 0.18803)
    golden_3d = (0.04319, 0.2746, 0.15932, -0.49871, -0.15099)


class TestSupervisedAndGuided(OwnContract):
    network = UNet3Plus
    arguments: ClassVar[dict[str, Any]] = {
        **SMALL,
        "deep_supervision": True,
        "classification_guided": True,
        "upsample": "deconv",
    }
    places: ClassVar[set[str]] = PLACES
    changes: ClassVar[dict[str, Any]] = {
        **CHANGES,
        "upsample": "nontrainable",
        "deep_supervision": False,
        "classification_guided": False,
    }
    golden = (0.10215, 0.41496, 0.12472, -0.1086, 0.12371)
    golden_3d = (0.10499, -0.60803, 0.62859, -0.85246, -0.19768)


def written_out(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The forward pass of a UNet 3+ of three levels in evaluation mode, operation by operation."""

    def part(x: torch.Tensor, conv: str, norm: str) -> torch.Tensor:
        x = F.conv2d(x, weights[f"{conv}.weight"], padding=1)
        names = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(weights[f"{norm}.{name}"] for name in names)).relu()

    def block(x: torch.Tensor, name: str) -> torch.Tensor:
        x = part(x, f"{name}.conv1", f"{name}.norm1")
        return part(x, f"{name}.conv2", f"{name}.norm2")

    def unify(x: torch.Tensor, level: int, i: int) -> torch.Tensor:
        return part(x, f"decoder.{level}.unify.{i}.0", f"decoder.{level}.unify.{i}.1")

    def up(x: torch.Tensor, factor: int) -> torch.Tensor:
        size = [factor * n for n in x.shape[2:]]
        return F.interpolate(x, size, mode="bilinear", align_corners=False)

    e1 = block(x, "encoder.0")
    e2 = block(F.max_pool2d(e1, 2), "encoder.1")
    e3 = block(F.max_pool2d(e2, 2), "bottleneck")
    maps = [unify(F.max_pool2d(e1, 2), 1, 0), unify(e2, 1, 1), unify(up(e3, 2), 1, 2)]
    d2 = part(torch.cat(maps, 1), "decoder.1.conv", "decoder.1.norm")
    maps = [unify(e1, 0, 0), unify(up(d2, 2), 0, 1), unify(up(e3, 4), 0, 2)]
    d1 = part(torch.cat(maps, 1), "decoder.0.conv", "decoder.0.norm")
    return F.conv2d(d1, weights["classify.weight"], weights["classify.bias"], padding=1)


def test_the_forward_pass_is_the_one_written_out() -> None:
    torch.manual_seed(0)
    network = UNet3Plus(2, 3, 4, channels=(5, 7, 6), cat_channels=4)
    for _ in range(3):
        network(torch.rand(4, 3, 8, 8))  # so that the running statistics are not 0 and 1
    x = torch.rand(2, 3, 8, 12)
    assert torch.allclose(network.eval()(x), written_out(network.state_dict(), x), atol=1e-5)


def test_every_decoder_node_joins_five_maps_of_equal_width() -> None:
    network = UNet3Plus(2, 3, 2, channels=(4, 6, 8, 10, 12), cat_channels=7)
    seen: dict[str, list[tuple[int, ...]]] = {}
    for level, node in enumerate(network.decoder):
        for i, unify in enumerate(node.unify):
            unify.register_forward_hook(
                lambda *parts, level=level: seen.setdefault(f"unified {level}", []).append(
                    tuple(parts[2].shape[1:])
                )
            )
            network.skip[i][level].register_forward_hook(
                lambda *parts, level=level: seen.setdefault(f"skip {level}", []).append(
                    tuple(parts[2].shape[1:])
                )
            )
        node.conv.register_forward_pre_hook(
            lambda *parts, level=level: seen.setdefault(f"joined {level}", []).append(
                tuple(parts[1][0].shape[1:])
            )
        )
    network.eval()(torch.rand(1, 3, 32, 48))
    for level in range(4):
        size = (32 >> level, 48 >> level)
        # Encoder maps up to the node's own level, decoder maps of 5 * 7 below, the bottleneck.
        widths = [*(4, 6, 8, 10)[: level + 1], *[35] * (3 - level), 12]
        assert seen[f"skip {level}"] == [(width, *size) for width in widths]
        assert seen[f"unified {level}"] == [(7, *size)] * 5
        assert seen[f"joined {level}"] == [(35, *size)]


def test_the_original_has_the_number_of_weights_that_its_drawing_gives() -> None:
    widths = (64, 128, 256, 512, 1024)
    network = UNet3Plus(2, 1, 1, channels=widths)
    convs = sum(p.numel() for n, p in network.named_parameters() if p.ndim == 4)
    encoder = list(itertools.pairwise((1, *widths)))
    expected = sum(9 * (a * b + b * b) for a, b in encoder)
    for level in range(4):
        joined = [*widths[: level + 1], *[320] * (3 - level), 1024]
        expected += 9 * (sum(64 * n for n in joined) + 320 * 320)
    assert convs == expected + 9 * 320


def test_every_place_sees_the_map_that_its_name_says() -> None:
    network = UNet3Plus(2, 3, 2, **SMALL)
    placements = place(network, "dropout", ["*"], {"p": 0.5})
    measure(network, torch.rand(1, 3, 16, 24), placements)
    found = {placement.place: placement.map_size for placement in placements}
    assert found["input"] == (3, 16, 24)
    assert found["head"] == found["decoder.0.after_block"] == (9, 16, 24)
    assert found["decoder.1.between_convs"] == found["decoder.1.after_norm"] == (9, 8, 12)
    assert [found[f"skip.{i}.0"] for i in range(3)] == [(4, 16, 24), (9, 16, 24), (8, 16, 24)]
    assert [found[f"skip.{i}.1"] for i in range(3)] == [(4, 8, 12), (6, 8, 12), (8, 8, 12)]


def test_the_skips_of_one_level_are_named_together() -> None:
    found = place(UNet3Plus(2, 1, 2, **SMALL), "dropout", ["skip.0"], {"p": 0.5})
    assert [one.place for one in found] == ["skip.0.0", "skip.0.1"]
    assert len(place(UNet3Plus(2, 1, 2, **SMALL), "dropout", ["skip"], {"p": 0.5})) == 6


# Deep supervision


@pytest.mark.parametrize("size", [(13, 10), (16, 16), (5, 9, 4)])
def test_deep_supervision_gives_one_map_of_full_size_for_each_level(size: tuple[int, ...]) -> None:
    network = UNet3Plus(len(size), 1, 3, **SMALL, deep_supervision=True)
    logits = network(torch.rand(2, 1, *size))
    assert isinstance(logits, list)
    assert [tuple(one.shape) for one in logits] == [(2, 3, *size)] * 3
    assert tuple(network.eval()(torch.rand(2, 1, *size)).shape) == (2, 3, *size)


def test_the_finest_comes_first_and_is_what_evaluation_returns() -> None:
    torch.manual_seed(0)
    network = UNet3Plus(2, 1, 2, **SMALL, norm="instance", deep_supervision=True)
    x = torch.rand(2, 1, 9, 12)
    assert torch.equal(network(x)[0], network.eval()(x))


def test_a_side_output_is_a_convolution_of_its_level_brought_to_full_size() -> None:
    torch.manual_seed(0)
    network = UNet3Plus(2, 1, 2, **SMALL, norm="instance", deep_supervision=True)
    maps: list[torch.Tensor] = []
    for part in (network.decoder[1], network.bottleneck):
        part.register_forward_hook(lambda *parts: maps.append(parts[2]))
    deepest, second = network(torch.rand(2, 1, 8, 12))[:0:-1], None
    bottleneck, decoder = maps
    for found, side, x in zip(deepest, reversed(network.side), (bottleneck, decoder), strict=True):
        second = F.conv2d(x, side.weight, side.bias, padding=1)
        expected = F.interpolate(second, (8, 12), mode="bilinear", align_corners=False)
        assert torch.allclose(found, expected, atol=1e-6)


def test_without_deep_supervision_there_are_no_side_weights() -> None:
    network = UNet3Plus(2, 1, 2, **SMALL)
    assert not [name for name in network.state_dict() if "side" in name or "presence" in name]
    assert isinstance(network(torch.rand(2, 1, 8, 8)), torch.Tensor)


# Classes that are shown


@pytest.mark.parametrize(("outputs", "classes"), [(1, 1), (2, 1), (4, 3)])
def test_there_is_one_presence_for_each_foreground_class(outputs: int, classes: int) -> None:
    network = UNet3Plus(2, 1, outputs, **SMALL, classification_guided=True)
    output = network(torch.rand(3, 1, 8, 8))
    assert isinstance(output, GuidedLogits)
    assert output.presence.shape == (3, classes)
    assert tensors(output.logits)[0].shape == (3, outputs, 8, 8)
    assert network.eval()(torch.rand(3, 1, 8, 8)).shape == (3, outputs, 8, 8)


def test_the_presence_is_the_largest_of_the_pixels_of_the_deepest_map() -> None:
    torch.manual_seed(0)
    network = UNet3Plus(2, 1, 3, **SMALL, classification_guided=True).eval()
    deepest: list[torch.Tensor] = []
    network.bottleneck.register_forward_hook(lambda *parts: deepest.append(parts[2]))
    network(torch.rand(2, 1, 8, 16))
    head = network.presence
    assert head is not None
    weight, bias = head.classify.weight[:, :, 0, 0], head.classify.bias
    expected = (torch.einsum("kc,bcyx->bkyx", weight, deepest[0])).amax((2, 3)) + bias
    assert torch.allclose(head(deepest[0]), expected, atol=1e-6)


def test_a_class_that_ignored_pixels_may_show_does_not_count():
    presence = torch.tensor([[0.3, -1.2], [2.0, 0.4]], requires_grad=True)
    labels = torch.tensor([[[0, 1], [255, 0]], [[0, 0], [2, 0]]])
    # The first slice shows class 1, and class 2 perhaps where it is ignored.
    terms = [
        torch.tensor(0.3).sigmoid(),
        1 - torch.tensor(2.0).sigmoid(),
        torch.tensor(0.4).sigmoid(),
    ]
    found = presence_loss(presence, labels, ignore=255)
    torch.testing.assert_close(found, -torch.stack(terms).log().mean())
    found.backward()
    assert presence.grad[0, 1] == 0
    unknown = torch.full_like(labels, 255)
    assert presence_loss(presence, unknown, ignore=255) == 0


def test_the_presence_is_trained_against_the_labels_of_the_slice() -> None:
    presence = torch.tensor([[0.3, -1.2], [2.0, 0.7]], requires_grad=True)
    labels = torch.tensor([[[0, 0], [2, 2]], [[0, 1], [1, 0]]], dtype=torch.uint8)
    shown = ((False, True), (True, False))
    found = presence_loss(presence, labels)
    terms = []
    for row, truth in zip(presence.tolist(), shown, strict=True):
        for logit, here in zip(row, truth, strict=True):
            probability = 1 / (1 + torch.tensor(-logit).double().exp().item())
            terms.append(-torch.tensor(probability if here else 1 - probability).log().item())
    assert found.item() == pytest.approx(sum(terms) / 4, abs=1e-6)
    found.backward()
    assert presence.grad is not None
    assert (presence.grad.sign() == torch.tensor([[1, -1], [-1, 1]])).all()


def test_in_evaluation_a_class_that_is_not_shown_is_taken_out() -> None:
    logits = torch.tensor([[[0.0, 5.0]], [[3.0, 9.0]], [[9.0, 2.0]]])[None].repeat(2, 1, 1, 1)
    guided = guide(logits, torch.tensor([[1.0, -1.0], [-0.1, -3.0]]))
    assert guided.argmax(1).flatten(1).tolist() == [[1, 1], [0, 0]]
    assert torch.equal(guided[0, :2], logits[0, :2])
    assert (guided.softmax(1)[:, 2] < 1e-6).all()
    one = guide(torch.full((2, 1, 2, 2), 7.0), torch.tensor([[0.5], [-0.5]]))
    assert (one[0] == 7).all()
    assert (torch.sigmoid(one[1]) < 1e-6).all()


def test_a_guided_network_shows_nothing_where_its_own_presence_says_so() -> None:
    torch.manual_seed(0)
    network = UNet3Plus(2, 1, 3, **SMALL, classification_guided=True).eval()
    x = torch.rand(2, 1, 13, 12)
    assert network.presence is not None
    with torch.no_grad():
        network.classify.bias.copy_(torch.tensor([-50.0, 0.0, 0.0]))
        network.presence.classify.bias.fill_(100.0)
        assert (network(x).argmax(1) > 0).all()
        network.presence.classify.bias.fill_(-100.0)
        assert (network(x).argmax(1) == 0).all()
    # In training the segmentation is left as it is, so that it goes on learning.
    assert (network.train()(x).logits.argmax(1) > 0).all()


def test_one_level_is_no_u_net() -> None:
    with pytest.raises(ValueError, match=r"at least two levels, channels is \(8,\)"):
        UNet3Plus(2, 1, 2, channels=(8,))

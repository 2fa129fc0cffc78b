"""A finer network reads what a coarse one says, which stays as it is and is no part of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from medseg_reg.insertion import find_places, insert
from medseg_reg.networks import UNet
from medseg_reg.networks.build import Network, build_network
from medseg_reg.networks.pretrained import load_pretrained
from medseg_reg.networks.reuse import Coarse, attach, coarse_of
from medseg_reg.networks.shapes import run_on_shape
from medseg_reg.networks.summary import summarize

SMALL: dict[str, dict[str, Any]] = {
    "unet": {"channels": (4, 8)},
    "unet3plus": {"channels": (4, 8), "cat_channels": 3, "deep_supervision": True},
    "monai.UNet": {"channels": (4, 8, 16), "strides": (2, 2)},
    "smp.Unet": {"encoder_name": "resnet18", "encoder_depth": 3, "decoder_channels": (16, 8, 4)},
}
CLASSES = 3


def network(name: str = "unet", channels: int = 1, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return build_network(
        in_channels=channels, classes=CLASSES, head="softmax", name=name, **SMALL[name]
    )


def coarse_network(outputs: int = CLASSES) -> nn.Module:
    """Maps one channel to logits; never trained, but with statistics of its own."""
    torch.manual_seed(7)
    made = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Conv2d(4, outputs, 1)
    )
    made[1].running_mean.normal_()
    return made


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


# What the finer network sees


@pytest.mark.parametrize("name", SMALL)
def test_the_classes_of_the_coarse_network_are_joined_to_the_image(name: str) -> None:
    plain, told, x = (
        network(name, 1 + CLASSES).eval(),
        coarse_network().eval(),
        images(2, 1, 32, 40),
    )
    fine = attach(copy.deepcopy(plain), Coarse(coarse_network(), CLASSES), 1).eval()
    expected = plain(torch.cat([x, told(x).softmax(1)], dim=1))
    torch.testing.assert_close(fine(x), expected, rtol=0, atol=0)
    assert not torch.allclose(fine(x), plain(torch.cat([x, images(2, CLASSES, 32, 40)], dim=1)))


def test_logits_are_joined_as_they_are_if_that_is_asked_for() -> None:
    plain, told, x = network(channels=2).eval(), coarse_network(1).eval(), images(2, 1, 16, 16)
    fine = attach(copy.deepcopy(plain), Coarse(coarse_network(1), 1, "logits"), 1)
    torch.testing.assert_close(fine(x), plain(torch.cat([x, told(x)], dim=1)))


def test_one_output_gives_the_probabilities_of_both_classes() -> None:
    coarse, x = Coarse(coarse_network(1), 2), images(1, 1, 8, 8)
    p = coarse.further(coarse(x))
    torch.testing.assert_close(p[:, 1:], torch.sigmoid(coarse_network(1).eval()(x)))
    torch.testing.assert_close(p.sum(1), torch.ones(1, 8, 8))


@pytest.mark.parametrize(
    ("fit", "inner", "margin"), [("resize", (16, 16), 0), ("letterbox", (8, 16), 4)]
)
def test_it_sees_images_as_it_was_trained_on_them(
    fit: str, inner: tuple[int, int], margin: int
) -> None:
    x = images(1, 1, 24, 48)
    small = cv2.resize(x[0, 0].numpy(), inner[::-1], interpolation=cv2.INTER_AREA)
    small = np.pad(small, ((margin, margin), (0, 0)))
    told = coarse_network().eval()(torch.from_numpy(small)[None, None])
    told = told[:, :, margin : 16 - margin]
    expected = functional.interpolate(told, (24, 48), mode="bilinear")
    found = Coarse(coarse_network(), CLASSES, size=(16, 16), fit=fit)(x)
    torch.testing.assert_close(found, expected)


def test_images_that_have_the_answer_already_pass_as_they_are() -> None:
    coarse, x = Coarse(coarse_network(), CLASSES), images(2, 1, 16, 16)
    fine = attach(network(channels=1 + CLASSES).eval(), coarse, 1)
    expected = fine(x)
    wide = coarse.widened(x, coarse(x))
    coarse.network.forward = None  # type: ignore[assignment]
    assert torch.equal(fine(wide), expected)


def test_a_third_stage_reads_the_second() -> None:
    second = attach(network(channels=1 + CLASSES), Coarse(coarse_network(), CLASSES), 1)
    third = attach(network(channels=1 + CLASSES, seed=2).eval(), Coarse(second, CLASSES), 1)
    x = images(1, 1, 16, 16)
    alone = network(channels=1 + CLASSES, seed=2).eval()
    torch.testing.assert_close(third(x), alone(torch.cat([x, second(x).softmax(1)], dim=1)))
    assert third.state_dict().keys() == alone.state_dict().keys()


# What it is not


@pytest.mark.parametrize("name", ["unet", "monai.UNet"])
def test_it_is_no_part_of_what_is_trained_kept_or_searched(name: str) -> None:
    plain, fine = network(name, 1 + CLASSES), network(name, 1 + CLASSES)
    attach(fine, Coarse(coarse_network(), CLASSES), 1)
    assert fine.state_dict().keys() == plain.state_dict().keys()
    assert [n for n, _ in fine.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert {n for n, _ in fine.named_modules()} - {n for n, _ in plain.named_modules()} == {
        "coarse"
    }
    fine.load_state_dict(plain.state_dict())


def test_training_reaches_the_finer_network_alone() -> None:
    inner = coarse_network()
    before = copy.deepcopy(inner.state_dict())
    fine = attach(network(channels=1 + CLASSES).train(), Coarse(inner, CLASSES), 1)
    fine.train()
    x = images(2, 1, 16, 16).requires_grad_()
    assert torch.equal(coarse_of(fine)(x), coarse_of(fine)(x))  # no dropout
    fine(x).sum().backward()
    assert all(p.grad is not None for p in fine.parameters())
    assert all(p.grad is None for p in inner.parameters())
    assert not any(m.training for m in inner.modules())
    for name, value in inner.state_dict().items():
        assert torch.equal(value, before[name])


def test_it_follows_to_other_types_and_into_copies() -> None:
    fine = attach(network(channels=1 + CLASSES).eval(), Coarse(coarse_network(), CLASSES), 1)
    twin = copy.deepcopy(fine).double()
    assert twin(images(1, 1, 16, 16).double()).dtype == torch.float64
    assert fine(images(1, 1, 16, 16)).dtype == torch.float32
    assert coarse_of(twin).network is not coarse_of(fine).network


@pytest.mark.parametrize("name", ["unet", "monai.UNet"])
def test_shapes_and_costs_are_those_of_both(name: str) -> None:
    plain, fine = network(name, 1 + CLASSES), network(name, 1 + CLASSES)
    attach(fine, Coarse(coarse_network(), CLASSES, size=(8, 8)), 1)
    assert run_on_shape(fine.eval(), (3, 1, 32, 32)).shape == (3, CLASSES, 32, 32)
    run_on_shape(fine, (2, 1, 32, 32), training=True)
    both, alone = summarize(fine, (1, 1, 32, 32)), summarize(plain, (1, 1 + CLASSES, 32, 32))
    rows = {row.path: row for row in both.rows}
    assert rows["coarse"].multiply_adds >= (9 * 4 + 4 * CLASSES) * 64
    assert rows["coarse"].parameters == 0  # none that is trained
    whole = both.numbers()
    assert whole["multiply_adds"] == alone.numbers()["multiply_adds"] + rows["coarse"].multiply_adds
    assert whole["parameters"] == alone.numbers()["parameters"]


def test_layers_are_put_into_the_finer_network() -> None:
    name = "monai.UNet"
    plain, fine = network(name, 1 + CLASSES).eval(), network(name, 1 + CLASSES).eval()
    attach(fine, Coarse(coarse_network(), CLASSES), 1)
    narrow, wide, expected = (
        [(place.name, place.path) for place in find_places(one, images(1, channels, 32, 32))]
        for one, channels in ((fine, 1), (fine, 1 + CLASSES), (plain, 1 + CLASSES))
    )
    assert wide == expected
    assert narrow[1:] == expected[1:]  # the first is `input`, here the image alone
    report = insert(fine, "dropout", "bottleneck", example=images(1, 1, 32, 32), p=0.5)
    assert len(report) == len(
        insert(plain, "dropout", "bottleneck", example=images(1, 1 + CLASSES, 32, 32), p=0.5)
    )
    x = images(1, 1, 32, 32)
    assert torch.equal(fine(x), plain(torch.cat([x, coarse_network().eval()(x).softmax(1)], dim=1)))


def test_for_an_export_it_becomes_a_part_like_any_other() -> None:
    fine = attach(network(channels=1 + CLASSES).eval(), Coarse(coarse_network(), CLASSES), 1)
    before = fine(images(1, 1, 16, 16))
    coarse_of(fine).show()
    assert "coarse.network.0.weight" in fine.state_dict()
    assert torch.equal(fine(images(1, 1, 16, 16)), before)


@pytest.mark.slow
def test_a_compiled_pass_gives_the_same_and_leaves_the_coarse_network_as_it_was() -> None:
    fine = attach(network(channels=1 + CLASSES).train(), Coarse(coarse_network(), CLASSES), 1)
    twin, x = copy.deepcopy(fine), images(2, 1, 16, 16)
    compiled = torch.compile(lambda image: twin(image), dynamic=False, backend="aot_eager")
    for one in (fine, compiled):
        one(x).square().sum().backward()
    for name, parameter in fine.named_parameters():
        torch.testing.assert_close(twin.get_parameter(name).grad, parameter.grad)
    assert all(p.grad is None for p in coarse_of(twin).network.parameters())


# Pretrained weights


def test_pretrained_weights_of_images_begin_without_the_answer(tmp_path: Path) -> None:
    plain = network(seed=3).eval()
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    fine = attach(network(channels=1 + CLASSES).eval(), Coarse(coarse_network(), CLASSES), 1)
    report = load_pretrained(fine, tmp_path / "plain.safetensors")
    assert report.adapted == ("encoder.0.conv1.weight",)
    torch.testing.assert_close(fine(images(1, 1, 16, 16)), plain(images(1, 1, 16, 16)))


def test_an_encoder_of_colors_is_for_the_image_though_it_has_as_many_channels(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    colors, fine = (UNet(2, 3, 2, channels=(4, 8)) for _ in range(2))
    attach(fine, Coarse(coarse_network(2), 2), 1)
    weights = {k: v for k, v in colors.state_dict().items() if k.startswith(("enc", "bott"))}
    save_file(weights, tmp_path / "encoder.safetensors")
    load_pretrained(fine, tmp_path / "encoder.safetensors", part="encoder")
    mine, theirs = (one.state_dict()["encoder.0.conv1.weight"] for one in (fine, colors))
    torch.testing.assert_close(mine[:, :1], theirs.sum(1, keepdim=True))
    assert not mine[:, 1:].any()

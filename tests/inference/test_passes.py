"""Sliding windows and mirrored passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medseg_reg.data.preprocessing import ImageSpec
from medseg_reg.errors import MedsegError
from medseg_reg.inference.passes import Passes, window_of
from medseg_reg.inference.predictor import Predictor
from medseg_reg.networks.build import build_network
from medseg_reg.networks.unet import UNet


class Position(nn.Module):
    """Logits that depend on where in the window a pixel lies, as borders of windows make them."""

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[2:]
        ramp = torch.arange(rows)[:, None] * 0.3 - torch.arange(columns) * 0.2
        return torch.cat([x * 2, x + ramp, -x], dim=1)


def gaussian(size: tuple[int, int]) -> np.ndarray:
    axes = [np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (n / 8)) ** 2) for n in size]
    weights = np.outer(*axes)
    return np.maximum(weights, max(weights.min(), 1e-3))


def starts(size: int, window: int, overlap: float) -> list[int]:
    step = max(1, int(window * (1 - overlap))) if size > window else window
    count = int(np.ceil((size - window) / step)) + 1
    return [min(i * step, size - window) for i in range(count)]


def by_hand(network: nn.Module, image: Tensor, window: tuple[int, int], overlap: float):
    """Windows of one image (1, C, H, W), in float64."""
    height, width = image.shape[2:]
    total, weight = np.zeros((3, height, width)), np.zeros((height, width))
    blend = gaussian(window)
    for row in starts(height, window[0], overlap):
        for column in starts(width, window[1], overlap):
            place = (slice(row, row + window[0]), slice(column, column + window[1]))
            p = network(image[(..., *place)]).double().softmax(1)[0].numpy()
            total[(slice(None), *place)] += blend * p
            weight[place] += blend
    return total / weight


@pytest.mark.parametrize(
    ("window", "overlap"), [((8, 8), 0.5), ((10, 8), 0.25), ((8, 12), 0.0), ((16, 20), 0.75)]
)
def test_windows_are_blended_by_a_gaussian(window, overlap):
    torch.manual_seed(0)
    image = torch.rand(1, 1, 23, 30)
    passes = Passes(window=window, overlap=overlap)
    found = passes.probabilities(Position(), image, at_once=4)[0].numpy()
    np.testing.assert_allclose(found, by_hand(Position(), image, window, overlap), atol=1e-5)
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-5)


def test_a_network_that_looks_at_single_pixels_sees_no_windows():
    network, images = nn.Conv2d(1, 3, 1), torch.rand(3, 1, 40, 28)
    whole = Passes().probabilities(network, images, 8)
    windows = Passes(window=(16, 8), overlap=0.5).probabilities(network, images, 8)
    torch.testing.assert_close(windows, whole)


def test_a_slice_smaller_than_the_window_is_padded_with_zero():
    network, image = nn.Conv2d(1, 2, 3, padding=1), torch.rand(1, 1, 9, 20)
    found = Passes(window=(16, 20)).probabilities(network, image, 1)
    padded = nn.functional.pad(image, (0, 0, 3, 4))
    torch.testing.assert_close(found, network(padded).softmax(1)[:, :, 3:12])


def test_one_channel_of_logits_becomes_two_classes():
    found = Passes(window=(8, 8)).probabilities(nn.Conv2d(1, 1, 1), torch.rand(2, 1, 12, 9), 4)
    assert found.shape == (2, 2, 12, 9)


FLIPS = {
    "horizontal": (("horizontal",), [(), (3,)]),
    "vertical": (("vertical",), [(), (2,)]),
    "both": (("horizontal", "vertical"), [(), (2,), (3,), (2, 3)]),
}


@pytest.mark.parametrize(("flips", "axes"), FLIPS.values(), ids=FLIPS)
def test_mirrored_passes_are_mirrored_back(flips, axes):
    torch.manual_seed(1)
    image = torch.rand(2, 1, 6, 9)
    found = Passes(flips=flips).probabilities(Position(), image, 8)
    expected = sum(Position()(image.flip(a)).softmax(1).flip(a) for a in axes) / len(axes)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("window", [None, (16, 16)])
def test_with_flips_a_mirrored_slice_gives_the_mirrored_answer(window):
    torch.manual_seed(2)
    network = UNet(2, 1, 3, channels=(4, 8)).eval()
    passes = Passes(window, flips=("horizontal", "vertical"))
    # Sizes that the network pads on one side alone.
    image = torch.rand(1, 1, 25, 18)
    with torch.no_grad():
        plain = passes.probabilities(network, image, 8)
        turned = passes.probabilities(network, image.flip(2, 3), 8).flip(2, 3)
        alone = Passes(window).probabilities(network, image, 8)
    torch.testing.assert_close(turned, plain, atol=1e-6, rtol=1e-5)
    assert (alone - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": (4, 64)}, r"--window 4 64: expected rows and columns from 8"),
        ({"window": (64, 5000)}, "--window 64 5000"),
        ({"overlap": 1.0}, r"--overlap 1: expected a share"),
        ({"overlap": -0.1}, "--overlap -0.1"),
        ({"flips": ("sideways",)}, "--flips sideways: expected horizontal or vertical"),
    ],
)
def test_passes_out_of_range_are_refused(arguments, message):
    with pytest.raises(MedsegError, match=message):
        Passes(**arguments)


def test_the_window_is_that_of_the_training_unless_another_is_named():
    assert window_of([], (48, 64)) == (48, 64)
    assert window_of([32], (48, 64)) == (32, 32)
    assert window_of([32, 40], None) == (32, 40)
    with pytest.raises(MedsegError, match="give the rows and columns"):
        window_of([], None)
    with pytest.raises(MedsegError, match="--window 1 2 3"):
        window_of([1, 2, 3], None)


def test_windows_cover_what_a_crop_would_leave_out():
    spec = ImageSpec(size=(16, 16), fit="crop")
    images = np.zeros((1, 40, 40), np.uint8)
    images[0, :6, :6] = 255
    network = nn.Conv2d(1, 2, 1)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([0.0, 10]).view(2, 1, 1, 1))
        network.bias.copy_(torch.tensor([5.0, 0]))
    cropped = Predictor(network, spec, 1, device="cpu").labels(images, "a")
    passes = Passes(window=(16, 16))
    windows = Predictor(network, spec, 1, device="cpu", passes=passes).labels(images, "a")
    assert cropped.sum() == 0
    np.testing.assert_array_equal(windows, images // 255)


@pytest.mark.parametrize("window", [None, (48, 48)])
def test_a_network_of_one_size_names_it_where_images_have_another(window):
    pytest.importorskip("einops")
    network = build_network(
        in_channels=1, classes=2, head="softmax", name="monai.UNETR",
        img_size=32, feature_size=4, hidden_size=12, mlp_dim=16, num_heads=3,
    )  # fmt: skip
    Predictor(network, ImageSpec(), 1).labels(np.zeros((1, 32, 32), np.uint8), "a")
    predictor = Predictor(network, ImageSpec(), 1, passes=Passes(window=window))
    with pytest.raises(MedsegError, match=r"48x48 is no size .* takes 32x32 alone"):
        predictor.labels(np.zeros((1, 48, 48), np.uint8), "a")

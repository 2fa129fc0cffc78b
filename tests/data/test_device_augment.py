"""Augmentation by torch gives the slices of albumentations: by the same draws, the same pixels."""

from __future__ import annotations

from collections import Counter
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from medseg_reg.data import warp
from medseg_reg.data.augment import TRANSFORMS, TURNING, Augmentation
from medseg_reg.data.device_augment import (
    STEPS,
    DeviceAugmentation,
    displacements,
    unsupported,
)

WIDE = {"rotate": [-30, 30], "scale": [0.7, 1.3], "translate_percent": [-0.1, 0.1], "shear": 9}
# What torch draws itself, and so differently.
DRAWN_THERE = ("ElasticTransform", "GaussNoise")
BORDERS: list[dict[str, Any]] = [{"border_mode": b} for b in (0, 1, 2, 4)]
FILLS: list[dict[str, Any]] = [{"fill": f} for f in (1, 0.5, [0.1, 0.2, 0.3])]
CASES: list[tuple[str, dict[str, Any]]] = [
    *[(name, {}) for name in TRANSFORMS if name not in DRAWN_THERE],
    *[("Affine", {**WIDE, **more}) for more in (*BORDERS, *FILLS)],
    *[("Affine", {"rotate": [-30, 30], "interpolation": mode}) for mode in (0, 2, 3)],
    *[("Rotate", {"limit": 180, **more}) for more in (*BORDERS, *FILLS)],
    *[("GridDistortion", more) for more in (*BORDERS, *FILLS, {"normalized": False})],
    *[("OpticalDistortion", {"distort_limit": 0.6, **more}) for more in (*BORDERS, *FILLS)],
    ("OpticalDistortion", {"mode": "fisheye", "distort_limit": 0.4}),
    ("GaussianBlur", {"sigma_limit": [4, 20]}),
    ("GaussianBlur", {"blur_limit": [3, 9]}),
    ("CoarseDropout", {"num_holes_range": [1, 6], "fill": 0.5, "fill_mask": 0}),
    ("CoarseDropout", {"hole_height_range": [3, 9], "hole_width_range": [3, 30]}),
    ("RandomBrightnessContrast", {"brightness_by_max": False}),
    ("RandomBrightnessContrast", {"ensure_safe_range": True}),
]


def smooth_slice(rows: int, columns: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """A slice without steps, so that positions and not interpolation decide."""
    noise = np.random.default_rng(0).uniform(0, 1, (rows, columns, channels)).astype(np.float32)
    image = cv2.GaussianBlur(noise, (0, 0), 3).reshape(noise.shape)
    image = (image - image.min()) / (image.max() - image.min())
    mask = np.zeros((rows, columns), np.uint8)
    mask[8:30, 10:33], mask[rows - 16 : rows - 4, 6:18] = 2, 7
    return image, mask


def on_device(
    transforms: list[tuple[str, dict[str, Any]]],
    image: np.ndarray,
    mask: np.ndarray,
    seeds: list[int],
) -> tuple[np.ndarray, np.ndarray]:
    images = torch.from_numpy(image).permute(2, 0, 1)[None].repeat(len(seeds), 1, 1, 1)
    masks = torch.from_numpy(mask)[None].repeat(len(seeds), 1, 1)
    x, y = DeviceAugmentation(transforms)(images, masks, seeds)
    return x.permute(0, 2, 3, 1).numpy(), y.numpy()


def compare(transforms: list[tuple[str, dict[str, Any]]], shape: tuple[int, int, int]) -> None:
    image, mask = smooth_slice(*shape)
    seeds = list(range(6))
    found, labels = on_device(transforms, image, mask, seeds)
    on_cpu = Augmentation(transforms)
    for x, y, seed in zip(found, labels, seeds, strict=True):
        expected, expected_labels = on_cpu(image, mask, seed)
        # OpenCV before 5 rounds positions to 1/32 pixel; at a border that shows in single pixels.
        apart = np.abs(x - expected)
        assert apart.mean() < 2e-3, seed
        assert np.quantile(apart, 0.98) < 0.02, seed
        assert (y != expected_labels).mean() < 2e-3, seed


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_a_slice_is_the_one_of_albumentations_within_interpolation(
    name: str, arguments: dict[str, Any]
) -> None:
    shape = (72, 72, 3) if name in TURNING else (64, 80, 3)
    if arguments.get("ensure_safe_range"):
        shape = (64, 80, 1)
    compare([(name, {**arguments, "p": 0.8})], shape)


def test_the_draws_of_a_chain_are_those_of_albumentations() -> None:
    chain: list[tuple[str, dict[str, Any]]] = [
        ("HorizontalFlip", {"p": 0.5}),
        ("GaussNoise", {"std_range": [0, 0], "p": 0.5}),
        ("Affine", {**WIDE, "p": 0.5}),
        ("SquareSymmetry", {"p": 0.5}),
        ("RandomGamma", {"p": 0.5}),
        ("CoarseDropout", {"p": 0.5}),
    ]
    compare(chain, (72, 72, 1))


def test_every_transform_that_may_be_configured_has_its_step() -> None:
    assert set(STEPS) == set(TRANSFORMS)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_shape_range_and_labels_are_kept(name: str) -> None:
    image, mask = smooth_slice(48, 48, 3)
    cubic = {"interpolation": 2} if name in ("Affine", "Rotate", "GridDistortion") else {}
    x, y = on_device([(name, {"p": 0.9, **cubic})], image, mask, list(range(8)))
    assert x.shape == (8, 48, 48, 3)
    assert x.dtype == np.float32
    assert 0 <= x.min() <= x.max() <= 1
    assert y.shape == (8, 48, 48)
    assert y.dtype == np.uint8
    assert set(np.unique(y)) <= {0, 2, 7}


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_a_slice_depends_on_its_own_seed_and_not_on_its_batch(share: float) -> None:
    image, mask = smooth_slice(40, 40, 1)
    chain: list[tuple[str, dict[str, Any]]] = [
        (name, {"p": share, **(WIDE if name == "Affine" else {})}) for name in TRANSFORMS
    ]
    together = on_device(chain, image, mask, [3, 4, 5, 3])
    assert np.array_equal(together[0][0], together[0][3])
    torch.manual_seed(1)
    for place, seed in enumerate((3, 4, 5)):
        x, y = on_device(chain, image, mask, [seed])
        assert np.allclose(x[0], together[0][place], atol=1e-5)
        assert np.array_equal(y[0], together[1][place])


def test_nothing_is_drawn_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    image, mask = smooth_slice(40, 40, 1)
    on_device([(name, {"p": 1.0}) for name in TRANSFORMS], image, mask, [0, 1])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("augmentation", [Augmentation, DeviceAugmentation])
def test_transforms_of_a_chain_are_applied_independently(augmentation: Any) -> None:
    made = augmentation([("HorizontalFlip", {"p": 0.5}), ("VerticalFlip", {"p": 0.5})])
    image = np.zeros((4, 4, 1), np.float32)
    image[0, 0] = 1
    seen: Counter[tuple[int, ...]] = Counter()
    if augmentation is Augmentation:
        results = [made(image, image[..., 0].astype(np.uint8), seed)[0] for seed in range(400)]
    else:
        many = torch.from_numpy(image).permute(2, 0, 1)[None].repeat(400, 1, 1, 1)
        results = list(made(many, many[:, 0].byte(), range(400))[0].permute(0, 2, 3, 1).numpy())
    for x in results:
        seen[tuple(int(i) for i in np.argwhere(x[..., 0] == 1)[0])] += 1
    assert len(seen) == 4
    assert all(60 < count < 140 for count in seen.values())  # 100 and 4.6 deviations


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("per_channel", [True, False])
def test_noise_has_the_mean_and_deviation_that_were_drawn(channels: int, per_channel: bool) -> None:
    options = {"std_range": [0.02, 0.06], "mean_range": [-0.1, 0.1], "per_channel": per_channel}
    chain: list[tuple[str, dict[str, Any]]] = [("GaussNoise", {**options, "p": 1.0})]
    image, mask = np.full((96, 96, channels), 0.5, np.float32), np.zeros((96, 96), np.uint8)
    found, _ = on_device(chain, image, mask, list(range(5)))
    on_cpu = Augmentation(chain)
    for x, seed in zip(found, range(5), strict=True):
        expected, _ = on_cpu(image, mask, seed)
        assert x.mean() == pytest.approx(expected.mean(), abs=0.003)
        assert x.std() == pytest.approx(expected.std(), rel=0.05)
        assert (np.ptp(x, axis=2).max() == 0) == (channels == 1 or not per_channel)
    assert len({x.tobytes() for x in found}) == 5


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 60, "sigma": 6},
        {"alpha": 60, "sigma": 6, "noise_distribution": "uniform"},
        {"alpha": 90, "sigma": 30, "approximate": True},
        {"alpha": 60, "sigma": 8, "same_dxdy": True},
    ],
)
def test_displacements_have_the_distribution_of_the_library(options: dict[str, Any]) -> None:
    made = Augmentation([("ElasticTransform", {**options, "p": 1.0})])
    size, ours, theirs = 64, [], []
    columns, rows = np.meshgrid(np.arange(size), np.arange(size))
    for seed in range(40):
        (transform,) = made.seeded(seed).transforms
        draw = transform.get_params_dependent_on_data({"shape": (size, size, 1)}, {})
        theirs.append(np.stack([draw["map_x"] - columns, draw["map_y"] - rows]))
        draws = [{"seed": seed}]
        field = displacements(draws, size, size, transform, torch.device("cpu"))[0].numpy()
        ours.append(field if len(field) == 2 else np.concatenate([field, field]))
    a, b = np.stack(ours), np.stack(theirs)
    assert a.std() == pytest.approx(b.std(), rel=0.1)
    assert abs(a.mean()) < 0.2 * b.std()
    # as smooth: the difference of neighbours, and of pixels ten apart
    for step in (1, 10):
        far = [float((f[..., step:] - f[..., :-step]).std()) for f in (a, b)]
        assert far[0] == pytest.approx(far[1], rel=0.1)
    # and at the seam, where the library smooths one field into the other
    assert a[:, :, 0].std() == pytest.approx(b[:, :, 0].std(), rel=0.2)
    same = np.array_equal(a[:, 0], a[:, 1])
    assert same == bool(options.get("same_dxdy"))


def test_elastic_images_and_masks_move_together() -> None:
    mask = smooth_slice(64, 64, 1)[1]
    image = (mask > 0).astype(np.float32)[..., None]
    chain: list[tuple[str, dict[str, Any]]] = [
        ("ElasticTransform", {"alpha": 200, "sigma": 8, "p": 1.0})
    ]
    x, y = on_device(chain, image, mask, [0, 1, 2])
    for moved, labels in zip(x, y, strict=True):
        assert not np.array_equal(labels, mask)
        found = moved[..., 0] > 0.5
        assert 2 * (found & (labels > 0)).sum() / (found.sum() + (labels > 0).sum()) > 0.93


@pytest.mark.parametrize("border", [1, 4])
def test_smoothing_is_that_of_opencv_even_where_the_kernel_is_longer_than_the_slice(
    border: int,
) -> None:
    images = torch.rand(2, 1, 9, 12, generator=torch.Generator().manual_seed(0))
    kernels = torch.rand(2, 27, generator=torch.Generator().manual_seed(1))
    found = warp.filter_separably(images, kernels, border)
    for image, kernel, result in zip(images, kernels.numpy(), found, strict=True):
        kind = {1: cv2.BORDER_REPLICATE, 4: cv2.BORDER_REFLECT_101}[border]
        expected = cv2.sepFilter2D(image[0].numpy(), -1, kernel, kernel, borderType=kind)
        assert np.allclose(result[0].numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("Affine", {"interpolation": 4}, "Affine with interpolation 4"),
        ("ElasticTransform", {"border_mode": 3}, "ElasticTransform with border_mode 3"),
        ("CoarseDropout", {"fill": "random"}, "CoarseDropout with fill 'random'"),
        ("GaussNoise", {"noise_scale_factor": 0.5}, "GaussNoise with noise_scale_factor 0.5"),
        (
            "RandomBrightnessContrast",
            {"brightness_by_max": False, "ensure_safe_range": True},
            "RandomBrightnessContrast with ensure_safe_range True",
        ),
    ],
)
def test_what_torch_cannot_compute_is_named(
    name: str, arguments: dict[str, Any], message: str
) -> None:
    assert unsupported([("HorizontalFlip", {}), (name, arguments)]) == message


def test_the_defaults_of_all_transforms_can_be_computed() -> None:
    assert unsupported([(name, {}) for name in TRANSFORMS]) is None

"""Augmentation keeps shapes, ranges and labels, and follows from its seed alone."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg_reg.data.augment import TRANSFORMS, Augmentation, check_augmentation
from medseg_reg.errors import MedsegError

# What makes a transform do something when its defaults do nothing.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "Affine": {"rotate": [-20, 20], "scale": [0.8, 1.2], "translate_percent": [-0.1, 0.1]},
}
NOT_MOVING = ("CoarseDropout", "GaussNoise", "GaussianBlur")
TURNING = ("RandomRotate90", "SquareSymmetry", "Transpose")


def chain(name: str) -> Augmentation:
    return Augmentation([(name, {"p": 1.0, **ARGUMENTS.get(name, {})})])


def slice_of(rows: int, columns: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    image = rng.uniform(0.2, 0.8, (rows, columns, channels)).astype(np.float32)
    mask = np.zeros((rows, columns), np.uint8)
    mask[4:16, 5:18], mask[20:28, 3:9] = 2, 7
    image[mask > 0] += 0.2
    return image, mask


def augmented(name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    return chain(name)(*slice_of(32, 32, 1), seed)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_keeps_shape_type_range_and_labels(name: str, channels: int) -> None:
    shape = (32, 32) if name in TURNING else (32, 41)
    image, mask = slice_of(*shape, channels)
    before = image.copy(), mask.copy()
    augment = chain(name)
    changed = 0
    for seed in range(8):
        x, y = augment(image, mask, seed)
        assert x.shape == image.shape
        assert x.dtype == np.float32
        assert 0 <= x.min() <= x.max() <= 1
        assert y.shape == mask.shape
        assert y.dtype == np.uint8
        assert set(np.unique(y)) <= {0, 2, 7}
        changed += not np.array_equal(x, image)
    assert changed >= 4
    assert np.array_equal(image, before[0])
    assert np.array_equal(mask, before[1])


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name not in NOT_MOVING])
def test_image_and_mask_move_together(name: str) -> None:
    mask = slice_of(40, 40, 1)[1]
    image = (mask > 0).astype(np.float32)[..., None]
    for seed in range(4):
        x, y = chain(name)(image, mask, seed)
        found = x[..., 0] > (x.min() + x.max()) / 2
        assert 2 * (found & (y > 0)).sum() / (found.sum() + (y > 0).sum()) > 0.93


def test_the_seed_alone_decides() -> None:
    steps = [("Affine", {"rotate": [-20, 20], "p": 0.7}), ("GaussNoise", {"p": 0.5})]
    image, mask = slice_of(32, 32, 1)
    used, fresh = Augmentation(steps), Augmentation(steps)
    for seed in range(10):
        used(image, mask, seed)
    np.random.seed(1)
    results = [used(image, mask, 3), pickle.loads(pickle.dumps(used))(image, mask, 3)]
    np.random.seed(2)
    results.append(fresh(image, mask, 3))
    for x, y in results[1:]:
        assert np.array_equal(x, results[0][0])
        assert np.array_equal(y, results[0][1])
    assert len({used(image, mask, seed)[0].tobytes() for seed in range(10)}) > 5


def test_a_spawned_process_gives_the_same_results() -> None:
    jobs = [(name, 5) for name in TRANSFORMS]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.starmap(augmented, jobs)
    for (name, seed), (x, y) in zip(jobs, there, strict=True):
        here = augmented(name, seed)
        assert np.array_equal(x, here[0]), name
        assert np.array_equal(y, here[1]), name


def test_an_interpolation_that_overshoots_stays_in_range() -> None:
    mask = slice_of(32, 32, 1)[1]
    cubic = Augmentation([("Affine", {"rotate": [20, 20], "interpolation": 2, "p": 1.0})])
    x, _ = cubic((mask > 0).astype(np.float32)[..., None], mask, 0)
    assert (x.min(), x.max()) == (0, 1)


def test_nothing_is_drawn_from_the_global_generator() -> None:
    np.random.seed(4)
    before = np.random.get_state()[1].copy()  # type: ignore[index]
    for name in TRANSFORMS:
        augmented(name, 1)
    assert np.array_equal(np.random.get_state()[1], before)  # type: ignore[index]


def test_an_empty_chain_hands_back_the_same_arrays() -> None:
    image, mask = slice_of(32, 32, 1)
    x, y = Augmentation([])(image, mask, 0)
    assert x is image
    assert y is mask


@pytest.mark.parametrize("name", TURNING)
def test_turning_a_slice_that_is_not_square_says_so(name: str) -> None:
    augment, slices = chain(name), slice_of(32, 40, 1)

    def turn() -> None:
        for seed in range(20):
            augment(*slices, seed)

    with pytest.raises(MedsegError, match=rf"\(32, 40\) to \(40, 32\).*{name}.*square"):
        turn()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_listed_transform_passes_its_check(name: str) -> None:
    check_augmentation(name, {"p": 0.5})


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("HorizontalFlop", {}, "Did you mean 'HorizontalFlip'"),
        ("RandomCrop", {}, "unknown augmentation 'RandomCrop'.*Known: Affine"),
        ("Rotate", {"lmit": 3}, "Rotate has no argument 'lmit'. Did you mean 'limit'"),
        ("Rotate", {"self": 3}, "no argument 'self'"),
        ("Rotate", {"limit": "much"}, "Rotate: .*limit"),
        ("HorizontalFlip", {"p": 1.5}, "HorizontalFlip: .*p"),
        ("Rotate", {"mask_interpolation": 1}, "mask_interpolation 1: labels must not be mixed"),
        ("CoarseDropout", {"fill_mask": 9}, "fill_mask 9: .*background"),
        ("Affine", {"fit_output": True}, "fit_output True: slices keep their size"),
        ("Rotate", {"crop_border": True}, "crop_border True: slices keep their size"),
    ],
)
def test_what_cannot_work_is_refused_with_a_hint(
    name: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_augmentation(name, arguments)


def test_nothing_asks_the_network() -> None:
    script = (
        "import socket\n"
        "def refuse(*_, **__): print('asked'); raise OSError\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from medseg_reg.data.augment import check_augmentation\n"
        "check_augmentation('HorizontalFlip', {})\n"
        "print('done')\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "NO_ALBUMENTATIONS_UPDATE"}
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env=environment,
    )
    assert result.stdout == "done\n", result.stderr

"""A slice keeps its place, its labels and its range on the way to the network and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from medseg_reg.data.preprocessing import (
    Fit,
    ImageSpec,
    intensity_limits,
    limits_of,
    scale_intensity,
)
from medseg_reg.errors import MedsegError
from tests.stores import make_store

FITS = ("resize", "letterbox", "crop")
sides = st.integers(8, 70)
shapes = st.tuples(sides, sides)


def blob(shape: tuple[int, int]) -> np.ndarray:
    """An ellipse off the middle, far from every edge."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    down = (rows + 0.5 - 0.45 * shape[0]) / (0.2 * shape[0])
    right = (columns + 0.5 - 0.55 * shape[1]) / (0.17 * shape[1])
    return (down**2 + right**2 <= 1).astype(np.uint8)


def centre(image: np.ndarray) -> np.ndarray:
    """Centre of mass in pixels, the corner of the image being 0."""
    axes = (np.arange(n) + 0.5 for n in image.shape)
    grid = np.meshgrid(*axes, indexing="ij")
    return np.array([(axis * image).sum() / image.sum() for axis in grid])


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def undone(fit: Fit, mask: np.ndarray) -> np.ndarray:
    """Bring a mask to the network's grid and back, as the scores of a perfect network are."""
    scores = torch.nn.functional.one_hot(torch.from_numpy(fit.mask(mask)).long(), 3)
    back = fit.undo(scores.permute(2, 0, 1)[None].float())
    assert back.shape == (1, 3, *mask.shape)
    return back.argmax(1)[0].numpy()


# Intensities


def test_a_window_maps_its_ends_to_zero_and_one_and_clips() -> None:
    image = np.array([[-3000, -100, 70], [240, 241, 3000]], np.int16)
    scaled = scale_intensity(image, (-100.0, 240.0))
    assert scaled.shape == (2, 3, 1)
    assert scaled.dtype == np.float32
    assert np.allclose(scaled[..., 0], [[0, 0, 0.5], [1, 1, 1]], atol=1e-6)


def test_scaling_leaves_the_stored_slice_as_it_is() -> None:
    image = np.full((4, 4), 5, np.float32)
    scale_intensity(image, (0.0, 10.0))
    assert (image == 5).all()


@given(
    st.lists(st.integers(-32768, 32767), min_size=4, max_size=4),
    st.integers(-2000, 2000),
    st.integers(1, 4000),
)
@settings(deadline=None)
def test_scaled_values_lie_in_zero_to_one_and_keep_their_order(
    values: list[int], low: int, width: int
) -> None:
    image = np.array([sorted(values)], np.int16)
    scaled = scale_intensity(image, (float(low), float(low + width)))
    assert scaled.min() >= 0
    assert scaled.max() <= 1
    assert (np.diff(scaled[0, :, 0]) >= 0).all()


def test_percentiles_are_those_of_the_whole_case(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", cases=2, dtype="float32")
    spec = ImageSpec(percentiles=(2, 98))
    expected = tuple(np.percentile(store.image("case_01"), (2, 98)))
    assert intensity_limits(spec, store, "case_01") == pytest.approx(expected)
    assert intensity_limits(spec, store, "case_00") != pytest.approx(expected)


def test_percentiles_of_a_constant_image_give_zeros() -> None:
    image = np.full((2, 5, 5), 7, np.int16)
    limits = limits_of(ImageSpec(percentiles=(1, 99)), image, "x")
    assert (scale_intensity(image[0], limits) == 0).all()


def test_eight_bit_images_need_no_window_and_others_say_that_they_do() -> None:
    assert limits_of(ImageSpec(), np.zeros((1, 8, 8), np.uint8), "x") == (0.0, 255.0)
    with pytest.raises(MedsegError, match=r"scan: holds int16 .*`window`.*`percentiles`"):
        limits_of(ImageSpec(), np.zeros((1, 8, 8), np.int16), "scan")


def test_a_window_comes_before_the_range_of_eight_bits() -> None:
    assert limits_of(ImageSpec(window=(10, 90)), np.zeros((1, 8, 8), np.uint8), "x") == (10, 90)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": (0, 1), "percentiles": (0, 99)}, "not both"),
        ({"window": (3, 3)}, "not below"),
        ({"window": (4, 3)}, "not below"),
        ({"window": (float("-inf"), 3)}, "finite"),
        ({"window": (float("nan"), 3)}, "finite"),
        ({"percentiles": (-1, 50)}, "between 0 and 100"),
        ({"percentiles": (1, 101)}, "between 0 and 100"),
        ({"size": (7, 64)}, "greater than or equal to 8"),
        ({"size": (64, 4097)}, "less than or equal to 4096"),
        ({"fit": "strech"}, "'letterbox'"),
        ({"sise": (64, 64)}, "sise"),
    ],
)
def test_a_specification_that_cannot_work_is_refused(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        ImageSpec(**arguments)


# Geometry


def test_without_a_size_a_slice_stays_as_it_is() -> None:
    image, mask = np.random.default_rng(0).random((9, 14, 3), np.float32), blob((9, 14))
    fit = Fit.of(ImageSpec(), (9, 14))
    assert np.array_equal(fit.image(image), image)
    assert np.array_equal(fit.mask(mask), mask)
    assert torch.equal(fit.undo(torch.ones(1, 2, 9, 14)), torch.ones(1, 2, 9, 14))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("fit", FITS)
@given(source=shapes, size=shapes)
@settings(max_examples=25, deadline=None)
def test_image_and_mask_get_the_size_asked_for_and_no_new_values(
    fit: str, channels: int, source: tuple[int, int], size: tuple[int, int]
) -> None:
    rng = np.random.default_rng(0)
    image = rng.random((*source, channels), np.float32)
    mask = rng.choice(np.array([0, 2, 7, 255], np.uint8), source)
    plan = Fit.of(ImageSpec(size=size, fit=fit), source)
    fitted, labels = plan.image(image), plan.mask(mask)
    assert fitted.shape == (*size, channels)
    assert fitted.dtype == np.float32
    assert fitted.min() >= 0
    assert fitted.max() <= 1
    assert labels.shape == size
    assert labels.dtype == np.uint8
    assert set(np.unique(labels)) <= {0, 2, 7, 255}


@pytest.mark.parametrize("fit", ["resize", "letterbox"])
@given(source=st.tuples(st.integers(24, 90), st.integers(24, 90)), size=st.tuples(sides, sides))
@settings(max_examples=60, deadline=None)
def test_resizing_moves_neither_image_nor_mask(
    fit: str, source: tuple[int, int], size: tuple[int, int]
) -> None:
    mask = blob(source)
    plan = Fit.of(ImageSpec(size=size, fit=fit), source)
    assume(min(plan.inner) >= 8)
    scale = np.array(plan.inner) / source
    offset = (np.array(size) - plan.inner) // 2
    expected = centre(mask) * scale + offset
    image = plan.image(mask[..., None].astype(np.float32))[..., 0]
    assert np.abs(centre(image) - expected).max() < 0.1
    # A mask cannot lie between pixels: half a pixel of the coarser grid is its limit.
    assert (np.abs(centre(plan.mask(mask)) - expected) < 0.5 * np.maximum(scale, 1)).all()


@pytest.mark.parametrize("factor", [3, 5])
def test_shrinking_by_an_odd_factor_takes_the_middle_and_the_mean(factor: int) -> None:
    rng = np.random.default_rng(0)
    source = (9 * factor, 11 * factor)
    mask = rng.integers(0, 5, source, np.uint8)
    image = rng.random((*source, 1), np.float32)
    plan = Fit.of(ImageSpec(size=(9, 11)), source)
    assert np.array_equal(plan.mask(mask), mask[factor // 2 :: factor, factor // 2 :: factor])
    means = image.reshape(9, factor, 11, factor).mean(axis=(1, 3))
    assert np.allclose(plan.image(image)[..., 0], means, atol=1e-5)


def test_an_axis_that_shrinks_is_averaged_also_when_the_other_grows() -> None:
    stripes = np.zeros((32, 64, 1), np.float32)
    stripes[:, ::2] = 1
    for size in ((70, 32), (33, 32), (32, 32)):
        fitted = Fit.of(ImageSpec(size=size), (32, 64)).image(stripes)
        assert np.allclose(fitted, 0.5)


def test_rows_and_columns_are_not_exchanged() -> None:
    image = np.zeros((20, 40, 1), np.float32)
    image[:10] = 1
    fitted = Fit.of(ImageSpec(size=(60, 24)), (20, 40)).image(image)
    assert (fitted[:29] > 0.99).all()
    assert (fitted[31:] < 0.01).all()


@pytest.mark.parametrize(
    ("source", "size", "inner"),
    [
        ((20, 40), (32, 32), (16, 32)),
        ((40, 20), (32, 32), (32, 16)),
        ((100, 300), (64, 96), (32, 96)),
        ((8, 4000), (64, 64), (1, 64)),
    ],
)
def test_a_letterbox_keeps_the_aspect_and_pads_evenly_with_zeros(
    source: tuple[int, int], size: tuple[int, int], inner: tuple[int, int]
) -> None:
    plan = Fit.of(ImageSpec(size=size, fit="letterbox"), source)
    assert plan.inner == inner
    filled = plan.image(np.ones((*source, 1), np.float32))[..., 0] > 0
    rows, columns = np.flatnonzero(filled.any(1)), np.flatnonzero(filled.any(0))
    assert (len(rows), len(columns)) == inner
    for found, n in ((rows, size[0]), (columns, size[1])):
        assert abs(found[0] - (n - 1 - found[-1])) <= 1


def test_a_crop_keeps_the_middle_pixel_by_pixel() -> None:
    image = np.arange(12 * 9, dtype=np.float32).reshape(12, 9, 1)
    fitted = Fit.of(ImageSpec(size=(8, 15), fit="crop"), (12, 9)).image(image)
    assert np.array_equal(fitted[:, 3:12], image[2:10])
    assert not fitted[:, :3].any()
    assert not fitted[:, 12:].any()


@given(source=shapes, size=shapes)
@settings(max_examples=50, deadline=None)
def test_undoing_a_crop_is_exact_inside_and_background_outside(
    source: tuple[int, int], size: tuple[int, int]
) -> None:
    mask = np.random.default_rng(0).integers(0, 3, source, np.uint8)
    plan = Fit.of(ImageSpec(size=size, fit="crop"), source)
    kept = plan.undo(torch.ones(1, 1, *size))[0, 0].numpy() > 0
    assert kept.sum() == np.prod(np.minimum(source, size))
    assert np.array_equal(undone(plan, mask), np.where(kept, mask, 0))


@pytest.mark.parametrize("fit", ["resize", "letterbox"])
@pytest.mark.parametrize("source", [(96, 96), (96, 61), (50, 131), (200, 90)])
def test_undoing_brings_a_shape_back(fit: str, source: tuple[int, int]) -> None:
    plan = Fit.of(ImageSpec(size=(80, 72), fit=fit), source)
    mask = blob(source)
    back = undone(plan, mask)
    assert dice(back == 1, mask == 1) > 0.95
    assert np.abs(centre(back) - centre(mask)).max() < 0.5 * max(np.array(source) / plan.inner)

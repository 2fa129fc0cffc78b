"""Surface distances against all pairs of surface voxels, MONAI, and what policies say."""

from __future__ import annotations

import math
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from monai.metrics.surface_dice import compute_surface_dice
from monai.metrics.surface_distance import compute_average_surface_distance
from scipy import ndimage

from medseg_reg.metrics import (
    average_surface_distance,
    hausdorff_distance,
    pooled,
    surface,
    surface_dice,
    surface_distances,
)
from tests.reference import metrics as reference

SPACINGS = {2: (0.7, 1.3), 3: (2.5, 0.8, 0.6)}


def masks(shape, seed=0, share=0.3):
    generator = np.random.default_rng(seed)
    return generator.random(shape) < share, generator.random(shape) < share


def ball(shape, centre, radius, spacing=(1, 1, 1)):
    axes = np.ogrid[tuple(slice(0, n) for n in shape)]
    squares = sum(((x - c) * s) ** 2 for x, c, s in zip(axes, centre, spacing, strict=True))
    return squares <= radius**2


def agrees_with_all_pairs(prediction, truth, spacing):
    got = surface_distances(prediction, truth, spacing)
    expected = reference.distances(prediction, truth, spacing)
    for side, pairs in zip(got[:2], expected, strict=True):
        np.testing.assert_allclose(side, pairs, rtol=1e-6, atol=1e-6)
    return got, expected


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=3),
    share=st.sampled_from([0.02, 0.3, 0.8, 1.0]),
    seed=st.integers(0, 1000),
)
def test_distances_equal_those_of_all_pairs_of_surface_voxels(shape, share, seed):
    prediction, truth = masks(shape, seed, share)
    agrees_with_all_pairs(prediction, truth, SPACINGS[len(shape)])


@pytest.mark.parametrize("shape", [(9, 8), (5, 7, 6)])
@pytest.mark.parametrize("percentile", [0, 50, 95, 100])
def test_scores_follow_from_all_pairs(shape, percentile):
    spacing = SPACINGS[len(shape)]
    got, (forth, back) = agrees_with_all_pairs(*masks(shape), spacing)
    directed = [reference.percentile(side, percentile) for side in (forth, back)]
    assert hausdorff_distance(got, percentile) == pytest.approx(max(directed), rel=1e-6)
    both = [*forth, *back]
    assert average_surface_distance(got) == pytest.approx(sum(both) / len(both), rel=1e-6)
    for tolerance in (0.0, 0.7, 1.0, 1.4, 9.0):
        within = sum(d <= tolerance + 1e-9 for d in both) / len(both)
        assert surface_dice(got, tolerance) == pytest.approx(within)


# MONAI warns of an argument that it passes itself.
@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy.*:FutureWarning")
@pytest.mark.parametrize("shape", [(14, 13), (9, 12, 11)])
def test_monai_gives_the_same(shape):
    spacing = SPACINGS[len(shape)]
    prediction, truth = masks(shape, share=0.4)
    one, other = (torch.from_numpy(m)[None, None].float() for m in (prediction, truth))
    got = surface_distances(prediction, truth, spacing)
    for percentile in (50, 95, 100):
        theirs = compute_hausdorff_distance(
            one, other, include_background=True, percentile=percentile, spacing=spacing
        )
        assert hausdorff_distance(got, percentile) == pytest.approx(theirs.item(), rel=1e-5)
    theirs = compute_average_surface_distance(
        one, other, include_background=True, symmetric=True, spacing=spacing
    )
    assert average_surface_distance(got) == pytest.approx(theirs.item(), rel=1e-5)
    theirs = compute_surface_dice(one, other, [1.0], include_background=True, spacing=spacing)
    assert surface_dice(got, 1.0) == pytest.approx(theirs.item(), rel=1e-5)


def test_medpy_takes_other_means_as_documented():
    """medpy by hand: the percentile of both sets together, the mean of the directed means."""
    truth, prediction = np.zeros((2, 30, 30), dtype=bool)
    truth[5:25, 5:25] = True
    prediction[12:15, 12:15] = True
    forth, back, _ = got = surface_distances(prediction, truth)
    assert len(forth) < len(back)
    assert np.percentile(np.concatenate([forth, back]), 95) < hausdorff_distance(got)
    assert (forth.mean() + back.mean()) / 2 != pytest.approx(average_surface_distance(got))


def test_the_surface_is_what_a_face_neighbour_outside_makes():
    for shape in ((7, 8), (5, 6, 7)):
        mask = masks(shape, share=0.7)[0]
        assert np.array_equal(surface(mask), mask & ~ndimage.binary_erosion(mask))
        assert sorted(reference.surface(mask)) == [tuple(i) for i in np.argwhere(surface(mask))]


def test_an_axis_of_length_one_makes_no_surface():
    mask = masks((8, 9), share=0.8)[0]
    assert np.array_equal(surface(mask[None])[0], surface(mask))
    flat = surface_distances(mask, ~mask, (1.0, 2.0))
    deep = surface_distances(mask[:, None], ~mask[:, None], (1.0, 50.0, 2.0))
    assert np.array_equal(flat.from_truth, deep.from_truth)


def test_two_points_are_as_far_apart_as_the_spacing_says():
    prediction, truth = np.zeros((2, 6, 7, 8), dtype=bool)
    prediction[1, 2, 3] = truth[4, 6, 3] = True
    got = surface_distances(prediction, truth, (2.0, 0.5, 0.25))
    assert hausdorff_distance(got) == pytest.approx(math.hypot(6, 2))
    assert got.diagonal == pytest.approx(math.hypot(12, 3.5, 2))
    assert surface_distances(prediction, truth).from_truth == pytest.approx([5])


@pytest.mark.parametrize("spacing", [(0.1, 0.3), (0.7, 0.7), (1 / 3, 1.0)])
def test_a_distance_equal_to_the_tolerance_is_within_it(spacing):
    truth, prediction = np.zeros((2, 12, 12), dtype=bool)
    truth[2, 2], prediction[5, 2] = True, True
    got = surface_distances(prediction, truth, spacing)
    assert surface_dice(got, 3 * spacing[0]) == 1
    assert surface_dice(got, 2.99 * spacing[0]) == 0


def test_equal_masks_are_at_distance_zero():
    mask = ball((12, 14, 13), (6, 7, 6), 4)
    got = surface_distances(mask, mask.copy())
    assert hausdorff_distance(got, 100) == average_surface_distance(got) == 0
    assert surface_dice(got, 0.0) == 1


def test_distances_are_as_exact_as_promised():
    generator = np.random.default_rng(0)
    prediction, truth = generator.random((2, 30, 200, 200)) < 0.0005
    spacing = (3.7, 0.683594, 0.683594)
    got = surface_distances(prediction, truth, spacing)
    exact = ndimage.distance_transform_edt(~truth, spacing)[prediction]
    assert np.abs(got.from_prediction - exact).max() < 1e-6 * got.diagonal


def test_a_shift_is_seen_in_millimetres():
    truth = ball((20, 30, 30), (10, 15, 12), 6)
    prediction = np.roll(truth, 2, axis=2)
    got = surface_distances(prediction, truth, (1.0, 1.0, 0.5))
    assert hausdorff_distance(got, 100) == pytest.approx(1.0)
    assert 0 < average_surface_distance(got) < 1
    assert surface_dice(got, 1.0) == 1
    assert surface_dice(got, 0.4) < 1


@pytest.mark.parametrize("place", [slice(0, 3), slice(9, 12)])
def test_the_rest_of_the_volume_does_not_matter(place):
    prediction, truth = np.zeros((2, 12, 12, 12), dtype=bool)
    prediction[place, place, place], truth[place, place, place] = masks((3, 3, 3), 4, 0.6)
    small = surface_distances(*masks((3, 3, 3), 4, 0.6))
    large = surface_distances(prediction, truth)
    assert np.allclose(small.from_truth, large.from_truth)
    assert np.allclose(small.from_prediction, large.from_prediction)


def test_mirrored_masks_and_swapped_roles_give_the_same_scores():
    prediction, truth = masks((7, 8, 9))
    scores = []
    for one, other in (
        (prediction, truth), (truth, prediction), (prediction[::-1], truth[::-1]),
        (prediction[:, :, ::-1], truth[:, :, ::-1]),
    ):  # fmt: skip
        got = surface_distances(one, other, (2.0, 1.0, 0.5))
        scores.append((hausdorff_distance(got), average_surface_distance(got),
                       surface_dice(got, 1.0)))  # fmt: skip
    assert np.allclose(scores, scores[0])


EMPTY = np.zeros((4, 5), dtype=bool)
SOME = np.eye(4, 5, dtype=bool)
DIAGONAL = math.hypot(4 * 2, 5)


@pytest.mark.parametrize(
    ("empty", "missing", "distance", "share"),
    [
        ("one", "diagonal", 0.0, 1.0),
        ("one", "nan", 0.0, 1.0),
        ("zero", "diagonal", DIAGONAL, 0.0),
        ("zero", "nan", math.nan, 0.0),
        ("nan", "diagonal", math.nan, math.nan),
        ("nan", "nan", math.nan, math.nan),
    ],
)
def test_the_empty_policy_decides_where_both_masks_are_empty(empty, missing, distance, share):
    got = surface_distances(EMPTY, EMPTY, (2.0, 1.0))
    assert hausdorff_distance(got, 95, empty, missing) == pytest.approx(distance, nan_ok=True)
    assert average_surface_distance(got, empty, missing) == pytest.approx(distance, nan_ok=True)
    assert surface_dice(got, 1.0, empty) == pytest.approx(share, nan_ok=True)


@pytest.mark.parametrize("empty", ["one", "zero", "nan"])
@pytest.mark.parametrize(("missing", "distance"), [("diagonal", DIAGONAL), ("nan", math.nan)])
@pytest.mark.parametrize("pair", [(EMPTY, SOME), (SOME, EMPTY)])
def test_the_missing_policy_decides_where_one_mask_is_empty(pair, missing, distance, empty):
    got = surface_distances(*pair, (2.0, 1.0))
    assert hausdorff_distance(got, 95, empty, missing) == pytest.approx(distance, nan_ok=True)
    assert average_surface_distance(got, empty, missing) == pytest.approx(distance, nan_ok=True)
    assert surface_dice(got, 100.0, empty) == 0


def test_monai_gives_no_finite_distance_where_one_mask_is_empty():
    one, other = (torch.from_numpy(m)[None, None].float() for m in (EMPTY, SOME))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = compute_hausdorff_distance(one, other, include_background=True)
    assert not theirs.isfinite().any()


def test_frames_are_pooled_and_not_averaged():
    frames = [masks((8, 9), seed, 0.5) for seed in range(3)] + [(EMPTY_FRAME, EMPTY_FRAME)]
    parts = [surface_distances(*pair) for pair in frames]
    both = np.concatenate([side for part in parts for side in part[:2]])
    assert average_surface_distance(pooled(parts)) == pytest.approx(both.mean())
    assert surface_dice(pooled(parts), 1.0) == pytest.approx((both <= 1).mean())
    assert pooled(parts).diagonal == math.hypot(8, 9)


EMPTY_FRAME = np.zeros((8, 9), dtype=bool)


def test_a_frame_in_which_nothing_is_found_counts_by_its_surface():
    truth = masks((8, 9), 1, 0.5)[1]
    good = surface_distances(truth, truth)
    lost = surface_distances(EMPTY_FRAME, truth)
    share = len(good.from_truth) * 2 / (len(good.from_truth) * 3)
    assert surface_dice(pooled([good, lost]), 1.0) == pytest.approx(share)
    assert average_surface_distance(pooled([good, lost])) == pytest.approx(
        good.diagonal * (1 - share)
    )
    assert average_surface_distance(pooled([good, lost]), missing="nan") == 0


def test_a_volume_of_512_by_512_by_200_takes_seconds():
    """Two organs of 150 x 150 x 60 voxels far from each other's edges; measured: about 1 s."""
    truth, prediction = np.zeros((2, 200, 512, 512), dtype=bool)
    truth[80:140, 200:350, 200:350] = ball((60, 150, 150), (30, 75, 75), 70, (2.5, 1, 1))
    prediction[81:141, 203:353, 200:350] = truth[80:140, 200:350, 200:350]
    start = time.process_time()
    got = surface_distances(prediction, truth, (2.5, 0.8, 0.8))
    assert time.process_time() - start < 20
    assert hausdorff_distance(got, 100) == pytest.approx(math.hypot(2.5, 2.4), rel=0.2)


@pytest.mark.parametrize(
    ("prediction", "truth", "spacing", "message"),
    [
        (EMPTY, SOME[:3], None, r"prediction \(4, 5\), truth \(3, 5\): expected equal shapes"),
        (EMPTY[0], SOME[0], None, r"expected equal shapes of two or three axes"),
        (EMPTY.astype(np.uint8), SOME, None, r"masks are uint8 and bool .* compare labels"),
        (EMPTY, SOME, (1.0,), r"spacing is \(1\.0,\), expected one positive number"),
        (EMPTY, SOME, (1.0, 0.0), r"spacing is \(1\.0, 0\.0\)"),
        (EMPTY, SOME, (1.0, math.nan), r"spacing is \(1\.0, nan\)"),
    ],
)
def test_masks_that_cannot_be_compared_are_an_error(prediction, truth, spacing, message):
    with pytest.raises(ValueError, match=message):
        surface_distances(prediction, truth, spacing)


def test_options_out_of_range_are_an_error():
    got = surface_distances(EMPTY, SOME)
    with pytest.raises(ValueError, match="percentile is 120"):
        hausdorff_distance(got, 120)
    with pytest.raises(ValueError, match="tolerance is -1"):
        surface_dice(got, -1)
    with pytest.raises(ValueError, match="empty is 'skip', expected one of one, zero, nan"):
        surface_dice(got, 1, "skip")
    with pytest.raises(ValueError, match="missing is 'inf', expected one of diagonal, nan"):
        average_surface_distance(got, missing="inf")
    with pytest.raises(ValueError, match="expected one: arrays of one shape"):
        pooled([got, surface_distances(EMPTY_FRAME, EMPTY_FRAME)])
    with pytest.raises(ValueError, match=r"diagonals are \[\]"):
        pooled([])

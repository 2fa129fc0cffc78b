"""Scores against sets of pixels and MONAI, and what must not change them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics.meandice import compute_dice
from scipy import stats

from medseg_reg.metrics import (
    bootstrap_interval,
    confusion_counts,
    dice,
    empty_cases,
    interval,
    iou,
    overlap,
)
from tests.reference import metrics as reference

POLICIES = {"one": 1.0, "zero": 0.0, "nan": math.nan}


def labels(n_classes, shape, seed=0, dtype=torch.int64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, n_classes, shape, generator=generator).to(dtype)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-15, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
@pytest.mark.parametrize("shape", [(3, 7), (3, 6, 7), (2, 3, 4, 5)])
@pytest.mark.parametrize("n_classes", [2, 4])
def test_counts_and_scores_equal_those_of_pixel_sets(n_classes, shape, dtype):
    prediction, target = labels(n_classes, shape, 1, dtype), labels(n_classes, shape, 2, dtype)
    prediction[0] = target[0] = 0
    counts = confusion_counts(prediction, target, n_classes)
    assert counts.shape == (shape[0], n_classes, 3)
    assert counts.dtype == torch.int64
    for b in range(shape[0]):
        pair = prediction[b].numpy(), target[b].numpy()
        for c in range(n_classes):
            assert tuple(counts[b, c].tolist()) == reference.counts(*pair, c)
    for policy, value in POLICIES.items():
        for score, formula in ((dice, reference.dice), (iou, reference.iou)):
            got = score(counts, policy)
            assert got.dtype == torch.float64
            expected = [
                [formula(p.numpy(), t.numpy(), c, value) for c in range(n_classes)]
                for p, t in zip(prediction, target, strict=True)
            ]
            close(got, torch.tensor(expected, dtype=torch.float64))


def test_types_may_be_mixed_and_boolean():
    prediction, target = labels(2, (2, 5, 5), 1), labels(2, (2, 5, 5), 2)
    expected = confusion_counts(prediction, target, 2)
    assert torch.equal(confusion_counts(prediction.bool(), target.to(torch.uint8), 2), expected)
    assert torch.equal(confusion_counts(prediction.to(torch.uint8), target.bool(), 2), expected)


@pytest.mark.parametrize("chunk", [1, 7, 20, 45, 1000])
def test_counts_do_not_depend_on_the_chunk_size(monkeypatch, chunk):
    prediction, target = labels(3, (5, 4, 5), 1), labels(3, (5, 4, 5), 2)
    expected = confusion_counts(prediction, target, 3)
    monkeypatch.setattr(overlap, "_CHUNK", chunk)
    assert torch.equal(confusion_counts(prediction, target, 3), expected)


def test_the_inputs_are_not_changed():
    prediction, target = labels(3, (2, 4, 5), 1), labels(3, (2, 4, 5), 2)
    copies = prediction.clone(), target.clone()
    confusion_counts(prediction, target, 3)
    assert torch.equal(prediction, copies[0])
    assert torch.equal(target, copies[1])


def test_views_are_read_in_their_own_order():
    prediction, target = labels(3, (4, 5, 6), 1), labels(3, (4, 5, 6), 2)
    counts = confusion_counts(prediction.transpose(1, 2), target.transpose(1, 2), 3)
    assert torch.equal(counts, confusion_counts(prediction, target, 3))


def test_no_samples_and_no_voxels_give_counts_of_zero():
    none = torch.zeros(0, 4, 4, dtype=torch.uint8)
    assert confusion_counts(none, none, 2).shape == (0, 2, 3)
    hollow = torch.zeros(2, 0, 4, dtype=torch.uint8)
    assert torch.equal(confusion_counts(hollow, hollow, 2), torch.zeros(2, 2, 3).long())


def test_false_positives_on_an_empty_truth_score_zero_under_every_policy():
    target = torch.zeros(1, 4, 4, dtype=torch.uint8)
    prediction = target.clone()
    prediction[0, 1, 1] = 1
    counts = confusion_counts(prediction, target, 2)
    for policy in POLICIES:
        assert dice(counts, policy)[0, 1] == 0
        assert iou(counts, policy)[0, 1] == 0
    assert empty_cases(counts).tolist() == [0, 0]


def test_the_policy_decides_where_truth_and_prediction_are_both_empty():
    empty = torch.zeros(3, 4, 4, dtype=torch.uint8)
    counts = confusion_counts(empty, empty, 2)
    for policy, value in POLICIES.items():
        close(dice(counts, policy)[:, 1], torch.full((3,), value).double())
        close(iou(counts, policy)[:, 1], torch.full((3,), value).double())
    assert empty_cases(counts).tolist() == [0, 3]
    assert empty_cases(counts.sum(dim=0)).tolist() == [0, 1]


def one_hot(target, n_classes):
    return torch.nn.functional.one_hot(target, n_classes).movedim(-1, 1)


def test_dice_equals_monai_where_the_definitions_agree():
    prediction, target = labels(3, (6, 5, 5), 1), labels(3, (6, 5, 5), 2)
    prediction[0] = target[0] = 0
    target[1] = 0
    counts = confusion_counts(prediction, target, 3)
    theirs = compute_dice(one_hot(prediction, 3), one_hot(target, 3), ignore_empty=False)
    torch.testing.assert_close(dice(counts, "one").float(), theirs.float())


def test_monai_drops_the_false_positives_on_empty_truths_that_we_score_zero():
    prediction, target = labels(2, (2, 5, 5), 1), torch.zeros(2, 5, 5).long()
    prediction[1] = 0
    ours = dice(confusion_counts(prediction, target, 2), "nan")[:, 1]
    theirs = compute_dice(one_hot(prediction, 2), one_hot(target, 2))[:, 1]
    assert theirs.isnan().all()
    assert ours[0] == 0
    assert ours[1].isnan()


def test_flipping_prediction_and_truth_leaves_the_scores():
    prediction, target = labels(3, (2, 4, 5, 6), 1), labels(3, (2, 4, 5, 6), 2)
    expected = confusion_counts(prediction, target, 3)
    for axis in (1, 2, 3):
        assert torch.equal(confusion_counts(prediction.flip(axis), target.flip(axis), 3), expected)


def test_summed_slice_counts_give_the_volume_score_in_any_order():
    prediction, target = labels(3, (9, 6, 7), 1), labels(3, (9, 6, 7), 2)
    volume = confusion_counts(prediction[None], target[None], 3)[0]
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    slices = confusion_counts(prediction[order], target[order], 3)
    assert torch.equal(slices.sum(dim=0), volume)
    assert not torch.equal(dice(slices).mean(dim=0), dice(volume))


def test_swapping_prediction_and_truth_swaps_the_errors_and_keeps_the_scores():
    prediction, target = labels(3, (2, 6, 7), 1), labels(3, (2, 6, 7), 2)
    forth = confusion_counts(prediction, target, 3)
    back = confusion_counts(target, prediction, 3)
    assert torch.equal(forth[..., [0, 2, 1]], back)
    assert torch.equal(dice(forth), dice(back))


@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(
    n_classes=st.integers(2, 5),
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    seed=st.integers(0, 1000),
)
def test_scores_lie_in_range_and_iou_follows_from_dice(n_classes, shape, seed):
    prediction, target = labels(n_classes, shape, seed), labels(n_classes, shape, seed + 1)
    counts = confusion_counts(prediction, target, n_classes)
    voxels = math.prod(shape[1:])
    assert (counts >= 0).all()
    assert (counts[..., [0, 2]].sum(dim=(1, 2)) == voxels).all()
    assert (counts[..., [0, 1]].sum(dim=(1, 2)) == voxels).all()
    d, j = dice(counts), iou(counts)
    assert ((d >= 0) & (d <= 1)).all()
    torch.testing.assert_close(j, d / (2 - d), rtol=1e-12, atol=0)
    assert torch.equal(dice(confusion_counts(target, target, n_classes)), torch.ones_like(d))


@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        (torch.zeros(1, 3), torch.zeros(1, 3).long(), r"prediction is torch\.float32 .*argmax"),
        (torch.zeros(1, 3).long(), torch.zeros(1, 3), r"target is torch\.float32"),
        (torch.zeros(1, 3).long(), torch.zeros(1, 4).long(), r"\(1, 3\), target \(1, 4\)"),
        (torch.zeros(3).long(), torch.zeros(3).long(), r"expected equal shapes \(B, \*spatial\)"),
        (
            torch.tensor([[0, 255]]),
            torch.tensor([[-1, 1]]),
            r"prediction spans 0\.\.255 and target -1\.\.1 \(prediction \(1, 2\), target \(1, 2",
        ),
    ],
)
def test_labels_that_cannot_be_compared_are_an_error(prediction, target, message):
    with pytest.raises(ValueError, match=message) as caught:
        confusion_counts(prediction, target, 2)
    assert "\n" not in str(caught.value)


def test_one_class_and_unknown_policies_and_scores_for_counts_are_errors():
    some = torch.zeros(1, 3).long()
    with pytest.raises(ValueError, match="n_classes is 1, expected at least 2"):
        confusion_counts(some, some, 1)
    counts = confusion_counts(some, some, 2)
    with pytest.raises(ValueError, match="empty is 'ignore', expected one of one, zero, nan"):
        dice(counts, "ignore")
    with pytest.raises(ValueError, match=r"counts are torch\.float64 of shape \(1, 2, 3\)"):
        iou(counts.double())
    with pytest.raises(ValueError, match=r"of shape \(1, 2\)"):
        empty_cases(counts[..., 0])


def test_the_interval_is_that_of_scipy_and_repeats():
    values = np.random.default_rng(1).beta(8, 2, size=12)
    got = bootstrap_interval(values, resamples=2000, seed=5)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=2000, rng=np.random.default_rng(5)
    ).confidence_interval
    assert (got.low, got.high) == (expected.low, expected.high)
    assert got.mean == values.mean()
    assert (got.n, got.left_out, got.method) == (12, 0, "bca")
    assert bootstrap_interval(values, resamples=2000, seed=5) == got
    assert bootstrap_interval(values, resamples=2000, seed=6) != got
    assert bootstrap_interval(torch.from_numpy(values), resamples=2000, seed=5) == got
    assert bootstrap_interval(values.tolist(), resamples=2000, seed=5) == got


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    intervals = [
        bootstrap_interval(generator.normal(0.8, 0.1, 30), resamples=500) for _ in range(150)
    ]
    covered = np.mean([interval.low <= 0.8 <= interval.high for interval in intervals])
    assert 0.88 <= covered <= 0.99


def test_more_confidence_gives_a_wider_interval():
    values = [0.6, 0.7, 0.75, 0.8, 0.9, 0.95]
    narrow, wide = (bootstrap_interval(values, c, resamples=2000) for c in (0.8, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_nan_is_left_out_and_counted():
    values = [0.6, math.nan, 0.7, 0.8, math.nan, 0.9]
    got = bootstrap_interval(values, resamples=500)
    without = bootstrap_interval([v for v in values if v == v], resamples=500)
    assert got == without._replace(left_out=2)


@pytest.mark.parametrize("values", [[], [0.5], [0.5, math.nan], [0.4, 0.6], [math.nan]])
def test_fewer_than_three_values_have_no_interval(values):
    got = bootstrap_interval(values)
    used = [v for v in values if v == v]
    assert math.isnan(got.low)
    assert math.isnan(got.high)
    assert (got.n, got.left_out, got.method) == (len(used), len(values) - len(used), "none")
    assert got.mean == pytest.approx(np.mean(used) if used else math.nan, nan_ok=True)


def test_equal_values_give_one_point_and_say_so():
    got = bootstrap_interval([0.9, 0.9, 0.9, 0.9])
    assert (got.mean, got.low, got.high, got.method) == (0.9, 0.9, 0.9, "constant")


@pytest.mark.parametrize(
    "values", [[0.0, 0.0, 1.0], [1.0] * 30 + [0.0], [0.3, 0.3, 0.1 + 0.2], [1e-300, 0.0, 0.0]]
)
def test_nearly_equal_values_still_give_a_finite_interval(values):
    got = bootstrap_interval(values, resamples=500)
    assert got.method in ("bca", "percentile")
    assert min(values) <= got.low <= got.high <= max(values)


def test_an_undefined_bca_falls_back_to_the_percentile_interval(monkeypatch):
    asked = []

    def bootstrap(scores, method, *arguments):
        asked.append(method)
        return (math.nan, math.nan) if method == "bca" else (0.1, 0.3)

    monkeypatch.setattr(interval, "_bootstrap", bootstrap)
    got = bootstrap_interval([0.1, 0.2, 0.3])
    assert asked == ["bca", "percentile"]
    assert (got.low, got.high, got.method) == (0.1, 0.3, "percentile")


def test_the_global_generators_stay_untouched():
    np.random.seed(3)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    bootstrap_interval([0.1, 0.5, 0.9], resamples=100)
    assert np.array_equal(np.random.get_state()[1], before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([[0.1, 0.2]], {}, r"shape \(1, 2\)"),
        ([0.1, math.inf], {}, "1 infinities"),
        ([0.1, 0.2], {"confidence": 95}, "confidence is 95"),
        ([0.1, 0.2], {"resamples": 0}, "resamples is 0"),
    ],
)
def test_values_and_options_out_of_range_are_an_error(values, options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(values, **options)

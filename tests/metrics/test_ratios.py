"""Precision, recall and difference of volumes from counts, and ignored voxels."""

from __future__ import annotations

import math

import pytest
import torch
from torchmetrics.functional.classification import multiclass_precision, multiclass_recall

from medseg_reg.metrics import (
    confusion_counts,
    dice,
    iou,
    precision,
    recall,
    volume_difference,
)
from tests.reference import metrics as reference

POLICIES = {"one": 1.0, "zero": 0.0, "nan": math.nan}


def labels(n_classes, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, n_classes, shape, generator=generator)


def close(got, expected):
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-15, equal_nan=True)


@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 4), (2, 3, 4, 2)])
@pytest.mark.parametrize("n_classes", [2, 4])
def test_ratios_equal_those_of_pixel_sets(n_classes, shape):
    prediction, target = labels(n_classes, shape, 1), labels(n_classes, shape, 2)
    prediction[0] = target[0] = 0
    counts = confusion_counts(prediction, target, n_classes)
    pairs = [(p.numpy(), t.numpy()) for p, t in zip(prediction, target, strict=True)]
    for policy, value in POLICIES.items():
        for score in (precision, recall):
            formula = getattr(reference, score.__name__)
            close(score(counts, policy), [[formula(*pair, c, value) for c in range(n_classes)]
                                          for pair in pairs])  # fmt: skip
    close(
        volume_difference(counts, "nan"),
        [[reference.volume_difference(*pair, c) for c in range(n_classes)] for pair in pairs],
    )


def test_torchmetrics_gives_the_same():
    prediction, target = labels(3, (1, 20, 20), 1), labels(3, (1, 20, 20), 2)
    counts = confusion_counts(prediction, target, 3)[0]
    for ours, theirs in ((precision, multiclass_precision), (recall, multiclass_recall)):
        expected = theirs(prediction, target, num_classes=3, average=None)
        torch.testing.assert_close(ours(counts).float(), expected)


def test_where_one_of_the_two_is_empty_every_overlap_is_zero_under_every_policy():
    invented, missed = torch.tensor([[0, 7, 0]]), torch.tensor([[0, 0, 7]])
    for policy in POLICIES:
        for score in (dice, iou, precision, recall):
            assert score(invented, policy) == score(missed, policy) == 0


def test_where_both_are_empty_the_policy_decides():
    nothing = torch.zeros(1, 3, dtype=torch.int64)
    for policy, value in POLICIES.items():
        for score in (dice, iou, precision, recall):
            close(score(nothing, policy), [value])
    close(volume_difference(nothing, "one"), [0.0])
    assert volume_difference(nothing, "zero").isnan()
    assert volume_difference(nothing, "nan").isnan()


def test_a_volume_of_nothing_has_no_relative_difference():
    for policy in POLICIES:
        assert volume_difference(torch.tensor([[0, 3, 0]]), policy).isnan()
    close(volume_difference(torch.tensor([[0, 0, 4], [2, 6, 2], [3, 0, 0]])), [-1.0, 1.0, 0.0])


def test_dice_is_the_harmonic_mean_of_precision_and_recall():
    counts = confusion_counts(labels(3, (4, 99), 1), labels(3, (4, 99), 2), 3)
    p, r = precision(counts), recall(counts)
    torch.testing.assert_close(dice(counts), 2 * p * r / (p + r))


@pytest.mark.parametrize("ignore", [255, -1, 1])
def test_ignored_voxels_are_not_counted(ignore):
    prediction, target = labels(3, (2, 8, 9), 1), labels(3, (2, 8, 9), 2)
    keep = torch.zeros(2, 8, 9, dtype=torch.bool)
    keep[:, 2:7, 3:] = True
    marked = target.masked_fill(~keep, ignore)
    kept = [
        confusion_counts(p[t != ignore][None], t[t != ignore][None], 3)[0]
        for p, t in zip(prediction, marked, strict=True)
    ]
    assert torch.equal(confusion_counts(prediction, marked, 3, ignore), torch.stack(kept))


def test_ignored_labels_may_be_bytes_and_others_out_of_range_stay_an_error():
    target = torch.tensor([[0, 1, 255]], dtype=torch.uint8)
    counts = confusion_counts(torch.tensor([[0, 1, 1]]), target, 2, ignore=255)
    assert counts[0, 1].tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match=r"target 0\.\.3"):
        confusion_counts(torch.tensor([[0, 1, 1]]), torch.tensor([[0, 3, 255]]), 2, ignore=255)
    with pytest.raises(ValueError, match=r"prediction spans 0\.\.255"):
        confusion_counts(target, target, 2, ignore=255)

"""Calibration errors against sums over pixels, torchmetrics, and sums in any order."""

from __future__ import annotations

import math

import pytest
import torch
from torchmetrics.functional.classification import binary_calibration_error

from medseg_reg.metrics import calibration, calibration_counts, calibration_error
from tests.reference import metrics as reference


def example(classes=3, shape=(2, 6, 7), seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(shape[0], classes, *shape[1:], generator=generator)
    return logits.softmax(1), torch.randint(0, classes, shape, generator=generator)


@pytest.mark.parametrize("bins", [1, 10, 15])
@pytest.mark.parametrize("shape", [(2, 6, 7), (1, 3, 4, 5), (3, 9)])
@pytest.mark.parametrize("classes", [2, 4])
def test_bins_and_error_equal_those_of_a_loop_over_pixels(classes, shape, bins):
    p, target = example(classes, shape)
    counts = calibration_counts(p, target, bins)
    assert counts.shape == (shape[0], classes, bins, 3)
    assert counts.dtype == torch.int64
    for c in range(classes):
        for b in range(shape[0]):
            table, error = reference.calibration(p[b, c].numpy(), target[b].numpy(), c, bins)
            assert counts[b, c, :, :2].tolist() == [row[:2] for row in table]
            sums = (counts[b, c, :, 2] * calibration.UNIT).tolist()
            assert sums == pytest.approx([row[2] for row in table], abs=1e-5)
            assert calibration_error(counts)[b, c].item() == pytest.approx(error, abs=1e-6)
        _, error = reference.calibration(p[:, c].numpy(), target.numpy(), c, bins)
        assert calibration_error(counts.sum(dim=0))[c].item() == pytest.approx(error, abs=1e-6)


@pytest.mark.parametrize(("kind", "norm"), [("expected", "l1"), ("maximum", "max")])
def test_torchmetrics_gives_the_same_for_each_class(kind, norm):
    p, target = example(3, (2, 30, 31))
    got = calibration_error(calibration_counts(p, target, 15).sum(dim=0), kind)
    for c in range(3):
        theirs = binary_calibration_error(p[:, c], (target == c).int(), n_bins=15, norm=norm)
        assert got[c].item() == pytest.approx(theirs.item(), abs=1e-5)


def test_the_average_gives_every_filled_bin_the_same_weight():
    p = torch.tensor([[[0.1] * 9 + [0.9]]])
    p = torch.cat([1 - p, p], dim=1)
    counts = calibration_counts(p, torch.zeros(1, 10).long(), bins=10)
    expected, average, maximum = (
        calibration_error(counts, kind)[0, 1].item() for kind in ("expected", "average", "maximum")
    )
    assert expected == pytest.approx(0.9 * 0.1 + 0.1 * 0.9, abs=1e-6)
    assert average == pytest.approx((0.1 + 0.9) / 2, abs=1e-6)
    assert maximum == pytest.approx(0.9, abs=1e-6)


def test_a_bound_belongs_to_the_bin_above_and_one_to_the_last():
    p = torch.tensor([[[0.0, 0.25, 0.5, 0.75, 1.0]], [[0.2499999, 0.4999999, 0.7499999, 1, 1]]])
    counts = calibration_counts(p, torch.zeros(2, 5).long(), bins=4)
    assert counts[0, 0, :, 0].tolist() == [1, 1, 1, 2]
    assert counts[1, 0, :, 0].tolist() == [1, 1, 1, 2]
    # The float32 nearest to 0.7 is below it, but ten times it is rounded to 7.
    below = torch.tensor([[[0.7]]])
    assert below.double() < 0.7
    assert calibration_counts(below, torch.zeros(1, 1).long(), 10)[0, 0, :, 0].argmax() == 6


def test_a_calibrated_network_has_no_error_and_an_overconfident_one_has():
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(1, 1, 200_000, generator=generator)
    target = (torch.rand(1, 200_000, generator=generator) < p[:, 0]).long()
    both = torch.cat([1 - p, p], dim=1)
    sharp = torch.cat([1 - (p > 0.5).float(), (p > 0.5).float()], dim=1)
    assert calibration_error(calibration_counts(both, target)).max() < 0.01
    assert calibration_error(calibration_counts(sharp, target)).min() > 0.2


@pytest.mark.parametrize("chunk", [1, 5, 42, 1000])
def test_sums_do_not_depend_on_chunks_or_the_order_of_slices(monkeypatch, chunk):
    p, target = example(3, (5, 6, 7))
    expected = calibration_counts(p, target).sum(dim=0)
    monkeypatch.setattr(calibration, "_CHUNK", chunk)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(calibration_counts(p[order], target[order]).sum(dim=0), expected)
    joined = p.movedim(1, 0).reshape(1, 3, -1), target.reshape(1, -1)
    assert torch.equal(calibration_counts(*joined)[0], expected)


def test_ignored_pixels_are_not_counted():
    p, target = example(3, (1, 8, 9))
    marked = target.clone()
    marked[:, :, 5:] = 255
    got = calibration_counts(p, marked.to(torch.uint8), ignore=255)
    assert torch.equal(got, calibration_counts(p[..., :5], target[..., :5]))


def test_no_pixel_has_no_error():
    p, target = example(2, (1, 3, 3))
    counts = calibration_counts(p, torch.full_like(target, 255), ignore=255)
    for kind in ("expected", "average", "maximum"):
        assert calibration_error(counts, kind).isnan().all()


@pytest.mark.parametrize(
    ("p", "target", "bins", "message"),
    [
        (torch.randn(1, 2, 4, 4) * 9, torch.zeros(1, 4, 4).long(), 15, "apply a softmax first"),
        (torch.full((1, 2, 4), math.nan), torch.zeros(1, 4).long(), 15, "expected 0..1"),
        (torch.ones(1, 2, 4), torch.zeros(1, 5).long(), 15, r"\(1, 2, 4\), target \(1, 5\)"),
        (torch.ones(1, 2, 4), torch.zeros(1, 4), 15, "and integers"),
        (torch.ones(1, 2, 4), torch.zeros(1, 4).long(), 0, "bins is 0"),
    ],
)
def test_inputs_that_are_no_probabilities_are_an_error(p, target, bins, message):
    with pytest.raises(ValueError, match=message):
        calibration_counts(p, target, bins)


def test_counts_that_are_none_are_an_error():
    with pytest.raises(ValueError, match=r"counts are torch\.float32 of shape \(2, 15, 3\)"):
        calibration_error(torch.zeros(2, 15, 3))
    with pytest.raises(ValueError, match="kind is 'mean', expected one of expected, average"):
        calibration_error(torch.zeros(2, 15, 3).long(), "mean")

"""How sure a slice is, and the threshold that keeps a budget."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medseg_reg.errors import MedsegError
from medseg_reg.inference.confidence import confidence, threshold_for


def by_hand(p: np.ndarray, width: int) -> float:
    """Of one slice (K, H, W), pixel by pixel."""
    labels, best, seen = p.argmax(0), p.max(0).astype(float), p.sum(0) > 0
    rows, columns = labels.shape
    band = []
    for i in range(rows):
        for j in range(columns):
            around = labels[max(0, i - width) : i + width + 1, max(0, j - width) : j + width + 1]
            if seen[i, j] and (around != labels[i, j]).any():
                band.append(best[i, j])
    return float(np.mean(band)) if band else float(best[seen].min())


def some_probabilities(kind: str, classes: int) -> torch.Tensor:
    torch.manual_seed(0)
    logits = torch.randn(3, classes, 12, 9)
    if kind == "coarse":
        # Large regions, so that most pixels are of no boundary.
        logits = torch.nn.functional.interpolate(logits[:, :, :3, :2], (12, 9), mode="bilinear") * 5
    if kind == "one class":
        logits[:, 0] += 9
    p = torch.softmax(logits, 1)
    if kind == "cropped":
        p[:, :, :2] = p[:, :, :, 7:] = 0
    return p


@pytest.mark.parametrize(("classes", "band"), [(2, 2), (4, 1), (2, 13)])
@pytest.mark.parametrize("kind", ["noise", "coarse", "one class", "cropped"])
def test_it_is_the_mean_over_the_boundary_or_the_least_sure_pixel(kind, classes, band):
    p = some_probabilities(kind, classes)
    expected = [by_hand(one, band) for one in p.numpy()]
    np.testing.assert_allclose(confidence(p, band), expected, rtol=1e-6)
    assert all(1 / classes <= one <= 1 for one in expected)


def test_pixels_far_from_any_boundary_do_not_count():
    p = some_probabilities("noise", 2)
    p[:, 0], p[:, 1] = 0.8, 0.2
    p[:, :, :3] = p[:, :, :3].flip(1)
    before = confidence(p)
    p[:, 0, 8:], p[:, 1, 8:] = 0.999, 0.001
    assert torch.equal(confidence(p), before)


def test_a_slice_that_nothing_is_known_of_is_not_sure():
    p = some_probabilities("noise", 2)
    p[0] = 0
    p[1, :, 4, 4] = torch.nan
    found = confidence(p)
    assert found[:2].tolist() == [0, 0]
    assert found[2] > 0.5


def spent(threshold, confidences, first, fine):
    return sum(first) + sum(f for c, f in zip(confidences, fine, strict=True) if c <= threshold)


def test_it_is_the_highest_threshold_that_keeps_the_budget():
    rng = np.random.default_rng(0)
    for _ in range(40):
        # Few different values, so that some are equal.
        confidences = rng.integers(50, 60, 12) / 60
        first, fine = rng.integers(1, 4, 12), rng.integers(5, 40, 12)
        least = first.sum() / fine.sum()
        for budget in (least, *rng.uniform(least, least + 1, 4), least + 1):
            found = threshold_for(confidences, first, fine, budget)
            room = budget * fine.sum() + 1e-6
            allowed = [
                t for t in (0, *confidences, 1) if spent(t, confidences, first, fine) <= room
            ]
            assert spent(found, confidences, first, fine) == max(
                spent(t, confidences, first, fine) for t in allowed
            )
            assert found == 0 or found in confidences or found == 1


def test_the_least_budget_leaves_all_to_the_first_network_and_the_most_to_both():
    values = ([0.7, 0.9, 0.8], [1, 1, 1], [3, 3, 3])
    assert threshold_for(*values, 1 / 3) == 0
    assert threshold_for(*values, 4 / 3) == 1
    assert threshold_for(*values, 1) == 0.8


def test_slices_that_are_equally_sure_go_on_together():
    assert threshold_for([0.6, 0.6, 0.9], [0, 0, 0], [1, 1, 1], 0.5) == 0
    assert threshold_for([0.6, 0.6, 0.9], [0, 0, 0], [1, 1, 1], 0.7) == 0.6


@pytest.mark.parametrize("budget", [0.2, float("nan")])
def test_less_than_the_first_network_takes_is_refused(budget):
    with pytest.raises(MedsegError, match=r"the first network alone costs 0.2500 of the finer one"):
        threshold_for([0.5, 0.6], [1, 1], [4, 4], budget)

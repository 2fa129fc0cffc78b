"""AUROC, average precision and thresholds, against counting and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest

from medseg_reg.metrics import auroc, average_precision, sensitivity_specificity, threshold_at


def drawn(seed: int, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 2, 30).astype(float)
    scores = rng.normal(truth, 1.0)
    return (scores.round(0) if ties else scores), truth


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_they_are_those_of_scikit_learn_with_equal_scores_too(seed: int, ties: bool) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    scores, truth = drawn(seed, ties)
    assert auroc(scores, truth) == pytest.approx(metrics.roc_auc_score(truth, scores))
    expected = metrics.average_precision_score(truth, scores)
    assert average_precision(scores, truth) == pytest.approx(expected)


def test_the_area_is_the_share_of_pairs_in_order() -> None:
    scores, truth = drawn(4, True)
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[truth == 1] for b in scores[truth == 0]]
    assert auroc(scores, truth) == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("wanted", [0.05, 0.3, 0.5, 0.95, 1.0])
def test_the_threshold_is_the_highest_that_finds_enough(wanted: float) -> None:
    scores, truth = drawn(5, False)
    found = threshold_at(scores, truth, wanted)
    assert sensitivity_specificity(scores, truth, found)[0] >= wanted
    higher = scores[scores > found]
    assert all(sensitivity_specificity(scores, truth, one)[0] < wanted for one in higher)


def test_what_is_not_known_does_not_count() -> None:
    scores, truth = drawn(6, True)
    more = np.append(scores, [5.0, -5.0]), np.append(truth, [math.nan, math.nan])
    for measure in (auroc, average_precision):
        assert measure(*more) == measure(scores, truth)
    assert threshold_at(*more, 0.9) == threshold_at(scores, truth, 0.9)
    assert sensitivity_specificity(*more, 0.5) == sensitivity_specificity(scores, truth, 0.5)


def test_one_kind_alone_has_no_scores() -> None:
    scores, ones, zeros = np.array([0.2, 0.7]), np.ones(2), np.zeros(2)
    assert math.isnan(auroc(scores, ones))
    assert math.isnan(average_precision(scores, zeros))
    assert math.isnan(threshold_at(scores, zeros, 0.9))
    assert sensitivity_specificity(scores, ones, 0.5)[0] == 0.5
    assert math.isnan(sensitivity_specificity(scores, ones, 0.5)[1])
    assert all(map(math.isnan, sensitivity_specificity(scores, ones, math.nan)))


@pytest.mark.parametrize(
    ("truth", "said"), [([0, 1, 2], "other values than 0, 1 and NaN"), ([0, 1], "truth")]
)
def test_wrong_values_are_told(truth: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        auroc(np.array([0.1, 0.2, 0.3]), np.array(truth))

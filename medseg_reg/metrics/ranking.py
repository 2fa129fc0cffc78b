"""How well scores order what has a property above what has it not, and a threshold for them.

Of every function `truth` is 1, 0, or NaN where it is not known; such entries do not count.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import stats

Values = npt.NDArray[np.floating]

# A share of so many positives that is a whole number may come out a little above it.
_ROUNDING = 1e-9


def auroc(scores: Values, truth: Values) -> float:
    r"""Return the area under the receiver operating characteristic; NaN with one kind alone.

    .. math:: \Pr(s_1 > s_0) + \tfrac{1}{2} \Pr(s_1 = s_0)

    over pairs of one that has the property and one that has it not (Hanley and McNeil, Radiology
    1982, doi 10.1148/radiology.143.1.7063747).

    >>> auroc(np.array([0.1, 0.4, 0.4, 0.9]), np.array([0, 0, 1, 1]))
    0.875
    """
    scores, truth = _known(scores, truth)
    positive = truth == 1
    ones, zeros = int(positive.sum()), int((~positive).sum())
    if not ones or not zeros:
        return math.nan
    ranks = stats.rankdata(scores)
    return float((ranks[positive].sum() - ones * (ones + 1) / 2) / (ones * zeros))


def average_precision(scores: Values, truth: Values) -> float:
    r"""Return the area under the curve of precision over recall; NaN without a positive.

    .. math:: \sum_n (R_n - R_{n-1}) P_n

    over the thresholds from the highest score down; equal scores are one threshold. By chance it is
    the share of the positives.

    >>> round(average_precision(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1])), 4)
    0.8333
    """
    scores, truth = _known(scores, truth)
    if not (truth == 1).any():
        return math.nan
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], np.cumsum(truth[order] == 1)
    ends = np.flatnonzero(np.append(np.diff(scores) != 0, True))
    precision, recall = hits[ends] / (ends + 1), hits[ends] / hits[-1]
    return float((np.diff(recall, prepend=0.0) * precision).sum())


def threshold_at(scores: Values, truth: Values, sensitivity: float) -> float:
    """Return the highest threshold at which a share of the positives reaches it; NaN without any.

    >>> threshold_at(np.array([0.1, 0.5, 0.7, 0.9]), np.array([0, 1, 1, 1]), 0.6)
    0.7
    """
    scores, truth = _known(scores, truth)
    positives = np.sort(scores[truth == 1])
    if not len(positives):
        return math.nan
    needed = max(1, math.ceil(sensitivity * len(positives) - _ROUNDING))
    return float(positives[-needed])


def sensitivity_specificity(scores: Values, truth: Values, threshold: float) -> tuple[float, float]:
    """Return the shares of positives at or above a threshold and of negatives below it.

    NaN where there are none, or no threshold.

    >>> sensitivity_specificity(np.array([0.1, 0.5, 0.7, 0.9]), np.array([0, 1, 0, 1]), 0.6)
    (0.5, 0.5)
    """
    scores, truth = _known(scores, truth)
    if math.isnan(threshold):
        return math.nan, math.nan
    found = scores >= threshold
    shares = [found[truth == 1], ~found[truth == 0]]
    first, second = (float(one.mean()) if len(one) else math.nan for one in shares)
    return first, second


def _known(scores: Values, truth: Values) -> tuple[Values, Values]:
    scores, truth = np.asarray(scores, float), np.asarray(truth, float)
    if scores.shape != truth.shape or scores.ndim != 1:
        raise ValueError(f"scores have the shape {scores.shape}, truth {truth.shape}")
    if not np.isin(truth[~np.isnan(truth)], (0, 1)).all():
        raise ValueError("truth holds other values than 0, 1 and NaN")
    known = ~np.isnan(truth)
    return scores[known], truth[known]

"""Tests and effect sizes of paired differences."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata, wilcoxon

Array = np.ndarray[Any, np.dtype[np.float64]]


def signed_rank_p(differences: Array) -> float:
    """Return the two-sided p of the Wilcoxon signed-rank test.

    The null hypothesis is that differences lie symmetrically around 0. Zeros are left out and the
    rest is ranked (Wilcoxon's own way); with up to 50 differences and no ties the distribution is
    exact. Differences that are all 0 have p = 1.

    Args:
        differences: one for each group; NaN are left out.

    Returns:
        p, NaN without a difference. With n differences it is at least 2^(1 - n): five patients can
        not give less than 0.0625.

    Paper:
        F. Wilcoxon, Individual Comparisons by Ranking Methods, Biometrics Bulletin 1(6), 1945, doi
        10.2307/3001968.

    Example:
        >>> signed_rank_p(np.array([0.1, 0.2, 0.3, 0.4, 0.5]))
        0.0625
    """
    found = differences[~np.isnan(differences)]
    if not found.size:
        return float("nan")
    if not found.any():
        return 1.0
    with (
        warnings.catch_warnings()
    ):  # of small samples with ties or zeros; the documentation says it
        warnings.simplefilter("ignore")
        return float(wilcoxon(found, zero_method="wilcox").pvalue)


def holm(p: Sequence[float]) -> Array:
    """Return p-values corrected for many comparisons by Holm's step-down method.

    With m hypotheses and sorted p: p'_(i) = max over j <= i of min(1, (m - j + 1) p_(j)). The
    chance of one false rejection or more is at most alpha, whatever the dependence. NaN stay NaN
    and are not counted.

    Paper:
        S. Holm, A Simple Sequentially Rejective Multiple Test Procedure, Scandinavian Journal of
        Statistics 6(2), 1979.

    Example:
        >>> holm([0.01, 0.04, 0.03]).round(3).tolist()
        [0.03, 0.06, 0.06]
    """
    values = np.asarray(p, dtype=np.float64)
    there = np.flatnonzero(~np.isnan(values))
    order = there[np.argsort(values[there], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    corrected = np.full(values.shape, np.nan)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(factors * values[order]))
    return corrected


def rank_biserial(differences: Array) -> float:
    """Return the matched-pairs rank-biserial correlation, an effect size in [-1, 1].

    r = (R+ - R-) / (R+ + R-), the ranks of absolute differences summed over positive and negative
    ones; zeros are left out. 1 means that every pair is better, 0 no tendency. 0 where all are 0.

    Paper:
        D. S. Kerby, The Simple Difference Formula, Comprehensive Psychology 3, 2014, doi
        10.2466/11.IT.3.1.

    Example:
        >>> rank_biserial(np.array([1.0, 2.0, -0.5]))
        0.6666666666666666
    """
    found = differences[~np.isnan(differences)]
    if not found.size:
        return float("nan")
    found = found[found != 0]
    if not found.size:
        return 0.0
    ranks = rankdata(np.abs(found))
    return float((ranks[found > 0].sum() - ranks[found < 0].sum()) / ranks.sum())


def better_pairs(differences: Array) -> Array:
    """Return 1 where a difference is positive, 1/2 where it is 0, 0 where it is negative.

    Their mean is the probability of improvement: that a method is better than another on a random
    patient with a random seed.

    Paper:
        R. Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice,
        NeurIPS 2021, arXiv 2108.13264; there between unpaired runs, here within pairs.

    Example:
        >>> better_pairs(np.array([0.2, 0.0, -0.1, np.nan]))
        array([1. , 0.5, 0. , nan])
    """
    better: Array = np.where(np.isnan(differences), np.nan, (np.sign(differences) + 1) / 2)
    return better

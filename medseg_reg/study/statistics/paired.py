"""Paired differences: the signed-rank test, its effect size, and the correction for many tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import stats  # type: ignore[import-untyped,unused-ignore]

Zeros = Literal["pratt", "wilcox", "zsplit"]

# Differences of scores that differ by less are ties: 0.9 - 0.8 is not 0.8 - 0.7 in binary.
_DECIMALS = 12
# Up to so many differences other than 0 the distribution of W is counted out.
_EXACT = 50


def signed_rank(differences: npt.ArrayLike, zeros: Zeros = "pratt") -> float:
    """Return the two-sided p of Wilcoxon's signed-rank test that differences lie around 0.

    The absolute differences are ranked; W is the sum of the ranks of the positive ones. Under the
    null each sign is a fair coin. p is exact up to 50 differences other than 0, with ties and
    beside any number of zeros; else by the normal approximation, corrected for ties.

    Zeros, by name: "pratt" ranks them and then leaves them out (default: zeros still push the
    others up, and count as no evidence); "wilcox" leaves them out before; "zsplit" gives half of
    their ranks to either side. If all differences are 0, p is 1.

    Sources: F. Wilcoxon, "Individual Comparisons by Ranking Methods", Biometrics Bulletin 1945,
    doi:10.2307/3001968; J. W. Pratt, JASA 1959, doi:10.1080/01621459.1959.10501526; the
    approximation is `scipy.stats.wilcoxon`.

    Args:
        differences: one number for each group; NaN is left out, numbers are rounded to 12
            decimals so that ties are ties.
        zeros: see above.

    Returns:
        p; NaN without any difference.

    >>> round(signed_rank([0.03, 0.01, 0.04, 0.02, 0.05]), 4)  # the least p of five
    0.0625
    >>> signed_rank([0, 0, 0])
    1.0
    """
    d = _finite(differences)
    if not len(d):
        return math.nan
    if not d.any():
        return 1.0
    if np.count_nonzero(d) <= _EXACT:
        return _exact_p(d[d != 0] if zeros == "wilcox" else d)
    method: Any = "asymptotic"  # scipy is typed for one of its names only
    return min(1.0, float(stats.wilcoxon(d, zero_method=zeros, method=method).pvalue))


def _exact_p(d: npt.NDArray[np.float64]) -> float:
    """Return p by the distribution of W over all signs, built up difference by difference."""
    # Twice the ranks, because tied ones have halves; a zero has no sign that could be turned.
    ranks = np.rint(2 * stats.rankdata(np.abs(d))).astype(int)[d != 0]
    chances = np.ones(1)
    for rank in ranks:
        chances = (np.pad(chances, (0, rank)) + np.pad(chances, (rank, 0))) / 2
    positive = int(ranks[d[d != 0] > 0].sum())
    tail = min(positive, int(ranks.sum()) - positive)
    return min(1.0, 2 * float(chances[: tail + 1].sum()))


def least_p(groups: int) -> float:
    """Return the least two-sided p that the signed-rank test can give: 2 of 2^n signs.

    Args:
        groups: n, those with a difference other than 0: zeros have no sign.

    >>> least_p(5), least_p(6)
    (0.0625, 0.03125)
    """
    return min(1.0, 2.0 ** (1 - groups))


def rank_biserial(differences: npt.ArrayLike) -> float:
    """Return the matched-pairs rank-biserial correlation: what the signed-rank test sees.

    r = (W+ - W-) / (sum of all ranks), from -1 (all differences negative) to 1. Zeros are ranked
    and count for neither side, so they pull it to 0, as ties do in the probability of improvement.

    Source: D. S. Kerby, "The Simple Difference Formula", Comprehensive Psychology 2014,
    doi:10.2466/11.IT.3.1, who leaves zeros out.

    Args:
        differences: as of `signed_rank`.

    Returns:
        r; NaN without any difference.

    >>> round(rank_biserial([0.03, 0.01, -0.02]), 3)  # ranks 3 + 1 against 2
    0.333
    """
    d = _finite(differences)
    if not len(d):
        return math.nan
    ranks = stats.rankdata(np.abs(d))
    return float((ranks * np.sign(d)).sum() / ranks.sum())


def holm(p: Sequence[float] | npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return p values corrected so that the chance of any false positive among them is bounded.

    Sorted, the i-th least of m is multiplied by m - i + 1; then none may be below one before it,
    nor above 1. NaN (nothing was tested) stays, and is not counted.

    Source: S. Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian
    Journal of Statistics 1979, https://www.jstor.org/stable/4615733.

    Args:
        p: of all tests of the family.

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    values = np.asarray(p, dtype=np.float64)
    result = np.full(values.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(values))
    order = tested[np.argsort(values[tested], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    result[order] = np.minimum(1.0, np.maximum.accumulate(values[order] * factors))
    return result


def _finite(differences: npt.ArrayLike) -> npt.NDArray[np.float64]:
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 1 or np.isinf(d).any():
        raise ValueError(f"differences of shape {d.shape}: expected one finite number for a group")
    # Minus zero is zero.
    return np.round(d[~np.isnan(d)], _DECIMALS) + 0.0

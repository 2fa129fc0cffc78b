"""Bootstrap intervals over cases."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats  # type: ignore[import-untyped,unused-ignore]
from torch import Tensor

# Values of resamples that are held at once: 32 MiB, so that thousands of cases fit as well.
_CHUNK = 1 << 22


class Interval(NamedTuple):
    """A mean over cases with its bootstrap interval.

    Attributes:
        mean: mean of the values used; NaN if there are none.
        low: lower bound, NaN where `method` is "none".
        high: upper bound, NaN where `method` is "none".
        n: number of values used.
        left_out: number of NaN values left out.
        method: "bca", "percentile" (BCa was not defined), "constant" (all values are equal,
            the interval is that one point) or "none" (fewer than three values).
    """

    mean: float
    low: float
    high: float
    n: int
    left_out: int
    method: Literal["bca", "percentile", "constant", "none"]


def bootstrap_interval(
    values: Sequence[float] | npt.NDArray[np.floating] | Tensor,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Return the mean over cases and its bootstrap interval (bias-corrected, accelerated).

    Give one value per independent unit, that is per patient or video: slices of one patient
    are not independent, and an interval over slices is far too narrow. NaN (the "nan" policy
    of `dice`) is left out and counted.

    The rule where BCa cannot speak: fewer than three values give no interval (two values
    resample to three different means, which says nothing at 95 %). Equal values give the one
    point, flagged "constant": no spread was seen, which is not certainty. Else, should BCa be
    undefined, the percentile interval, flagged. Under ten cases any bootstrap is optimistic.

    Source: B. Efron, "Better bootstrap confidence intervals", JASA 1987,
    doi:10.1080/01621459.1987.10478410, as in `scipy.stats.bootstrap`.

    Args:
        values: one score per case, one axis.
        confidence: coverage, between 0 and 1.
        resamples: number of resamples.
        seed: seed of an own generator; the global ones stay untouched.

    Raises:
        ValueError: `values` have several axes or hold infinities, or an argument is out of
            range.

    Example:
        >>> interval = bootstrap_interval([0.70, 0.82, 0.75, 0.90, 0.78, math.nan])
        >>> interval.n, interval.left_out, interval.method, round(interval.mean, 3)
        (5, 1, 'bca', 0.79)
        >>> interval.low < 0.79 < interval.high
        True
    """
    scores = _finite_or_nan(values)
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(
            f"confidence is {confidence} and resamples is {resamples}, "
            "expected 0 < confidence < 1 and resamples >= 1"
        )
    used = scores[~np.isnan(scores)]
    left_out = len(scores) - len(used)
    if len(used) < 3:
        mean = float(used.mean()) if len(used) else math.nan
        return Interval(mean, math.nan, math.nan, len(used), left_out, "none")
    if np.ptp(used) == 0:
        value = float(used[0])
        return Interval(value, value, value, len(used), left_out, "constant")
    methods: tuple[Literal["bca", "percentile"], ...] = ("bca", "percentile")
    for method in methods:
        low, high = _bootstrap(used, method, confidence, resamples, seed)
        if math.isfinite(low) and math.isfinite(high):
            break
    return Interval(float(used.mean()), low, high, len(used), left_out, method)


def _finite_or_nan(
    values: Sequence[float] | npt.NDArray[np.floating] | Tensor,
) -> npt.NDArray[np.float64]:
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    scores = np.asarray(values, dtype=np.float64)
    infinite = int(np.isinf(scores).sum())
    if scores.ndim != 1 or infinite:
        raise ValueError(
            f"values have shape {scores.shape} and {infinite} infinities, "
            "expected one finite score (or NaN) per case"
        )
    return scores


def _bootstrap(
    scores: npt.NDArray[np.float64], method: str, confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    # An undefined BCa is answered by the caller, with the percentile interval.
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        result = stats.bootstrap(
            (scores,),
            np.mean,
            n_resamples=resamples,
            batch=max(1, _CHUNK // len(scores)),
            confidence_level=confidence,
            method=method,
            rng=np.random.default_rng(seed),
        )
    interval = result.confidence_interval
    return float(interval.low), float(interval.high)

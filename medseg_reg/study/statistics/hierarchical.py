"""Intervals of a mean over groups and seeds at once, by a hierarchical bootstrap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats  # type: ignore[import-untyped,unused-ignore]

from medseg_reg.study.statistics.table import Array, nan_mean, require_fraction

# Numbers of resamples that are held at once: 32 MiB.
_CHUNK = 1 << 22

Method = Literal["stretched_percentile", "constant", "none"]


class Estimate(NamedTuple):
    """A mean over groups and seeds with its interval.

    Attributes:
        mean: mean over groups of the means over seeds; NaN without any value.
        low: lower bound, NaN where `method` is "none".
        high: upper bound, NaN where `method` is "none".
        groups: number of groups with a value.
        seeds: number of seeds with a value.
        left_out: number of (seed, group) pairs without a value, left out of the means.
        method: "stretched_percentile"; "constant" (all values are equal, the interval is one
            point: no spread was seen, which is not certainty); "none" (fewer than three groups).
    """

    mean: float
    low: float
    high: float
    groups: int
    seeds: int
    left_out: int
    method: Method


class Resamples:
    """How often each seed and each group is drawn, in each resample.

    The same draws serve all methods of a study, so that they can be compared resample by resample.

    Args:
        seeds: number of seeds.
        groups: number of groups.
        count: number of resamples.
        seed: of an own generator; the global ones stay untouched.

    Raises:
        ValueError: there is nothing to draw, or no resample.
    """

    def __init__(self, seeds: int, groups: int, count: int = 10_000, seed: int = 0) -> None:
        if min(seeds, groups, count) < 1:
            raise ValueError(f"{seeds} seeds, {groups} groups, {count} resamples: expected >= 1")
        rng = np.random.default_rng(seed)
        self.of_seeds: npt.NDArray[np.int64] = rng.multinomial(seeds, [1 / seeds] * seeds, count)
        self.of_groups: npt.NDArray[np.int64] = rng.multinomial(
            groups, [1 / groups] * groups, count
        )

    def means(self, values: Array) -> Array:
        """Return the mean of each resample of values (seeds, groups).

        NaN is left out: of a group's mean over the seeds drawn, then, where a group has nothing
        left, of the mean over groups. A resample with nothing left at all is NaN.

        >>> Resamples(1, 2, count=4).means(np.array([[1.0, 1.0]])).tolist()
        [1.0, 1.0, 1.0, 1.0]
        """
        known = ~np.isnan(values)
        filled, weights = np.where(known, values, 0.0), known.astype(float)
        found = np.empty(len(self.of_seeds))
        step = max(1, _CHUNK // values.shape[1])
        for start in range(0, len(found), step):
            some = slice(start, start + step)
            drawn = self.of_seeds[some].astype(float)
            if known.all():
                means, have = drawn @ filled / len(values), self.of_groups[some].astype(float)
            else:
                sums, counts = drawn @ filled, drawn @ weights
                means = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
                have = self.of_groups[some] * (counts > 0)
            total, count = (means * have).sum(axis=1), have.sum(axis=1)
            found[some] = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
        return found


def hierarchical_interval(
    values: Array,
    resamples: Resamples,
    confidence: float = 0.95,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Estimate:
    r"""Return the mean of scores over groups and seeds, with its bootstrap interval.

    Seeds and groups are drawn with replacement, each by themselves, and a resample is the mean of
    what is drawn of both. They are crossed and not nested: one trained network scores all groups,
    so a lucky seed lifts all of them together. Drawing seeds anew within each group would take
    that luck for noise that averages out, and be far too sure.

    The bounds are percentiles of the resamples, set off from the mean by a factor k. A plain
    percentile interval of n values is too narrow by :math:`\sqrt{(n - 1)/n}` and by normal in place
    of t quantiles; here

    .. math:: k^2 = \frac{t_\nu^2}{z^2} \cdot \frac{\max(v_g + v_s - v_e,\, v_g,\, v_s)}
        {v_g (G-1)/G + v_s (S-1)/S + v_e (G-1)(S-1)/(GS)}

    where v_g, v_s and v_e are the variances of the mean from groups, seeds and what is left (mean
    squares of the two-way layout over GS), the denominator is the variance of the resamples, and
    :math:`\nu` is Satterthwaite's. With one seed v_s and v_e are 0: nothing is known of seeds,
    and the interval is over groups alone.

    Sources: B. Efron, R. Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 8; A. B.
    Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 2007, doi:10.1214/07-AOAS122
    (crossed factors); T. Hesterberg, "What Teachers Should Know About the Bootstrap", The American
    Statistician 2015, doi:10.1080/00031305.2015.1089789 (why percentiles are too narrow, and by how
    much; there their levels are moved, but three seeds have no resample that far out, so here they
    are stretched, which is this package's); F. Satterthwaite, Biometrics Bulletin 1946,
    doi:10.2307/3002019.

    Args:
        values: (seeds, groups); NaN is left out, as `Resamples.means` says, and counted.
        resamples: for as many seeds and groups.
        confidence: coverage, between 0 and 1.
        bounds: what the scores cannot leave, nor the interval.

    Raises:
        ValueError: the shapes differ, values are infinite, or `confidence` is out of range.

    >>> values = np.array([[0.70, 0.82, 0.75, 0.90], [0.72, 0.80, 0.78, 0.93]])
    >>> found = hierarchical_interval(values, Resamples(2, 4))
    >>> found.method, found.groups, found.seeds, round(found.mean, 3)
    ('stretched_percentile', 4, 2, 0.8)
    >>> found.low < 0.8 < found.high
    True
    """
    return hierarchical_intervals(values, resamples, (confidence,), bounds)[0]


def hierarchical_intervals(
    values: Array,
    resamples: Resamples,
    levels: Sequence[float],
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> list[Estimate]:
    """Return the intervals of several levels of confidence from the same resamples, drawn once.

    Arguments and errors are those of `hierarchical_interval`.
    """
    for level in levels:
        require_fraction("confidence", level)
    wanted = (resamples.of_seeds.shape[1], resamples.of_groups.shape[1])
    if values.shape != wanted or np.isinf(values).any():
        raise ValueError(f"values have shape {values.shape}; expected {wanted}, and no infinity")
    known = ~np.isnan(values)
    groups, seeds = int(known.any(axis=0).sum()), int(known.any(axis=1).sum())
    mean = float(nan_mean(nan_mean(values, axis=0), axis=0))
    counts = (groups, seeds, int((~known).sum()))
    if groups < 3:
        return [Estimate(mean, math.nan, math.nan, *counts, "none") for _ in levels]
    if np.ptp(values[known]) <= 1e-12 * max(1.0, float(np.abs(values[known]).max())):
        return [Estimate(mean, mean, mean, *counts, "constant") for _ in levels]
    drawn, found = resamples.means(values), []
    for level in levels:
        low, high = np.nanquantile(drawn, ((1 - level) / 2, (1 + level) / 2))
        k = _stretch(values[np.ix_(known.any(axis=1), known.any(axis=0))], level)
        low, high = np.clip([mean + k * (low - mean), mean + k * (high - mean)], *bounds)
        found.append(Estimate(mean, float(low), float(high), *counts, "stretched_percentile"))
    return found


def variance_of_mean(values: Array) -> tuple[float, float, float]:
    """Return v_g, v_s, v_e of `hierarchical_interval`; each is NaN-free."""
    seeds, groups = values.shape
    by_group, by_seed = nan_mean(values, axis=0), nan_mean(values, axis=1)
    of_groups = float(np.var(by_group, ddof=1)) / groups if groups > 1 else 0.0
    if seeds < 2:
        return of_groups, 0.0, 0.0
    of_seeds = float(np.var(by_seed, ddof=1)) / seeds
    left = values - by_group - by_seed[:, None] + np.nanmean(values)
    known = int((~np.isnan(left)).sum())
    # Missing values take degrees of freedom.
    freedom = max(1, known - groups - seeds + 1)
    return of_groups, of_seeds, float(np.nansum(left**2)) / freedom / known


def degrees_of_freedom(parts: tuple[float, float, float], groups: int, seeds: int) -> float:
    """Return Satterthwaite's degrees of freedom of v_g + v_s - v_e."""
    of_groups, of_seeds, rest = parts
    total = max(of_groups + of_seeds - rest, of_groups, of_seeds)
    spread = of_groups**2 / (groups - 1)
    if seeds > 1:
        spread += of_seeds**2 / (seeds - 1) + rest**2 / ((groups - 1) * (seeds - 1))
    return max(1.0, total**2 / spread) if spread > 0 else float(groups - 1)


def _stretch(values: Array, confidence: float) -> float:
    """Return k of `hierarchical_interval`."""
    seeds, groups = values.shape
    of_groups, of_seeds, rest = parts = variance_of_mean(values)
    drawn = of_groups * (groups - 1) / groups + of_seeds * (seeds - 1) / seeds
    drawn += rest * (groups - 1) * (seeds - 1) / (groups * seeds)
    if drawn <= 0:
        return 1.0
    total = max(of_groups + of_seeds - rest, of_groups, of_seeds)
    level = (1 + confidence) / 2
    quantile = stats.t.ppf(level, degrees_of_freedom(parts, groups, seeds))
    return float(quantile / stats.norm.ppf(level) * math.sqrt(total / drawn))

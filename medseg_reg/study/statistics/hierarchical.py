"""Bootstrap over groups and seeds at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]

_AT_ONCE = 2000


class Estimate(NamedTuple):
    """A mean with its interval."""

    mean: float
    low: float
    high: float


def resampled_means(values: Array, resamples: int = 10_000, seed: int = 0) -> Array:
    """Return means over resampled groups and seeds.

    Groups (patients) are drawn with replacement, and so are seeds, independently of each other,
    because each seed was tested on the same patients. For weights w_g and w_s, the numbers of times
    that a group and a seed were drawn,

    mean = sum w_g w_s x_gs / sum w_g w_s

    over the scores that are there; those that are NaN are left out of both sums. Of n patients or
    seeds the spread comes out too small by about (n - 1) / n, so few of them give intervals that
    are too narrow.

    Args:
        values: (..., groups, seeds); leading axes (methods) are resampled together, in pairs.
        resamples: number of resamples.
        seed: of the resampling.

    Returns:
        (resamples, ...).

    Raises:
        ValueError: no groups or no seeds.

    Paper:
        A. B. Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1(2), 2007, doi
        10.1214/07-AOAS122.

    Example:
        >>> resampled_means(np.full((3, 2), 0.5), resamples=4)
        array([0.5, 0.5, 0.5, 0.5])
    """
    groups, seeds = values.shape[-2:]
    if not groups or not seeds:
        raise ValueError(f"{groups} groups and {seeds} seeds: at least one of each is needed")
    there = ~np.isnan(values)
    filled, counted = np.where(there, values, 0.0), there.astype(np.float64)
    generator = np.random.default_rng(seed)
    parts = []
    for start in range(0, resamples, _AT_ONCE):
        count = min(_AT_ONCE, resamples - start)
        by_group = generator.multinomial(groups, np.full(groups, 1 / groups), size=count) * 1.0
        by_seed = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=count) * 1.0
        total, number = (
            np.einsum("...gs,rg,rs->r...", x, by_group, by_seed, optimize=True)
            for x in (filled, counted)
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            parts.append(np.where(number > 0, total / number, np.nan))
    return np.concatenate(parts)


def interval(
    values: Array, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Estimate:
    """Return the mean of scores (groups, seeds) and its percentile interval over both.

    With fewer than about ten groups or ten seeds it is too narrow, with three seeds by far; one
    group or one seed contributes no spread at all. NaN where there is no score.

    Example:
        >>> interval(np.full((4, 3), 0.25))
        Estimate(mean=0.25, low=0.25, high=0.25)
    """
    if np.isnan(values).all():
        return Estimate(np.nan, np.nan, np.nan)
    means = resampled_means(values, resamples, seed)
    tail = 100 * (1 - confidence) / 2
    low, high = np.nanpercentile(means, [tail, 100 - tail])
    return Estimate(float(np.nanmean(values)), float(low), float(high))

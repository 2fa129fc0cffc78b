"""How many seeds a difference needs to be seen, and which difference the present ones can show."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.stats import nct, norm, t

Array = np.ndarray[Any, np.dtype[np.float64]]

MOST_SEEDS = 1000


class Components(NamedTuple):
    """Variances of paired differences: between groups, between seeds, and what is left."""

    group: float
    seed: float
    rest: float


def components(differences: Array) -> Components:
    """Return the variance components of differences (groups, seeds).

    The model is d_gs = mu + a_g + b_s + e_gs with random a, b, e; the components come from the mean
    squares of the two-way analysis of variance without repetition (negative ones are 0):

    var(e) = MS_rest, var(a) = (MS_group - MS_rest) / S, var(b) = (MS_seed - MS_rest) / G

    Args:
        differences: (groups, seeds), G and S at least 2.

    Raises:
        ValueError: fewer, or a missing one.
    """
    groups, seeds = differences.shape
    if groups < 2 or seeds < 2:
        raise ValueError(
            f"{groups} groups and {seeds} seeds: two of each are needed to tell how much "
            "scores scatter"
        )
    if np.isnan(differences).any():
        raise ValueError("a difference is missing, so the spread cannot be split up")
    mean = differences.mean()
    rows = differences.mean(axis=1, keepdims=True)
    columns = differences.mean(axis=0, keepdims=True)
    by_group = seeds * ((rows - mean) ** 2).sum() / (groups - 1)
    by_seed = groups * ((columns - mean) ** 2).sum() / (seeds - 1)
    left = differences - rows - columns + mean
    rest = (left**2).sum() / ((groups - 1) * (seeds - 1))
    return Components(
        max(0.0, float(by_group - rest) / seeds),
        max(0.0, float(by_seed - rest) / groups),
        float(rest),
    )


def standard_error(parts: Components, groups: int, seeds: int) -> float:
    """Return that of the mean difference: sqrt(var(a) / G + var(b) / S + var(e) / (G S))."""
    return float(np.sqrt(parts.group / groups + parts.seed / seeds + parts.rest / (groups * seeds)))


def power_of(difference: float, parts: Components, groups: int, seeds: int, alpha: float) -> float:
    """Return the chance that a two-sided test at `alpha` finds a true difference.

    By the noncentral t distribution with df = min(G, S) - 1 degrees of freedom, the careful choice
    for a mean that varies over both; with df below 1 there is no test and the power is 0.
    """
    df = min(groups, seeds) - 1
    if df < 1:
        return 0.0
    error = standard_error(parts, groups, seeds)
    if error == 0:
        return 1.0 if difference else alpha
    limit = t.ppf(1 - alpha / 2, df)
    shift = abs(difference) / error
    found = float(nct.sf(limit, df, shift) + nct.cdf(-limit, df, shift))
    # Far out the noncentral t is no number; there the normal distribution is close enough.
    return float(norm.cdf(shift - limit)) if np.isnan(found) else found


def least_seeds(
    difference: float, parts: Components, groups: int, power: float, alpha: float
) -> float:
    """Return the least number of seeds with that power; inf where more patients are needed.

    Seeds do not make up for patients: var(a) / G stays, however many seeds there are.
    """
    if power_of(difference, parts, groups, MOST_SEEDS, alpha) < power:
        return float("inf")
    low, high = 1, MOST_SEEDS  # one seed has no spread, hence no power
    while high - low > 1:
        middle = (low + high) // 2
        if power_of(difference, parts, groups, middle, alpha) >= power:
            high = middle
        else:
            low = middle
    return float(high)


def detectable(parts: Components, groups: int, seeds: int, power: float, alpha: float) -> float:
    """Return the least difference that groups and seeds find with that power."""
    error = standard_error(parts, groups, seeds)
    if error == 0:
        return 0.0
    if min(groups, seeds) < 2:
        return float("inf")
    high = 1.0
    while power_of(high * error, parts, groups, seeds, alpha) < power:
        high *= 2
    found = brentq(
        lambda size: power_of(size * error, parts, groups, seeds, alpha) - power, 0, high
    )
    return float(found) * error

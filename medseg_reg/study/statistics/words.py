"""A comparison in one plain sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from medseg_reg.study.statistics.paired import least_p
from medseg_reg.study.statistics.table import lower_is_better


def verdict(
    row: pd.Series | Mapping[str, Any], alpha: float = 0.05, metric: str | None = None
) -> str:
    """Say what a row of `compare` supports, and what it does not.

    A difference counts as shown where `is_supported` says so; with one seed nothing does, nor
    with seeds that copy each other.

    Args:
        row: of the table that `compare` returned. If it still has `attrs`, the baseline is named.
        alpha: level.
        metric: name of the metric; by default that of `attrs`, else "score".

    >>> row = {"method": "dropout", "seeds": 3, "groups": 5, "mean": 0.75, "low": 0.7, "high": 0.8,
    ...        "difference": 0.02, "difference_low": 0.01, "difference_high": 0.03,
    ...        "simultaneous_low": 0.01, "simultaneous_high": 0.03,
    ...        "tested_groups": 5, "distinct_seeds": 3, "p": 0.0625, "p_holm": 0.0625,
    ...        "improvement": 1.0}
    >>> print(verdict(row))
    dropout: no difference is shown: 5 groups cannot reach p < 0.05 in this test, whose least p \
for them is 0.0625; the score is higher by 0.02 (interval 0.01 to 0.03), in 100 % of the pairs \
better, which needs more groups to be judged.
    """
    attrs = getattr(row, "attrs", {})
    metric = metric or attrs.get("metric", "score")
    baseline = attrs.get("baseline", "the baseline")
    one = {key: float(row[key]) for key in _NUMBERS}
    method, groups, seeds = str(row["method"]), int(row["groups"]), int(row["seeds"])
    if math.isnan(one["mean"]):
        return f"{method}: no {metric} is known, because every value is missing."
    if math.isnan(one["difference"]):
        span = _span(one["low"], one["high"])
        named = attrs.get("baseline", method)
        why = "there is nothing to compare it with"
        if method != named:
            why = f"none of them where '{named}' has one, so they cannot be compared"
        return (
            f"{method}: mean {metric} {one['mean']:.4g} ({span}) over {_count(groups, 'group')} "
            f"and {_count(seeds, 'seed')}; {why}."
        )
    return f"{method}: {_finding(one, metric, baseline, (groups, seeds), alpha)}."


def is_supported(row: pd.Series | Mapping[str, Any], alpha: float = 0.05) -> bool:
    """Whether a row of `compare` supports a difference from the baseline.

    Two must agree: Holm's p, over groups, is below alpha, and the simultaneous interval, over
    groups and seeds, is on one side of 0. Both are corrected for the number of methods. The test
    alone knows nothing of other seeds, so one seed supports nothing; the interval alone leans on a
    bootstrap of few seeds.

    Nor do several seeds support anything where their differences are the same in every group: an
    interval without any spread between seeds is no sign of certainty, but of runs that are copies.

    Args:
        row: of the table that `compare` returned.
        alpha: level of the test; that of the interval is `compare`'s.
    """
    return bool(row["p_holm"] < alpha and row["distinct_seeds"] > 1 and _apart(row, "simultaneous"))


def _apart(row: pd.Series | Mapping[str, Any], interval: str) -> bool:
    """Whether an interval, `difference` or `simultaneous`, leaves out 0; one of NaN does not."""
    return bool(row[f"{interval}_low"] > 0 or row[f"{interval}_high"] < 0)


_NUMBERS = (
    *("mean", "low", "high", "difference", "difference_low", "difference_high"),
    *("simultaneous_low", "simultaneous_high", "tested_groups", "distinct_seeds"),
    *("p", "p_holm", "improvement"),
)


def _finding(
    one: dict[str, float], metric: str, baseline: str, counts: tuple[int, int], alpha: float
) -> str:
    groups, seeds = counts
    differ = int(one["tested_groups"])
    size = _size(one, metric)
    tested = "Holm's p " + ("< 0.001" if one["p_holm"] < 0.001 else f"{one['p_holm']:.3f}")
    if not differ:
        return f"no difference is shown: none is there in any of {_count(groups, 'group')}; {size}"
    if least_p(differ) >= alpha:
        few = f"{_count(groups, 'group')} cannot"
        if differ < groups:
            few = f"only {differ} of {groups} groups differ, which cannot"
        return (
            f"no difference is shown: {few} reach p < {alpha:g} in this "
            f"test, whose least p for them is {least_p(differ):.3g}; {size}, which needs more "
            "groups to be judged"
        )
    if seeds < 2:
        return (
            "nothing is shown about the method, because another seed may turn it: for this one "
            f"seed {size}, {tested}"
        )
    if one["distinct_seeds"] < 2:
        return (
            f"nothing is shown about the method: all {seeds} seeds have the same differences in "
            f"every group, as copies of one run do, so they count as one: {size}, {tested}; see "
            "whether the runs are copies"
        )
    if is_supported(one, alpha):
        return (
            f"the data support a difference from {baseline}: {size}, {tested}; they say nothing "
            "about other data or networks"
        )
    if one["p_holm"] < alpha:
        span = f"{one['simultaneous_low']:.3g} to {one['simultaneous_high']:.3g}"
        return (
            f"the groups agree, but seeds may turn it: {size}, {tested}; the interval that holds "
            f"for all methods together, {span}, covers 0, so no difference is shown for other seeds"
        )
    # Not the level alone: p is at its floor, which the number of methods multiplied.
    if one["p"] <= least_p(differ) * (1 + 1e-9):
        return (
            f"no difference is shown: p is the least that {_count(differ, 'group')} can give, but "
            f"not small enough for so many methods ({tested}); {size}; more groups or fewer "
            "methods would decide"
        )
    if _apart(one, "difference"):
        return (
            f"a hint, but no difference is shown: {size}, {tested}; more groups or seeds would "
            "decide"
        )
    return (
        f"no difference is shown: {size}, {tested}; this does not show that there is none, any "
        "within the interval is compatible"
    )


def _size(one: dict[str, float], metric: str) -> str:
    gap = one["difference"]
    word = "higher" if gap > 0 else "lower"
    span = _span(one["difference_low"], one["difference_high"])
    share = f"in {one['improvement']:.0%} of the pairs better".replace("%", " %")
    if gap == 0:
        return f"the mean {metric} is the same ({span}), {share}"
    # Lower is better for some: say so, lest a fall be read as a loss.
    less = " (less is better)" if lower_is_better(metric) else ""
    return f"the {metric} is {word} by {abs(gap):.3g}{less} ({span}), {share}"


def _span(low: float, high: float) -> str:
    if math.isnan(low):
        return "no interval below 3 groups"
    if low == high:
        return "no interval, because no spread was seen"
    return f"interval {low:.3g} to {high:.3g}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"

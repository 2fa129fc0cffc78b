"""Methods against a baseline: differences, intervals, tests, effect sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from medseg_reg.study.statistics.hierarchical import (
    Resamples,
    hierarchical_interval,
    hierarchical_intervals,
)
from medseg_reg.study.statistics.paired import holm, rank_biserial, signed_rank
from medseg_reg.study.statistics.table import (
    Array,
    Block,
    Missing,
    blocks,
    bounds_of,
    lower_is_better,
    nan_mean,
    require_baseline,
)

COLUMNS = (
    *("dataset", "network", "method", "seeds", "groups", "mean", "low", "high"),
    *("difference", "difference_low", "difference_high", "simultaneous_low", "simultaneous_high"),
    *("tested_groups", "distinct_seeds", "p", "p_holm", "effect_size"),
    *("improvement", "improvement_low", "improvement_high"),
)


def compare(
    results: pd.DataFrame,
    baseline: str,
    metric: str = "dice",
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    *,
    missing: Missing = "leave_out",
) -> pd.DataFrame:
    """Compare every method of each data set and network with a baseline.

    A group's score is the mean over its cases in each class, then over classes. Intervals are
    those of `hierarchical_interval`, over groups and seeds. `difference` is method minus baseline,
    paired by case, class and seed; the bounds `simultaneous_low` and `simultaneous_high` are its
    interval with 1 - confidence divided by the number of methods (Bonferroni), so that those of
    all methods of the data set and network hold together. `p` is Wilcoxon's, two-sided, over the
    groups' differences (each the mean over seeds), of which `tested_groups` are not 0; `p_holm` is
    corrected for all methods of the data set and network; `effect_size` is the rank-biserial
    correlation of the same differences. `distinct_seeds` counts the seeds whose differences repeat
    those of no other seed in every group: what repeats is a copy, and says nothing of chance.
    `improvement` is the probability of improvement: the share of (group, seed) pairs in which the
    method is better, ties counted half.

    For hd95, assd, ece and the absolute volume differences less is better: means and differences
    keep their signs, effect sizes are above 0 and `improvement` above 1/2 where the method is
    better.

    The probability of improvement is from R. Agarwal et al., "Deep Reinforcement Learning at the
    Edge of the Statistical Precipice", NeurIPS 2021, arXiv:2108.13264; there runs are not paired,
    and here they are.

    Args:
        results: tidy, as in results.csv.
        baseline: a method.
        metric: one of `METRICS`.
        confidence: coverage of the intervals.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        missing: empty values: `leave_out` (a value missing in method or baseline is left out of
            both where they are compared) or `refuse`.

    Returns:
        The baseline first, then the others by name; columns as `COLUMNS`. The baseline's own row
        is NaN from `difference` on. `attrs` has `metric`, `baseline`, `confidence`, and `notes` on
        what was left out.

    Raises:
        MedsegError: the baseline or the metric is not there, there is one group only, or methods
            differ in split, seeds, cases or classes.

    >>> from itertools import product
    >>> rows = [
    ...     ("demo", "unet", method, seed, "5f", f"p{n}", f"p{n}", "organ", "dice",
    ...      0.7 + 0.01 * n + (method == "dropout") * (0.02 + 0.001 * n))
    ...     for method, seed, n in product(["none", "dropout"], range(2), range(6))
    ... ]
    >>> names = "dataset network method seed split case group class metric value".split()
    >>> found = compare(pd.DataFrame(rows, columns=names), "none").iloc[1]
    >>> [round(float(found[name]), 5) for name in ("difference", "p", "improvement")]
    [0.0225, 0.03125, 1.0]
    """
    found, notes = blocks(results, metric, missing)
    less = lower_is_better(metric)
    rows: list[dict[str, Any]] = []
    for block in found:
        require_baseline(block, baseline)
        draws = Resamples(len(block.seeds), len(block.groups), resamples, seed)
        order = [baseline, *(name for name in block.methods if name != baseline)]
        own = [_own(block, name, metric, draws, confidence) for name in order]
        together = 1 - (1 - confidence) / max(1, len(order) - 1)
        levels = (confidence, together)
        gaps = {name: _differences(block, name, baseline) for name in order[1:]}
        least, most = bounds_of(metric)
        # No two scores are further apart, nor two means.
        span = (least - most, most - least)
        pairs = [_against(gap, less, draws, levels, span) for gap in gaps.values()]
        notes += filter(None, (_copies(block, *of_one, metric) for of_one in gaps.items()))
        for pair, p in zip(pairs, holm([pair["p"] for pair in pairs]), strict=True):
            pair["p_holm"] = float(p)
        rows += [{**one, **other} for one, other in zip(own, [{}, *pairs], strict=True)]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table.attrs = {
        "metric": metric,
        "baseline": baseline,
        "confidence": confidence,
        "notes": notes,
    }
    return table


def pair_scores(block: Block, method: str, baseline: str) -> tuple[Array, Array]:
    """Return group scores (seeds, groups) of two methods, without what either of them lacks."""
    left, right = block.of(method), block.of(baseline)
    lacking = np.isnan(left) | np.isnan(right)
    both = np.where(lacking, np.nan, np.stack([left, right]))
    first, second = block.scores(both)
    return first, second


def _own(
    block: Block, method: str, metric: str, draws: Resamples, confidence: float
) -> dict[str, Any]:
    scores = block.scores(block.of(method))
    found = hierarchical_interval(scores, draws, confidence, bounds_of(metric))
    return {
        "dataset": block.dataset,
        "network": block.network,
        "method": method,
        "seeds": found.seeds,
        "groups": found.groups,
        "mean": found.mean,
        "low": found.low,
        "high": found.high,
    }


def _differences(block: Block, method: str, baseline: str) -> Array:
    """Return method minus baseline (seeds, groups), rounded as for the test: ties are ties."""
    mine, other = pair_scores(block, method, baseline)
    found: Array = np.round(mine - other, 12) + 0.0  # minus zero is zero
    return found


def count_distinct(difference: Array) -> tuple[int, int]:
    """Return how many seeds have a value, and how many of them repeat no other in every group."""
    known = difference[~np.isnan(difference).all(axis=1)]
    rows = {tuple(row) for row in np.nan_to_num(known, nan=np.inf)}  # NaN differs from itself
    return len(known), len(rows)


def _copies(block: Block, method: str, difference: Array, metric: str) -> str:
    """Say so where seeds repeat each other, which trainings with other random numbers do not."""
    seeds, distinct = count_distinct(difference)
    if distinct == seeds or not np.nan_to_num(difference).any():
        return ""
    return (
        f"{block.where}: {method}: of {seeds} seeds only {distinct} "
        f"{'has' if distinct == 1 else 'have'} {metric} differences of "
        f"{'its' if distinct == 1 else 'their'} own; the others repeat them in every group, as "
        "copies of a run do."
    )


def _against(
    difference: Array,
    less: bool,
    draws: Resamples,
    levels: tuple[float, float],
    span: tuple[float, float],
) -> dict[str, float]:
    better = np.sign(-difference if less else difference) / 2 + 0.5
    gap, together = hierarchical_intervals(difference, draws, levels, span)
    share = hierarchical_interval(better, draws, levels[0], (0.0, 1.0))
    of_groups = np.round(nan_mean(difference, axis=0), 12)
    return {
        "difference": gap.mean,
        "difference_low": gap.low,
        "difference_high": gap.high,
        "simultaneous_low": together.low,
        "simultaneous_high": together.high,
        "tested_groups": int(np.count_nonzero(np.nan_to_num(of_groups))),
        "distinct_seeds": count_distinct(difference)[1],
        "p": signed_rank(of_groups),
        "effect_size": rank_biserial(-of_groups if less else of_groups),
        "improvement": share.mean,
        "improvement_low": share.low,
        "improvement_high": share.high,
    }

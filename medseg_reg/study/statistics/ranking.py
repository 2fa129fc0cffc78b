"""The order of the methods, and how sure it is."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import stats  # type: ignore[import-untyped,unused-ignore]

from medseg_reg.study.statistics.hierarchical import Resamples
from medseg_reg.study.statistics.table import (
    Array,
    Missing,
    blocks,
    lower_is_better,
    nan_mean,
    require_fraction,
)

COLUMNS = ("dataset", "network", "method", "rank", "low", "high", "best")


def rank(
    results: pd.DataFrame,
    metric: str = "dice",
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    *,
    missing: Missing = "leave_out",
) -> pd.DataFrame:
    """Rank the methods of each data set and network by their mean, with bootstrap intervals.

    1 is best; equal means share the mean of their ranks. `low` and `high` are percentiles of the
    rank over resamples of groups and seeds, the same resamples for all methods, and `best` is the
    share of resamples in which the method is first (shared first places count in parts). A high
    `best` says that the order is stable for groups and seeds like these, not that the difference
    is large; with few groups the bootstrap is too sure of it, so read it beside `compare`.

    Source: M. Wiesenfarth et al., "Methods and open-source toolkit for analyzing and visualizing
    challenge results", Scientific Reports 2021, doi:10.1038/s41598-021-82017-6, there over cases
    alone.

    Args:
        results: tidy, as in results.csv.
        metric: one of `METRICS`; for hd95 and the like the least is best.
        confidence: coverage of the percentiles.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        missing: empty values: `leave_out` (what one method lacks in a seed and case is left out of
            all) or `refuse`.

    Returns:
        The best first within each data set and network; columns as `COLUMNS`, `attrs` as of
        `compare`.

    Raises:
        MedsegError: as of `compare`; or no case has a value in all methods.
    """
    require_fraction("confidence", confidence)
    found, notes = blocks(results, metric, missing)
    rows = []
    for block in found:
        lacking = np.isnan(block.values).any(axis=0)
        scores = block.scores(np.where(lacking, np.nan, block.values))
        if not lower_is_better(metric):
            scores = -scores
        draws = Resamples(len(block.seeds), len(block.groups), resamples, seed)
        means = np.stack([draws.means(one) for one in scores], axis=1)
        means = means[~np.isnan(means).any(axis=1)]
        names = (block.dataset, block.network)
        if not len(means):
            notes.append(f"{block.where}: no case has a {metric} in all methods: no ranks.")
            rows += [(*names, method, *[np.nan] * 4) for method in block.methods]
            continue
        drawn = _ranks(means)
        low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
        first = means.round(12) == means.round(12).min(axis=1, keepdims=True)
        best = (first / first.sum(axis=1, keepdims=True)).mean(axis=0)
        place = _ranks(nan_mean(nan_mean(scores, axis=1), axis=1)[None])[0]
        for index in np.argsort(place, kind="stable"):
            numbers = (float(one[index]) for one in (place, low, high, best))
            rows.append((*names, block.methods[index], *numbers))
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table.attrs = {"metric": metric, "confidence": confidence, "notes": notes}
    return table


def _ranks(means: Array) -> Array:
    """Return the ranks within each row, 1 for the least."""
    found: Array = stats.rankdata(means.round(12), axis=1)
    return found

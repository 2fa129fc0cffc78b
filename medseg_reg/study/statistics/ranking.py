"""The order of the methods, and how sure it is."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats  # type: ignore[import-untyped,unused-ignore]

from medseg_reg.study.statistics.hierarchical import Resamples, hierarchical_interval
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

    1 is best; equal means share the mean of their ranks. Of M methods, the interval of one rank is

        low = 1 + number of methods that are better,
        high = M - number of methods that are worse,

    where another one counts as better or worse if the `hierarchical_interval` of the difference to
    it, with 1 - confidence divided by M - 1 (Bonferroni), is on that side of 0. So it covers the
    rank of each method as often as the intervals of the differences promise. Percentiles of the
    rank over resamples do not: they take the order of the means seen for the true one, and where
    methods are nearly equal the truth is often outside. Fewer than three groups leave every rank
    open.

    `best` is the share of resamples of groups and seeds, the same for all methods, in which the
    method is first (shared first places count in parts). A high `best` says that the order is
    stable for groups and seeds like these, not that the difference is large; with few groups or
    seeds the bootstrap is too sure of it, so read it beside the interval.

    Sources: M. Mogstad, J. P. Romano, A. M. Shaikh, D. Wilhelm, "Inference for Ranks with
    Applications to Mobility across Neighbourhoods and Academic Achievement across Countries",
    Review of Economic Studies 2024, doi:10.1093/restud/rdad006 (the interval; there with other
    intervals of the differences); M. Wiesenfarth et al., "Methods and open-source toolkit for
    analyzing and visualizing challenge results", Scientific Reports 2021,
    doi:10.1038/s41598-021-82017-6 (the share, there over cases alone).

    Args:
        results: tidy, as in results.csv.
        metric: one of `METRICS`; for hd95 and the like the least is best.
        confidence: coverage of the interval of each rank.
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
        low, high = _bounds(scores, draws, confidence)
        first = means.round(12) == means.round(12).min(axis=1, keepdims=True)
        best = (first / first.sum(axis=1, keepdims=True)).mean(axis=0)
        place = _ranks(nan_mean(nan_mean(scores, axis=1), axis=1)[None])[0]
        for index in np.argsort(place, kind="stable"):
            numbers = (float(one[index]) for one in (place, low, high, best))
            rows.append((*names, block.methods[index], *numbers))
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table.attrs = {"metric": metric, "confidence": confidence, "notes": notes}
    return table


def _bounds(scores: Array, draws: Resamples, confidence: float) -> tuple[Array, Array]:
    """Return the interval of the rank of each method; the least of scores (M, ...) is first."""
    number = len(scores)
    level = 1 - (1 - confidence) / max(1, number - 1)
    low, high = np.ones(number), np.full(number, float(number))
    for i, j in combinations(range(number), 2):
        found = hierarchical_interval(np.round(scores[i] - scores[j], 12), draws, level)
        # Without an interval neither holds.
        for less, more, apart in ((i, j, found.high < 0), (j, i, found.low > 0)):
            low[more] += apart
            high[less] -= apart
    return low, high


def _ranks(means: Array) -> Array:
    """Return the ranks within each row, 1 for the least."""
    found: Array = stats.rankdata(means.round(12), axis=1)
    return found

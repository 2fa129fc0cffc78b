"""Methods compared with a baseline, ranked, and the seeds that a difference needs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from medseg_reg.study.statistics.hierarchical import interval, resampled_means
from medseg_reg.study.statistics.paired import better_pairs, holm, rank_biserial, signed_rank_p
from medseg_reg.study.statistics.power import components, detectable, least_seeds, power_of
from medseg_reg.study.statistics.scores import Array, Scores, lower_is_better, scores_of

_DIFFERENCE = (
    *("difference", "difference_low", "difference_high", "p", "p_holm", "effect_size"),
    *("improvement", "improvement_low", "improvement_high"),
)


def compare(
    results: pd.DataFrame,
    baseline: str,
    metric: str = "dice",
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare every method with a baseline, in pairs of patient and seed.

    Args:
        results: as `results.csv`: one row a run, case, class and metric.
        baseline: name of the method to compare with.
        metric: name of the metric.
        confidence: coverage of the intervals.
        resamples: of the bootstrap over groups and seeds.
        seed: of the bootstrap.

    Returns:
        One row for each data set, network and method: `seeds`, `groups`; `mean`, `low`, `high` of
        the score; `difference` (method minus baseline) with its interval; `p` of the Wilcoxon
        signed-rank test over the groups' mean differences, and `p_holm`, corrected over the methods
        of that data set and network; `effect_size`, the rank-biserial correlation over groups;
        `improvement`, the probability that the method is better on a patient with a seed, with its
        interval. Those of the baseline are NaN. Differences keep their sign where less is better;
        `effect_size` and `improvement` are above 0 and 1/2 where the method is better.

    Raises:
        ValueError: methods that cannot be paired, an unknown metric or baseline.
    """
    rows: list[dict[str, Any]] = []
    for scores in scores_of(results, metric):
        _require(baseline, scores)
        part = [
            _row(scores, method, baseline, metric, (confidence, resamples, seed))
            for method in scores.methods
        ]
        for row, corrected in zip(part, holm([row["p"] for row in part]), strict=True):
            row["p_holm"] = float(corrected)
        rows += part
    return pd.DataFrame(rows)


def rank(
    results: pd.DataFrame,
    metric: str = "dice",
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Rank the methods of each data set and network by their mean score, 1 for the best.

    Returns:
        `dataset`, `network`, `method`, `rank` of the mean, `low` and `high`: the interval of the
        rank over resampled patients and seeds, `best`: the share of resamples in which the method
        is first (ties share).

    Raises:
        ValueError: as in `compare`.
    """
    rows: list[dict[str, Any]] = []
    tail = 100 * (1 - confidence) / 2
    for scores in scores_of(results, metric):
        sign = 1 if lower_is_better(metric) else -1
        means = sign * resampled_means(scores.values, resamples, seed)
        ranks = rankdata(means, axis=1)
        first = means == means.min(axis=1, keepdims=True)
        best = (first / first.sum(axis=1, keepdims=True)).mean(axis=0)
        point = rankdata(sign * np.nanmean(scores.values, axis=(1, 2)))
        low, high = np.percentile(ranks, [tail, 100 - tail], axis=0)
        rows += [
            {
                **_names(scores, method),
                "rank": float(point[n]),
                "low": float(low[n]),
                "high": float(high[n]),
                "best": float(best[n]),
            }
            for n, method in enumerate(scores.methods)
        ]
    return pd.DataFrame(rows)


def seeds_needed(
    results: pd.DataFrame,
    baseline: str,
    difference: float,
    power: float = 0.8,
    alpha: float = 0.05,
    metric: str = "dice",
) -> pd.DataFrame:
    """Say how many seeds show a difference, given how these methods scatter.

    Args:
        results: as in `compare`; at least two groups and two seeds.
        baseline: name of the method to compare with.
        difference: the true difference that is to be seen, in the unit of the metric (0.01 is a
            point of DICE).
        power: the chance to see it.
        alpha: level of the two-sided test.
        metric: name of the metric.

    Returns:
        `dataset`, `network`, `method`, `groups`, `seeds` (as they are), `seeds_needed` (inf where
        no number of seeds is enough with so few patients), `power` (of the present seeds),
        `detectable` (the least difference that they show with the power asked for). NaN where a
        score is missing.

    Raises:
        ValueError: as in `compare`, a power or alpha out of range, fewer than two groups or seeds.
    """
    if not (0 < alpha < power < 1) or not difference:
        raise ValueError(
            f"difference {difference:g}, alpha {alpha:g}, power {power:g}: expected a difference "
            "that is not 0, and 0 < alpha < power < 1"
        )
    rows: list[dict[str, Any]] = []
    for scores in scores_of(results, metric):
        _require(baseline, scores)
        groups, seeds = len(scores.groups), len(scores.seeds)
        for method in scores.methods:
            if method == baseline:
                continue
            change = scores.of(method) - scores.of(baseline)
            found = {"seeds_needed": np.nan, "power": np.nan, "detectable": np.nan}
            if not np.isnan(change).any():
                parts = components(change)
                found = {
                    "seeds_needed": least_seeds(difference, parts, groups, power, alpha),
                    "power": power_of(difference, parts, groups, seeds, alpha),
                    "detectable": detectable(parts, groups, seeds, power, alpha),
                }
            rows.append({**_names(scores, method), "groups": groups, "seeds": seeds, **found})
    return pd.DataFrame(rows)


def _row(
    scores: Scores, method: str, baseline: str, metric: str, bootstrap: tuple[float, int, int]
) -> dict[str, Any]:
    own, base = scores.of(method), scores.of(baseline)
    row: dict[str, Any] = {
        **_names(scores, method),
        "seeds": len(scores.seeds),
        "groups": int((~np.isnan(own)).any(axis=1).sum()),
        **_named(interval(own, *bootstrap), ""),
    }
    if method == baseline:
        return row | dict.fromkeys(_DIFFERENCE, np.nan)
    return row | _difference(own - base, metric, bootstrap)


def _difference(change: Array, metric: str, bootstrap: tuple[float, int, int]) -> dict[str, float]:
    sign = -1 if lower_is_better(metric) else 1
    there = change[~np.isnan(change).all(axis=1)]
    by_group = np.nanmean(there, axis=1)
    better = interval(better_pairs(sign * change), *bootstrap)
    return {
        **_named(interval(change, *bootstrap), "difference"),
        "p": signed_rank_p(by_group),
        "p_holm": np.nan,
        "effect_size": rank_biserial(sign * by_group),
        **_named(better, "improvement"),
    }


def _named(found: tuple[float, float, float], name: str) -> dict[str, float]:
    keys = (name or "mean", f"{name}_low".lstrip("_"), f"{name}_high".lstrip("_"))
    return dict(zip(keys, found, strict=True))


def _names(scores: Scores, method: str) -> dict[str, str]:
    return {"dataset": scores.dataset, "network": scores.network, "method": method}


def _require(baseline: str, scores: Scores) -> None:
    if baseline not in scores.methods:
        raise ValueError(
            f"{scores.dataset}, {scores.network}: has no method '{baseline}' to compare with; "
            f"there is {', '.join(scores.methods)}"
        )

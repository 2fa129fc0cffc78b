"""The statistics of a report, pair by pair, so that one odd data set does not stop the others."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import pandas as pd

from medseg_reg.errors import MedsegError
from medseg_reg.study.report.source import Pair, Source
from medseg_reg.study.statistics import balanced, compare, rank, seeds_needed

ALPHA = 0.05
CONFIDENCE = 0.95
# DICE that a reader would call a difference at all; the seeds needed are those to find it.
DIFFERENCE = 0.01
COMPARED = ("dice", "iou", "surface_dice", "hd95", "ece")

MEANS = ("seeds", "groups", "mean", "low", "high")
DIFFERENCES = (
    *("difference", "difference_low", "difference_high", "simultaneous_low", "simultaneous_high"),
    *("tested_groups", "distinct_seeds", "p", "p_holm", "effect_size"),
    *("improvement", "improvement_low", "improvement_high"),
)


@dataclass(frozen=True)
class Comparisons:
    """What the statistics say.

    Attributes:
        every: rows of `compare`, with a column `metric`.
        ranked: rows of `rank`, of DICE.
        needed: rows of `seeds_needed`, of DICE.
        notes: what was left out, and why.
    """

    every: pd.DataFrame
    ranked: pd.DataFrame
    needed: pd.DataFrame
    notes: list[str]

    @property
    def dice(self) -> pd.DataFrame:
        """The comparisons of DICE."""
        return self.every[self.every["metric"] == "dice"].reset_index(drop=True)


def compare_all(source: Source, resamples: int = 10_000) -> Comparisons:
    """Compare all methods of a study with its baseline."""
    keys = ["dataset", "network", "method"]
    every: list[pd.DataFrame] = [pd.DataFrame(columns=["metric", *keys, *MEANS, *DIFFERENCES])]
    ranked: list[pd.DataFrame] = [pd.DataFrame(columns=[*keys, "rank", "low", "high", "best"])]
    needed: list[pd.DataFrame] = [pd.DataFrame(columns=[*keys, "seeds_needed"])]
    notes: dict[str, None] = {}
    for pair in source.pairs:
        kept = _of(source, pair)
        try:
            kept, left_out = balanced(kept)
            notes.update((note, None) for note in left_out)
        except MedsegError as error:
            notes[f"No comparison: {str(error).rstrip('.')}."] = None
        for metric in (name for name in COMPARED if name in source.metrics):
            try:
                found = compare(kept, source.baseline, metric, CONFIDENCE, resamples=resamples)
                notes.update((note, None) for note in found.attrs["notes"])
                if metric == "dice":
                    ranked.append(rank(kept, confidence=CONFIDENCE, resamples=resamples))
            except MedsegError as error:
                notes[f"No comparison: {str(error).rstrip('.')}."] = None
                found = _means(source, pair, metric)
            every.append(found.assign(metric=metric))
        with suppress(MedsegError):  # one seed or patient: the summary says that they are too few
            # `is_supported` corrects for all methods, so the power is asked for as strictly.
            alpha = ALPHA / max(1, kept["method"].nunique() - 1)
            needed.append(seeds_needed(kept, source.baseline, DIFFERENCE, alpha=alpha))
    # Empty tables hold the columns; their types must not decide those of the rest.
    joined = [pd.concat(some[1:] or some, ignore_index=True) for some in (every, ranked, needed)]
    compared, in_order, seeds = (source.ordered(one) for one in joined)
    return Comparisons(compared, in_order, seeds, list(notes))


def _of(source: Source, pair: Pair) -> pd.DataFrame:
    r = source.results
    return r[(r["dataset"] == pair[0]) & (r["network"] == pair[1])]


def _means(source: Source, pair: Pair, metric: str) -> pd.DataFrame:
    """Return the means alone, where nothing can be compared in pairs."""
    scores = source.scores(pair, metric).groupby("method", sort=False)
    table = scores.agg(
        seeds=("seed", "nunique"), groups=("group", "nunique"), mean=("value", "mean")
    ).reset_index()
    return table.assign(
        dataset=pair[0],
        network=pair[1],
        **dict.fromkeys(("low", "high", *DIFFERENCES), float("nan")),
    )

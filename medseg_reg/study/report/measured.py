"""DICE lost without feature maps, their correlation, gaps of training and validation: tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from medseg_reg.errors import MedsegError
from medseg_reg.study.report.comparing import CONFIDENCE, DIFFERENCES, MEANS
from medseg_reg.study.report.source import Source
from medseg_reg.study.report.tables import WHERE, Table, count, from_frame, score, spanned, words
from medseg_reg.study.statistics import balanced, compare

KEYS = ["dataset", "network", "method"]
MEANT = {"coadaptation_loss": "DICE lost", "channel_correlation": "|r|", "train_val_gap": "gap"}
Columns = Mapping[str, tuple[str, Callable[[Any], str]]]
TESTS = DIFFERENCES[DIFFERENCES.index("tested_groups") :]


def compare_measures(source: Source, resamples: int = 10_000) -> pd.DataFrame:
    """Compare the co-adaptation of all methods with the baseline's, as `compare` does scores.

    The DICE that is lost without feature maps and the correlation of the maps are compared over
    patients and seeds. A gap between training and
    validation is one number of a training, of which each part has its own patients, so gaps are
    compared over trainings alone, which take the place of patients there.

    Returns:
        Rows of `compare`, with a column `metric`; means alone where nothing can be compared.
    """
    found = [pd.DataFrame(columns=["metric", *KEYS, *MEANS, *DIFFERENCES])]
    for metric, table in _tidy(source).items():
        for _, rows in table.groupby(["dataset", "network"], sort=False):
            found.append(_compared(source, rows, metric, resamples).assign(metric=metric))
    # Empty tables hold the columns; their types must not decide those of the rest.
    return source.ordered(pd.concat(found[1:] or found, ignore_index=True))


def losses(source: Source, measured: pd.DataFrame, confidence: str) -> Table | None:
    """Return the DICE that every method loses where the most feature maps are set to zero."""
    table = source.coadaptation.get("coadaptation")
    frame = _of(measured, "coadaptation_loss")
    if table is None or frame.empty:
        return None
    parts, most = " and ".join(dict.fromkeys(table["part"])), table["rate"].max()
    note = (
        f"DICE with all feature maps before the output layer minus DICE with {most:.0%} of them, "
        f"drawn at random, set to zero: the mean over draws, for a patient of the {parts} part, "
        "then over patients and seeds. The less is lost, the less do maps depend on each other; "
        "it says nothing of the DICE with all maps. Intervals are over patients and seeds."
    )
    columns = {**WHERE, "seeds": ("seeds", count), "groups": ("patients", count)}
    caption = "DICE lost without feature maps"
    return _table("coadaptation_loss", caption, frame, columns, note, confidence)


def correlations(source: Source, measured: pd.DataFrame, confidence: str) -> Table | None:
    """Return the correlation of feature maps of every method."""
    table = source.coadaptation.get("channel_correlation")
    if table is None or table.empty:
        return None
    parts = " and ".join(dict.fromkeys(table["part"]))
    note = (
        "Mean |r| over pairs of feature maps before the output layer, over all pixels of a patient "
        f"of the {parts} part, then over patients and seeds: the higher, the more the maps show "
        "the same. Intervals are over patients and seeds."
    )
    columns = {**WHERE, "seeds": ("seeds", count), "groups": ("patients", count)}
    frame = _of(measured, "channel_correlation")
    caption = "Correlation of feature maps"
    return _table("channel_correlation", caption, frame, columns, note, confidence)


def gaps(source: Source, measured: pd.DataFrame, confidence: str) -> Table | None:
    """Return the gap between training and validation of every method."""
    table = source.coadaptation.get("train_val_gap")
    if table is None or table.empty:
        return None
    names = ["train_dice", "val_dice", "train_loss", "val_loss"]
    means = table.groupby(KEYS, sort=False)[names].mean().reset_index()
    frame = _of(measured, "train_val_gap").drop(columns="seeds")
    frame = frame.rename(columns={"groups": "trainings"}).merge(means, on=KEYS, how="left")
    note = (
        "DICE of the trained network on the cases of its training minus DICE on those of its "
        "validation, without augmentation: the higher, the more it over-fits. Intervals are over "
        "trainings alone, of which there must be three, and hold for these patients. Losses are "
        "those of the kept epoch, with augmentation and regularizers on in training, so they "
        "compare no methods. Where the epoch was chosen by the validation, the gap is a little too "
        "small."
    )
    columns = {
        **WHERE,
        "trainings": ("trainings", count),
        "train_dice": ("training DICE", score),
        "val_dice": ("validation DICE", score),
    }
    losses = {"train_loss": ("training loss", score), "val_loss": ("validation loss", score)}
    caption = "Gap between training and validation"
    return _table("train_val_gap", caption, frame, columns, note, confidence, losses)


def _table(
    name: str,
    caption: str,
    frame: pd.DataFrame,
    before: Columns,
    note: str,
    confidence: str,
    behind: Columns | None = None,
) -> Table:
    # Two looks at a network beside its scores: no tests, which would ask for a correction too.
    frame = frame.drop(columns=["metric", *TESTS])
    shown = spanned(frame)
    columns = {
        **before,
        "mean_shown": (f"{MEANT[name]} ({confidence} interval)", words),
        "difference_shown": (f"difference ({confidence} interval)", words),
        **(behind or {}),
    }
    by = {"mean_shown": "mean", "difference_shown": "difference"}
    return from_frame(name, caption, shown, columns, note, "method", by, frame)


def _tidy(source: Source) -> dict[str, pd.DataFrame]:
    """Return the measures as `compare` reads scores."""
    found = {}
    curves = source.coadaptation.get("coadaptation")
    if curves is not None:
        found["coadaptation_loss"] = _lost(curves)
    maps = source.coadaptation.get("channel_correlation")
    if maps is not None:
        found["channel_correlation"] = maps.rename(columns={"correlation": "value"})
    gap = source.coadaptation.get("train_val_gap")
    if gap is not None:
        found["train_val_gap"] = gap.rename(columns={"gap": "value"}).assign(group="")
    return {
        metric: table.assign(metric=metric, case=table["group"], **{"class": ""})
        for metric, table in found.items()
    }


def _lost(curves: pd.DataFrame) -> pd.DataFrame:
    """Return the DICE of each run and patient at rate 0 minus that at its highest rate."""
    keys = [*KEYS, "seed", "split", "group"]
    dice = curves.groupby([*keys, "rate"], sort=False)["dice"].mean().unstack("rate")
    most = dice.columns.max()
    if dice.empty or 0.0 not in dice or most == 0:
        return pd.DataFrame(columns=[*keys, "value"])
    return (dice[0.0] - dice[most]).dropna().rename("value").reset_index()


def _compared(source: Source, rows: pd.DataFrame, metric: str, resamples: int) -> pd.DataFrame:
    try:
        rows, _ = balanced(rows)
        if metric == "train_val_gap":
            rows = _over_trainings(rows, bool(source.settings.get("folds")))
        return compare(rows, source.baseline, metric, CONFIDENCE, resamples=resamples)
    except MedsegError:  # one training or patient, or no run of the baseline
        means = rows.groupby(KEYS, sort=False).agg(
            seeds=("seed", "nunique"), groups=("group", "nunique"), mean=("value", "mean")
        )
        return means.reset_index().assign(
            **dict.fromkeys(("low", "high", *DIFFERENCES), float("nan"))
        )


def _over_trainings(rows: pd.DataFrame, folds: bool) -> pd.DataFrame:
    """Put trainings in the place of patients; the folds of a seed are one, by their mean."""
    training = rows["seed"].astype(str)
    if not folds:  # other splits of a seed are trainings of their own
        training = training + " " + rows["split"]
    rows = rows.assign(group=training, case=training, seed=0, split="")
    keys = [*KEYS, "seed", "split", "group", "case", "class", "metric"]
    return rows.groupby(keys, sort=False)["value"].mean().reset_index()


def _of(measured: pd.DataFrame, metric: str) -> pd.DataFrame:
    return measured[measured["metric"] == metric].reset_index(drop=True)

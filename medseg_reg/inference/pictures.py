"""Pictures of a run: its learning curves, and its best, median and worst case."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pandas as pd
import seaborn
from matplotlib import pyplot

from medseg_reg.data.overview import draw_slice
from medseg_reg.data.store import SliceStore
from medseg_reg.errors import MedsegError
from medseg_reg.files import replacing
from medseg_reg.inference.predictor import Predictor

PIXELS = 480


def write_curves(metrics: Path, path: Path, notes: Sequence[str] = ()) -> None:
    """Draw losses, and scores of the validation, over the epochs; `notes` stand above."""
    try:
        table = pd.read_csv(metrics)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, FileNotFoundError) as error:
        raise MedsegError(f"{metrics}: is missing or damaged ({error}).") from None
    seaborn.set_theme(style="whitegrid", palette="colorblind")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    groups = (
        (left, "loss", {"train_loss": "training", "val_loss": "validation"}),
        (right, "score", {"val_dice": "DICE", "val_iou": "IoU"}),
    )
    for axes, label, columns in groups:
        for column, name in columns.items():
            known = table[["epoch", column]].dropna()
            axes.plot(known["epoch"], known[column], label=name, marker=".", markersize=4)
        axes.set(xlabel="epoch", ylabel=label)
        axes.legend()
    right.set(ylim=(0, 1), title="validation, mean over cases and classes")
    known = table[["epoch", "val_dice"]].dropna()
    if len(known):
        best = known.loc[known["val_dice"].idxmax()]
        right.axvline(best["epoch"], color="gray", linewidth=1, linestyle=":")
        left.set(title=f"best epoch {int(best['epoch'])}, DICE {best['val_dice']:.3f}")
    _save(figure, path, notes)


def write_width_curve(table: pd.DataFrame, path: Path) -> None:
    """Draw the score over the width; columns as `inference.width.width_curve` gives them."""
    seaborn.set_theme(style="whitegrid", palette="colorblind")
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(table["width"], table["dice"].astype(float), marker=".")
    low, high = (table[column].astype(float) for column in ("low", "high"))
    axes.fill_between(table["width"], low, high, alpha=0.2, label="interval over patients")
    axes.set(xlabel="share of the channels kept", ylabel="volume DICE", ylim=(0, 1))
    axes.legend()
    _save(figure, path, ())


def write_panels(
    store: SliceStore,
    predictor: Predictor,
    per_case: pd.DataFrame,
    path: Path,
    notes: Sequence[str] = (),
) -> None:
    """Draw image, truth and prediction of the best, the median and the worst case.

    Shown is the slice with most foreground in the truth; `notes` stand above. Where no case
    has a score, up to three of them are shown without a rank.
    """
    means = per_case.groupby("case", sort=False)["dice"].mean()
    scores = means.dropna().sort_values()
    if scores.empty:
        scores = means
    chosen = {"best": len(scores) - 1, "median": len(scores) // 2, "worst": 0}
    # With one or two cases some of the three are the same; the first name counts.
    named = {position: label for label, position in reversed(chosen.items())}
    chosen = {label: position for position, label in sorted(named.items(), reverse=True)}
    size = (9, 3.2 * len(chosen))
    figure, grid = pyplot.subplots(
        len(chosen), 3, figsize=size, layout="constrained", squeeze=False
    )
    for line, (label, position) in zip(grid, chosen.items(), strict=True):
        case = str(scores.index[position])
        row = store.row(case)
        number = int(np.argmax(row.foreground))
        image, truth = store.image(case), store.mask(case)[number]
        predicted = predictor.labels_of_slice(image, number, case, truth)
        empty = np.zeros_like(truth)
        titles = ("image", "truth", "prediction")
        for axes, mask, title in zip(line, (empty, truth, predicted), titles, strict=True):
            drawn = draw_slice(image[number], mask, PIXELS, store.ignore_label)
            axes.imshow(np.asarray(drawn))
            axes.set_axis_off()
            axes.set_title(title, fontsize=8)
        score = float(scores.iloc[position])
        title = f"{label}: {case} #{number}, DICE {score:.3f}"
        if math.isnan(score):
            title = f"{case} #{number}, no score"
        line[0].set_title(title, fontsize=8)
    _save(figure, path, notes)


def _save(figure: Any, path: Path, notes: Sequence[str]) -> None:
    if notes:
        figure.suptitle("\n".join(notes), fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
    pyplot.close(figure)

"""The figures of a report: each says one thing about one data set and network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import pyplot
from matplotlib.patches import Rectangle

from medseg_reg.study.report.drawing import (
    GRID,
    INK,
    RC,
    WIDTH,
    Figure,
    fewer_ticks,
    finish,
    mark_numbers,
    short,
    slug,
    styles,
)
from medseg_reg.study.report.source import Pair, Source
from medseg_reg.study.report.sweeps import Sweep
from medseg_reg.study.report.tables import score, signed

ROW = 0.46
MOST_LINES = 80


def all_figures(
    source: Source,
    compared: pd.DataFrame,
    sweeps: dict[Pair, list[Sweep]],
    measured: pd.DataFrame,
) -> dict[str, list[Figure]]:
    """Return the figures by the section that they belong to.

    Args:
        source: the study.
        compared: rows of `compare`, of DICE.
        sweeps: methods that differ in one number.
        measured: rows of `compare_measures`.
    """
    found: dict[str, list[Figure]] = {
        key: [] for key in ("differences", "distributions", "sweeps", "curves", "coadaptation")
    }
    with matplotlib.rc_context(RC):
        for pair in source.pairs:
            rows = _of_pair(compared, pair)
            found["differences"] += _some(forest(source, pair, rows))
            found["distributions"] += _some(distribution(source, pair, "group"))
            found["distributions"] += _some(distribution(source, pair, "seed"))
            found["sweeps"] += [sweep(source, pair, rows, one) for one in sweeps[pair]]
            found["curves"] += _some(curves(source, pair))
            found["coadaptation"] += _some(coadaptation(source, pair))
            for metric, shown in MEASURES.items():
                rows = _of_pair(measured[measured["metric"] == metric], pair)
                found["coadaptation"] += _some(forest(source, pair, rows, shown))
    return found


@dataclass(frozen=True)
class Forest:
    """What a forest plot is of: differences of methods to the baseline.

    Attributes:
        name: of its files.
        what: the score or measure.
        reading: of the axis, in a few words.
        caption: behind "difference to none".
    """

    name: str
    what: str
    reading: str
    caption: str


DIFFERENCES = Forest(
    "differences",
    "DICE",
    "right of 0 is better",
    "with its interval. An interval that covers 0 leaves open which is better; where the thin line "
    "covers 0, no difference is supported.",
)
# Of the tests of co-adaptation, by their names in `compare_measures`.
MEASURES = {
    "coadaptation_loss": Forest(
        "coadaptation_loss",
        "lost DICE",
        "left of 0 less is lost",
        "in the DICE that is lost with the most feature maps set to zero, with its interval over "
        "patients and seeds: left of 0 the maps depend less on each other, which is no gain in "
        "DICE by itself.",
    ),
    "channel_correlation": Forest(
        "correlation",
        "|r|",
        "left of 0 maps repeat less",
        "in the mean correlation |r| of pairs of feature maps before the output layer, with its "
        "interval over patients and seeds: left of 0 the maps repeat each other less, which is no "
        "gain in DICE by itself.",
    ),
    "train_val_gap": Forest(
        "gap",
        "gap",
        "right of 0 over-fits more",
        "in DICE on training cases minus DICE on validation cases, with its interval over "
        "trainings: right of 0 the network over-fits more.",
    ),
}


def forest(
    source: Source, pair: Pair, rows: pd.DataFrame, shown: Forest = DIFFERENCES
) -> Figure | None:
    """Draw the difference of each method to the baseline, and its intervals.

    Thick is its own, thin the one that holds for all methods together, which decides what is
    supported.
    """
    rows = rows[rows["method"] != source.baseline].dropna(subset=["difference"])
    rows = rows.set_index("method").reindex([m for m in source.methods if m in set(rows["method"])])
    if rows.empty:
        return None
    figure, axes = _canvas(len(rows))
    looks = styles(source.methods, source.baseline)
    parts = []
    for y, (method, row) in enumerate(rows.iterrows()):
        look = looks[str(method)]
        text, together = signed(row["difference"]), ""
        low, high = row["difference_low"], row["difference_high"]
        if low == low:
            axes.plot([low, high], [y, y], color=look.colour, linewidth=2.6, alpha=0.75)
            wide = row[["simultaneous_low", "simultaneous_high"]]
            axes.plot(wide, [y, y], "|-", color=look.colour, linewidth=0.9, markersize=5)
            text += f" ({signed(low)} to {signed(high)})"
            together = f", for all together {signed(wide.iloc[0])} to {signed(wide.iloc[1])}"
        axes.plot(row["difference"], y, look.marker, color=look.colour, markersize=7)
        axes.text(1.02, y, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
        parts.append(f"{method} {text}{together}")
    axes.axvline(0, color=INK, linewidth=1, alpha=0.6)
    axes.set_xlabel(f"difference in {shown.what} to {short(source.baseline)}; {shown.reading}")
    _rows(axes, list(rows.index))
    axes.margins(x=0.08)
    fewer_ticks(axes)
    caption = (
        f"{_title(pair)}: difference to {source.baseline} {shown.caption} Thin lines: the "
        "intervals that hold for all methods together."
    )
    alt = f"Differences in {shown.what} to {source.baseline}, {_title(pair)}: {'; '.join(parts)}."
    return finish(slug(shown.name, *pair), figure, caption, alt, rows.reset_index())


def distribution(source: Source, pair: Pair, unit: Literal["group", "seed"]) -> Figure | None:
    """Draw boxes and points of patients (or seeds), each joined over the methods by a line."""
    wide = source.scores(pair).pivot_table(
        index=unit, columns="method", values="value", aggfunc="mean"
    )
    wide = wide[[m for m in source.methods if m in wide]]
    if wide.empty or (unit == "seed" and len(wide) < 2):
        return None
    figure, axes = _canvas(wide.shape[1])
    looks = styles(source.methods, source.baseline)
    shift = np.random.default_rng(0).uniform(-0.17, 0.17, len(wide))
    if unit == "seed" or len(wide) < 8:
        shift = shift * 0.4
    rows = np.arange(wide.shape[1])
    for values, moved in list(zip(wide.to_numpy(), shift, strict=True))[:MOST_LINES]:
        axes.plot(values, rows + moved, color="#808080", linewidth=0.7, alpha=0.3, zorder=1)
    for y, method in enumerate(wide):
        look, values = looks[str(method)], wide[method].to_numpy()
        _box(axes, values[~np.isnan(values)], y, look.colour)
        axes.plot(
            values, y + shift, look.marker, color=look.colour, alpha=0.5, markersize=4, zorder=3
        )
    _rows(axes, list(wide.columns))
    what = "patient (or video)" if unit == "group" else "seed"
    axes.set_xlabel(f"DICE of each {what}")
    over = "the mean over seeds" if unit == "group" else "the mean over patients"
    some = f" (of {MOST_LINES} of {len(wide)})" if len(wide) > MOST_LINES else ""
    caption = (
        f"{_title(pair)}: each point is one {what}, {over}; thin lines join the same {what}{some}. "
        "Boxes: quartiles and median; whiskers: lowest and highest."
    )
    parts = [
        f"{m} median {score(wide[m].median())}, {score(wide[m].min())} to {score(wide[m].max())}"
        for m in wide
    ]
    alt = f"DICE by {what}, {_title(pair)}: {'; '.join(parts)}."
    name = slug("patients" if unit == "group" else "seeds", *pair)
    return finish(name, figure, caption, alt, wide.reset_index())


def sweep(source: Source, pair: Pair, rows: pd.DataFrame, one: Sweep) -> Figure:
    """Draw DICE over the number in which methods differ."""
    rows = rows.set_index("method")
    frame = rows.loc[list(one.values), ["mean", "low", "high"]].assign(value=one.values.values())
    figure, axes = pyplot.subplots(figsize=(WIDTH, 3.1), layout="constrained")
    colour = "#0072B2"
    axes.plot(frame["value"], frame["mean"], color=colour, marker="o")
    axes.fill_between(
        frame["value"], frame["low"], frame["high"], color=colour, alpha=0.18, linewidth=0
    )
    if source.baseline in rows.index and source.baseline not in one.values:
        base = rows.loc[source.baseline]
        axes.axhline(base["mean"], color="#888888", linestyle="--", label=short(source.baseline))
        axes.axhspan(base["low"], base["high"], color="#888888", alpha=0.12, linewidth=0)
        axes.legend()
    axes.set(xlabel=one.label, ylabel="DICE")
    axes.grid(axis="y")
    mark_numbers(axes, list(frame["value"]), one.logarithmic)
    scale = " (logarithmic axis)" if one.logarithmic else ""
    caption = (
        f"{_title(pair)}: DICE over {one.label}{scale}, with intervals over patients and seeds. "
        "Bands that overlap do not show that values are equal, and the best of many is best by "
        "luck too."
    )
    parts = [f"{row['value']:g}: {score(row['mean'])}" for _, row in frame.iterrows()]
    alt = f"DICE over {one.label}, {_title(pair)}: {'; '.join(parts)}."
    name = slug("sweep", *pair, one.key, str(frame.index[0]))
    return finish(name, figure, caption, alt, frame.reset_index())


def curves(source: Source, pair: Pair) -> Figure | None:
    """Draw the training loss and the DICE of the validation over the epochs."""
    tables = []
    for row in source.runs.itertuples():
        path = source.path / row.run / "metrics.csv"
        if (row.dataset, row.network) != pair or not path.exists():
            continue
        try:
            table = pd.read_csv(path)
        except (ValueError, OSError):
            continue
        if {"epoch", "train_loss", "val_dice"} <= set(table):
            table = table[["epoch", "train_loss", "val_dice"]]
            tables.append(table.assign(method=row.method, run=row.run))
    if not tables:
        return None
    every = pd.concat(tables)
    frame = (
        every.groupby(["method", "epoch"], sort=False)[["train_loss", "val_dice"]]
        .agg(["mean", "min", "max"])
        .reset_index()
    )
    figure, both = pyplot.subplots(2, 1, figsize=(WIDTH, 4.6), sharex=True, layout="constrained")
    looks = styles(source.methods, source.baseline)
    for method in source.methods:
        part, look = frame[frame["method"] == method], looks[method]
        for axes, column in zip(both, ("train_loss", "val_dice"), strict=True):
            known = part[part[column]["mean"].notna()]
            _line(axes, known["epoch"], known[column], look, method)
    both[1].xaxis.get_major_locator().set_params(integer=True)
    both[0].set(ylabel="training loss")
    both[1].set(xlabel="epoch", ylabel="validation DICE")
    _legend(figure, both[0])
    caption = f"{_title(pair)}: mean over seeds; bands from the lowest to the highest seed."
    parts = []
    for method in source.methods:
        part = frame[frame["method"] == method]["val_dice"]["mean"].dropna()
        if len(part):
            parts.append(f"{method} {score(part.iloc[-1])}")
    alt = f"Training curves, {_title(pair)}. Validation DICE at the last epoch: {'; '.join(parts)}."
    frame.columns = ["_".join(part for part in column if part) for column in frame.columns]
    return finish(slug("curves", *pair), figure, caption, alt, frame)


def coadaptation(source: Source, pair: Pair) -> Figure | None:
    """Draw DICE over the share of feature maps that are set to zero before the output layer."""
    table = source.coadaptation.get("coadaptation")
    if table is None:
        return None
    table = _of_pair(table, pair)
    if table.empty:
        return None
    seeds = table.groupby(["method", "rate", "seed"], sort=False)["dice"].mean()
    frame = seeds.groupby(["method", "rate"], sort=False).agg(["mean", "min", "max"]).reset_index()
    frame = frame.sort_values(["method", "rate"], kind="stable")
    figure, axes = pyplot.subplots(figsize=(WIDTH, 3.4), layout="constrained")
    looks = styles(source.methods, source.baseline)
    parts = []
    for method in (m for m in source.methods if m in set(frame["method"])):
        part = frame[frame["method"] == method]
        _line(axes, part["rate"], part[["mean", "min", "max"]], looks[method], method, marked=True)
        ends = part["mean"].iloc[[0, -1]]
        parts.append(f"{method} {score(ends.iloc[0])} to {score(ends.iloc[1])}")
    axes.set(xlabel="share of feature maps set to zero", ylabel="DICE")
    axes.grid(axis="y")
    _legend(figure, axes)
    caption = (
        f"{_title(pair)}: random feature maps before the output layer set to zero. A curve that "
        "falls late is that of maps that depend less on each other. Mean over draws, patients and "
        "seeds; bands from the lowest to the highest seed."
    )
    alt = (
        f"Co-adaptation, {_title(pair)}. DICE from the lowest to the highest share of feature maps "
        f"set to zero: {'; '.join(parts)}."
    )
    return finish(slug("coadaptation", *pair), figure, caption, alt, frame)


def _some(figure: Figure | None) -> list[Figure]:
    return [] if figure is None else [figure]


def _of_pair(table: pd.DataFrame, pair: Pair) -> pd.DataFrame:
    return table[(table["dataset"] == pair[0]) & (table["network"] == pair[1])]


def _title(pair: Pair) -> str:
    return f"{pair[0]}, {pair[1]}"


def _canvas(rows: int) -> Any:
    return pyplot.subplots(figsize=(WIDTH, 0.95 + ROW * rows), layout="constrained")


def _rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [short(str(name)) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=5)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")


def _box(axes: Any, values: Any, y: float, colour: str) -> None:
    if not len(values):
        return
    low, first, middle, third, high = np.quantile(values, (0, 0.25, 0.5, 0.75, 1))
    axes.plot([low, high], [y, y], color=colour, linewidth=1, alpha=0.6, zorder=2)
    shape: dict[str, Any] = {"facecolor": colour, "edgecolor": colour, "alpha": 0.22, "zorder": 2}
    axes.add_patch(Rectangle((first, y - 0.27), third - first, 0.54, **shape))
    axes.plot([middle, middle], [y - 0.27, y + 0.27], color=colour, linewidth=2.4, zorder=4)


def _line(
    axes: Any, x: pd.Series, band: pd.DataFrame, look: Any, label: str, marked: bool = False
) -> None:
    marker = look.marker if marked else None
    options = {"color": look.colour, "linestyle": look.dash, "marker": marker, "markersize": 4}
    axes.plot(x, band["mean"], label=short(label), linewidth=1.6, **options)
    axes.fill_between(x, band["min"], band["max"], color=look.colour, alpha=0.12, linewidth=0)
    axes.grid(axis="y", color=GRID)


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = 3 if max(map(len, labels), default=0) < 18 else 2
    figure.legend(handles, labels, loc="outside upper left", ncols=columns)

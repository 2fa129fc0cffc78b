"""The tables of a report: for the page, as CSV with every digit, as LaTeX as they are shown."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from medseg_reg.files import replacing, write_text
from medseg_reg.study.report.comparing import ALPHA
from medseg_reg.study.report.source import METRICS, Source
from medseg_reg.study.statistics import group_scores, is_supported

NOTHING = "–"  # noqa: RUF001
_LATEX = str.maketrans(
    {
        **{sign: f"\\{sign}" for sign in "&%$#_{}"},
        **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
        # In text, LaTeX's usual fonts print the first three as other signs, and lack the minus.
        **{sign: f"${sign}$" for sign in "<>|"},
        **{"−": "$-$", NOTHING: "--"},  # noqa: RUF001
    }
)


@dataclass(frozen=True)
class Cell:
    """One cell: what is shown, the number it is sorted by, and `best` or `bad`."""

    text: str
    value: float | None = None
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Attributes:
        name: of its files.
        caption: what it shows.
        columns: the names of the columns.
        rows: as many cells as there are columns.
        frame: the same with every digit.
        note: stands below it.
        header: which column names the row, for screen readers.
    """

    name: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    frame: pd.DataFrame
    note: str = ""
    header: int = 0
    numeric: frozenset[int] = field(default_factory=frozenset)


def score(value: Any) -> str:
    """Return a score with three digits; a large one, such as a distance, with fewer."""
    if not _known(value):
        return NOTHING
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def signed(value: Any) -> str:
    """Return a difference with its sign, with a real minus.

    >>> signed(-0.0123)
    '−0.012'
    """  # noqa: RUF002
    if not _known(value):
        return NOTHING
    text = f"{value:+.3f}" if abs(value) < 10 else f"{value:+.1f}"
    return text.replace("-", "−")  # noqa: RUF001


def p_value(value: Any) -> str:
    """Return a p value as papers write it.

    >>> p_value(0.00004)
    '< 0.001'
    """
    if not _known(value):
        return NOTHING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def share(value: Any) -> str:
    """Return a share in percent."""
    return f"{100 * value:.0f} %" if _known(value) else NOTHING


def count(value: Any) -> str:
    """Return a whole number."""
    return f"{int(value)}" if _known(value) and math.isfinite(value) else NOTHING


def words(value: Any) -> str:
    """Return anything as text."""
    return NOTHING if value is None or value == "" or value != value else str(value)


def counted(number: int, one: str) -> str:
    """Return a number and its noun.

    >>> counted(1, "method"), counted(3, "method")
    ('1 method', '3 methods')
    """
    return f"{number} {one if number == 1 else one + 's'}"


def interval(low: Any, high: Any, shown: Callable[[Any], str] = score) -> str:
    """Return an interval in words, or nothing where there is none."""
    return f"{shown(low)} to {shown(high)}" if _known(low) and _known(high) else NOTHING


def from_frame(
    name: str,
    caption: str,
    frame: pd.DataFrame,
    columns: Mapping[str, tuple[str, Callable[[Any], str]]],
    note: str = "",
    header: str = "",
    by: Mapping[str, str] | None = None,
    raw: pd.DataFrame | None = None,
) -> Table:
    """Make a table of a frame.

    Args:
        name: of the table's files.
        caption: what it shows.
        frame: the numbers.
        columns: maps columns of the frame to their titles and formats; others are left out.
        note: stands below.
        header: the column that names the row.
        by: columns of text that are sorted by another column.
        raw: what the CSV holds, by default `frame`.
    """
    by = by or {}
    kept = [key for key in columns if key in frame]
    numeric = frozenset(i for i, k in enumerate(kept) if columns[k][1] is not words or k in by)
    rows = [
        [
            Cell(columns[k][1](row[k]), _number(row[by.get(k, k)]) if i in numeric else None)
            for i, k in enumerate(kept)
        ]
        for row in frame.to_dict("records")
    ]
    titles = [columns[k][0] for k in kept]
    place = kept.index(header) if header in kept else 0
    whole = frame if raw is None else raw
    return Table(name, caption, titles, rows, whole, note, place, numeric)


WHERE = {"dataset": ("data set", words), "network": ("network", words), "method": ("method", words)}


def methods_by_networks(source: Source, compared: pd.DataFrame, confidence: str) -> Table:
    """Return DICE of each method (rows) in each network (columns), data set by data set."""
    networks = list(dict.fromkeys(compared["network"]))
    rows = []
    for dataset in dict.fromkeys(compared["dataset"]):
        here = compared[compared["dataset"] == dataset]
        best = here.groupby("network")["mean"].max()
        for method in source.methods:
            cells = [Cell(dataset), Cell(method)]
            for network in networks:
                found = here[(here["network"] == network) & (here["method"] == method)]
                if found.empty:
                    cells.append(Cell(NOTHING))
                    continue
                row = found.iloc[0]
                star = " *" if is_supported(row) else ""
                text = f"{score(row['mean'])} ({interval(row['low'], row['high'])}){star}"
                mark = "best" if row["mean"] == best[network] else ""
                cells.append(Cell(text, _number(row["mean"]), mark))
            if any(cell.text != NOTHING for cell in cells[2:]):
                rows.append(cells)
    frame = compared[["dataset", "network", "method", "mean", "low", "high"]].copy()
    frame["supported"] = [is_supported(row) for _, row in compared.iterrows()]
    note = (
        f"Mean over patients and seeds, and its {confidence} interval. Bold: the highest mean. "
        f"*: differs from {source.baseline}: p < {ALPHA} after Holm's correction, and the interval "
        "of the difference, wide enough for all methods together, leaves out 0. A highest mean "
        "without a star is no finding."
    )
    return Table(
        "methods_by_networks",
        "DICE of every method in every network",
        ["data set", "method", *networks],
        rows,
        frame,
        note,
        1,
        frozenset(range(2, 2 + len(networks))),
    )


def spanned(compared: pd.DataFrame) -> pd.DataFrame:
    """Add means and differences with their intervals in words to rows of `compare`."""
    rows = [row for _, row in compared.iterrows()]
    means = [f"{score(row['mean'])} ({interval(row['low'], row['high'])})" for row in rows]
    differences = [
        f"{signed(row['difference'])} "
        f"({interval(row['difference_low'], row['difference_high'], signed)})"
        if _known(row["difference"])
        else NOTHING
        for row in rows
    ]
    together = [interval(row["simultaneous_low"], row["simultaneous_high"], signed) for row in rows]
    return compared.assign(mean_shown=means, difference_shown=differences, together_shown=together)


def comparisons(source: Source, compared: pd.DataFrame, confidence: str) -> Table:
    """Return all comparisons with the baseline."""
    frame = spanned(compared)
    frame["score"] = [METRICS.get(name, name) for name in frame["metric"]]
    columns = {
        **WHERE,
        "score": ("score", words),
        "seeds": ("seeds", count),
        "groups": ("patients", count),
        "mean_shown": (f"mean ({confidence} interval)", words),
        "difference_shown": (f"difference ({confidence} interval)", words),
        "together_shown": ("for all methods together", words),
        "p": ("p", p_value),
        "p_holm": ("p (Holm)", p_value),
        "effect_size": ("effect size", signed),
        "improvement": ("better in", share),
    }
    note = (
        f"Differences to {source.baseline}, paired by patient and seed; intervals by a "
        "hierarchical bootstrap over patients and seeds; for all methods together: the interval "
        "of the difference that holds for all methods of one data set, network and score at once; "
        f"a difference is supported where p (Holm) is below {ALPHA} and this interval leaves out "
        "0, with two seeds at least; p of a two-sided Wilcoxon signed-rank "
        "test over patients, Holm's correction over the methods of one data set, network and "
        "score; effect size: matched-pairs rank-biserial correlation; better in: share of pairs of "
        "patient and seed in which the method is better, ties half. Of HD95, ASSD, ECE and volume "
        "differences less is better."
    )
    caption = f"Comparisons with {source.baseline}"
    by = {
        "mean_shown": "mean",
        "difference_shown": "difference",
        "together_shown": "simultaneous_low",
    }
    raw = compared[["metric", *(c for c in compared if c != "metric")]]
    return from_frame("comparisons", caption, frame, columns, note, "method", by, raw)


def measures(source: Source) -> Table:
    """Return the mean of each score; of volume differences the mean of their absolute value."""
    table = source.results.copy()
    sides = table["metric"].str.startswith("volume_difference")
    table.loc[sides, "value"] = table.loc[sides, "value"].abs()
    keys = ["dataset", "network", "method"]
    groups = group_scores(table, [*keys, "metric", "seed"])
    # As the statistics: over seeds, then over patients.
    groups = groups.groupby([*keys, "metric", "group"], sort=False).mean()
    means = groups.groupby([*keys, "metric"], sort=False).mean().unstack("metric")
    frame = source.ordered(means[list(source.metrics)].reset_index())
    shown = {m: (METRICS.get(m, m).replace("volume", "|volume|"), score) for m in source.metrics}
    note = "Means over patients and seeds; cases without a value are left out of their own score."
    note = " ".join([note, *_policies(source)])
    caption = "All scores of every method"
    return from_frame("scores", caption, frame, {**WHERE, **shown}, note, "method")


def _policies(source: Source) -> Iterator[str]:
    """Say by which rules the scores of each data set were taken, and in which unit distances."""
    said: dict[str, list[str]] = {}
    for dataset, run in source.runs.groupby("dataset", sort=False)["run"].first().items():
        summary = source.file(run, "summary.json") or {}
        surface, parts = summary.get("surface"), []
        if surface:
            unit = surface["unit"]
            parts += [f"distances in {unit}", f"surface DICE within {surface['tolerance']} {unit}"]
            parts += [f"evaluation.missing is {surface['missing_policy']}"]
        if empty := summary.get("empty_policy"):
            parts += [f"evaluation.empty is {empty}"]
        if parts:
            said.setdefault(", ".join(parts), []).append(str(dataset))
    for text, datasets in said.items():
        yield f"{', '.join(datasets)}: {text}."


def classes(source: Source) -> Table:
    """Return DICE of each class."""
    keys = ["dataset", "network", "method", "class"]
    dice = source.results[source.results["metric"] == "dice"]
    groups = dice.groupby([*keys, "seed", "group"], sort=False)["value"].mean()
    frame = groups.groupby(keys, sort=False).agg(["mean", "std", "min"]).reset_index()
    frame = source.ordered(frame)
    columns = {
        **WHERE,
        "class": ("class", words),
        "mean": ("DICE", score),
        "std": ("standard deviation", score),
        "min": ("lowest", score),
    }
    note = "Over patients and seeds."
    return from_frame("classes", "DICE of every class", frame, columns, note, "method")


def ranks(ranked: pd.DataFrame, needed: pd.DataFrame, difference: float) -> Table:
    """Return the rank of each method, and how many seeds a small difference would need."""
    keys = ["dataset", "network", "method"]
    frame = ranked.merge(needed[[*keys, "seeds_needed"]], on=keys, how="left")
    frame["rank_interval"] = [
        interval(low, high, lambda v: f"{v:.0f}")
        for low, high in zip(frame["low"], frame["high"], strict=True)
    ]
    columns = {
        **WHERE,
        "rank": ("rank", lambda v: f"{v:.1f}".removesuffix(".0") if _known(v) else NOTHING),
        "rank_interval": ("interval of the rank", words),
        "best": ("first in", share),
        "seeds_needed": ("seeds needed", _seeds),
    }
    note = (
        "Interval of the rank: it leaves out the places of those methods alone that are surely "
        "better or worse, by the intervals of all differences together. First in: share of "
        "bootstrap resamples in which the method has the highest mean; with few seeds it is too "
        "sure, so read it beside the interval. Seeds "
        f"needed: to find a difference of {difference:g} DICE to the baseline with a power of "
        f"80 % at a level of {ALPHA:g} divided by the number of methods that are compared with the "
        "baseline in that data set and network, given the spread seen here; a guide for the next "
        "study, not a result."
    )
    return from_frame("ranks", "Ranks, and seeds needed", frame, columns, note, "method")


def write_tables(tables: Sequence[Table], folder: Path) -> None:
    """Write each table as CSV and as LaTeX (booktabs)."""
    for table in tables:
        with replacing(folder / f"{table.name}.csv") as temporary:
            table.frame.to_csv(temporary, index=False, lineterminator="\n")
        shown = pd.DataFrame(
            [[latex(cell.text) for cell in row] for row in table.rows],
            columns=[latex(title) for title in table.columns],
        )
        align = "".join("r" if i in table.numeric else "l" for i in range(len(table.columns)))
        text = shown.to_latex(
            index=False, escape=False, column_format=align, caption=latex(table.caption)
        )
        write_text(folder / f"{table.name}.tex", text)


def latex(text: str) -> str:
    r"""Return text that LaTeX prints as it stands here, with its usual fonts too.

    >>> print(latex("p < 0.001, 50 % of drop_block"))
    p $<$ 0.001, 50 \% of drop\_block
    """
    return text.translate(_LATEX)


def _seeds(value: Any) -> str:
    return "more than can be had" if value == math.inf else count(value)


def _known(value: Any) -> bool:
    return isinstance(value, numbers.Real) and value == value


def _number(value: Any) -> float | None:
    return float(value) if _known(value) and math.isfinite(value) else None

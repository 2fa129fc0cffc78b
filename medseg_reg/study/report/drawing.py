"""How the figures of a report are drawn: colours for every eye, SVG for light and dark pages."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import pandas as pd
import seaborn
from markupsafe import escape
from matplotlib import pyplot

from medseg_reg.files import replacing, write_bytes, write_text

# Wong, Nature Methods 8:441, 2011 (doi:10.1038/nmeth.1618), without the yellow and the black,
# which vanish on a light or a dark page.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
BASELINE = "#888888"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "*", "h")
DASHES = ("-", "--", "-.", ":")

# Text and axes; in the SVG it becomes the colour of the page's text.
INK = "#010203"
GRID = "#80808055"
WIDTH = 4.4

RC = {
    **seaborn.axes_style("ticks"),
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.labelsize": 9.5,
    "axes.titlesize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a name with two dollar signs is no formula
    "svg.fonttype": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.labelcolor": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": GRID,
}


@dataclass(frozen=True)
class Figure:
    """A figure of the page.

    Attributes:
        name: of its files.
        caption: what it shows and how to read it.
        alt: what it says, for those who do not see it.
        svg: its drawing, text as text, in the colour of the page's text.
        png: the same on white.
        frame: its numbers.
    """

    name: str
    caption: str
    alt: str
    svg: str
    png: bytes
    frame: pd.DataFrame

    @property
    def inline(self) -> str:
        """The SVG to be put into a page: named, and with identifiers of its own."""
        body = self.svg[self.svg.index("<svg") :]
        body = re.sub(r'\bid="', f'id="{self.name}-', body)
        body = re.sub(r"url\(#", f"url(#{self.name}-", body)
        body = re.sub(r'href="#', f'href="#{self.name}-', body)
        return body.replace("<svg ", f'<svg role="img" aria-label="{escape(self.alt)}" ', 1)


@dataclass(frozen=True)
class Style:
    """Colour, marker and dash of a method."""

    colour: str
    marker: str
    dash: str


def styles(methods: Sequence[str], baseline: str) -> dict[str, Style]:
    """Return one style for each method, told apart without colours too; the baseline is gray.

    >>> styles(["none", "dropout"], "none")["none"].colour
    '#888888'
    """
    found = {}
    others = [method for method in methods if method != baseline]
    for i, method in enumerate(others):
        n = len(COLOURS)
        found[method] = Style(COLOURS[i % n], MARKERS[(i + 1) % len(MARKERS)], DASHES[i // n % 4])
    return {**found, baseline: Style(BASELINE, MARKERS[0], "-")}


def slug(*parts: str) -> str:
    """Return a name for files and for identifiers in a page: other parts have another name.

    Where a part has other signs than letters, digits and `_`, the name ends in a hash of all parts,
    so that `a.b` and `a-b` stay apart.

    >>> slug("groups", "CT_MR", "unet")
    'groups-CT_MR-unet'
    >>> slug("groups", "CT & MR", "unet")
    'groups-CT-MR-unet-7be254fc'
    """
    plain = [re.sub(r"[^A-Za-z0-9_]+", "-", part).strip("-") or "x" for part in parts]
    if all(re.fullmatch(r"[A-Za-z0-9_]+", part) for part in parts):
        return "-".join(plain)
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return "-".join([*plain, digest[:8]])


def short(name: str) -> str:
    """Return a name that leaves room for the drawing.

    >>> short("heuristic_dropout_with_a_long_name")
    'heuristic_d…a_long_name'
    """
    return name if len(name) <= 24 else f"{name[:11]}…{name[-11:]}"


def finish(name: str, figure: Any, caption: str, alt: str, frame: pd.DataFrame) -> Figure:
    """Draw a figure as SVG and PNG, and close it."""
    svg, png = io.StringIO(), io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    figure.savefig(png, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    pyplot.close(figure)
    text = svg.getvalue().replace(INK, "currentColor")
    return Figure(name, caption, alt, text, png.getvalue(), frame)


def write_figures(figures: Sequence[Figure], folder: Path) -> None:
    """Write each figure as SVG, PNG, and its numbers as CSV."""
    for one in figures:
        write_text(folder / f"{one.name}.svg", one.svg)
        write_bytes(folder / f"{one.name}.png", one.png)
        with replacing(folder / f"{one.name}.csv") as temporary:
            one.frame.to_csv(temporary, index=False, lineterminator="\n")


def mark_numbers(axes: Any, numbers: Sequence[float], logarithmic: bool) -> None:
    """Put a tick at each number, and labels at as many as fit: the first, the last, and others.

    Args:
        axes: with everything drawn that makes it narrower.
        numbers: in rising order.
        logarithmic: whether the axis is.
    """
    if logarithmic:
        axes.set_xscale("log")
    texts = [f"{number:g}" for number in numbers]
    axes.set_xticks(numbers, texts)
    axes.set_xticks([], minor=True)
    axes.figure.canvas.draw()
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    gap = boxes[0].height / 2
    right = boxes[0].x1
    for i in range(1, len(boxes) - 1):
        if boxes[i].x0 < right + gap or boxes[i].x1 + gap > boxes[-1].x0:
            texts[i] = ""
        else:
            right = boxes[i].x1
    axes.set_xticks(numbers, texts)


def fewer_ticks(axes: Any) -> None:
    """Take fewer ticks from the x axis until their labels stand apart.

    Args:
        axes: with everything drawn that makes it narrower.
    """
    for number in (4, 3, 2, 1):
        axes.figure.canvas.draw()
        boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
        if all(one.x1 + one.height / 2 < other.x0 for one, other in pairwise(boxes)):
            return
        axes.locator_params(axis="x", nbins=number)

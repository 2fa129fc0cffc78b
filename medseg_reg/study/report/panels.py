"""What the methods predict for a few test cases: one slice each, with what is right and wrong."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from medseg_reg.data.overview import draw_slice
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.network import load_run_network
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.errors import MedsegError
from medseg_reg.inference.evaluation import run_predictor
from medseg_reg.study.report.source import Pair, Source
from medseg_reg.study.report.tables import score

Array = np.ndarray[Any, np.dtype[Any]]

PIXELS = 512
# Correct, missed, spurious, another class; safe for colour-blind eyes on gray images.
COLOURS = ((0, 158, 115), (86, 180, 233), (230, 97, 0), (240, 228, 66))
NAMES = ("correct", "missed", "spurious", "wrong class")
Colour = tuple[int, int, int]
CLASSES = ((0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0), (240, 228, 66))
ALPHA = 150


@dataclass(frozen=True)
class View:
    """One method's labels on a slice; `overlay` is a data URI of a picture."""

    name: str
    text: str
    alt: str
    overlay: str


@dataclass
class Panel:
    """One slice of one test case: the image and what each method says of it.

    Attributes:
        pair: data set and network.
        case: its name.
        why: the rule by which it was chosen.
        number: of the slice.
        image: a data URI of the slice.
        views: the truth, the image alone, and the methods.
        classes: the classes that the truth has, with their colours there; none where there is one
            class, which needs no legend.
    """

    pair: Pair
    case: str
    why: str
    number: int
    image: str
    views: list[View] = field(default_factory=list)
    classes: list[tuple[str, Colour]] = field(default_factory=list)


def make_panels(source: Source, count: int = 3) -> tuple[list[Panel], list[str]]:
    """Return pictures of a few test cases of each data set and network, and what went wrong.

    A case is the test case of one seed, the first that has scored it. Runs whose data are not
    there any more give a problem in words, not an error: the numbers of the report do not need
    them.

    Args:
        source: the study.
        count: how many cases of each data set and network.
    """
    panels: list[Panel] = []
    problems: dict[str, list[tuple[str, str]]] = {}
    for pair in source.pairs:
        table = source.of(pair).dropna(subset=["value"])
        chosen = choose_cases(table, source.baseline, count)
        begun: dict[str, Panel] = {}
        for method in source.methods:
            rows = table[(table["method"] == method) & table["case"].isin(chosen)]
            if rows.empty:
                continue
            firsts = rows.sort_values("seed", kind="stable").groupby("case", sort=False)["run"]
            for run, cases in firsts.first().reset_index().groupby("run", sort=False)["case"]:
                try:
                    for case, truth, view in _views(source, str(run), method, list(cases), rows):
                        if case not in begun:
                            begun[case] = _begin(pair, case, chosen[case], truth)
                        begun[case].views.append(view)
                except (MedsegError, OSError) as error:
                    problems.setdefault(f"{pair[0]}, {pair[1]}", []).append((method, str(error)))
        panels += [begun[case] for case in chosen if case in begun]
    return panels, [
        f"No pictures of {where}, {', '.join(dict.fromkeys(name for name, _ in found))}: "
        f"{found[0][1]}"
        for where, found in problems.items()
    ]


def choose_cases(table: pd.DataFrame, baseline: str, count: int) -> dict[str, str]:
    """Return cases by a rule that no one can bend, and why each was chosen.

    The case on which the methods differ most, then the baseline's median, worst and best.
    """
    means = table.groupby(["case", "method"], sort=False)["value"].mean().unstack("method")
    if means.empty:
        return {}
    order = means[baseline].sort_values(kind="stable") if baseline in means else means.mean(axis=1)
    order = order.dropna()
    spread = (means.max(axis=1) - means.min(axis=1)).sort_values(kind="stable")
    wanted = [(spread.index[-1], "the case on which the methods differ most")]
    for place, name in ((len(order) // 2, "median"), (0, "worst"), (len(order) - 1, "best")):
        if len(order):
            wanted.append((order.index[place], f"the {name} case of {baseline}"))
    chosen: dict[str, str] = {}
    for case, why in wanted:
        chosen.setdefault(str(case), why)
    return dict(list(chosen.items())[:count])


@dataclass(frozen=True)
class _Slice:
    image: Array
    mask: Array
    number: int
    classes: tuple[str, ...]


def _views(
    source: Source, name: str, method: str, cases: list[str], rows: pd.DataFrame
) -> Iterator[tuple[str, _Slice, View]]:
    run = RunDirectory(source.path / name)
    store = SliceStore(run.config().data.store)
    run.require_data(store)
    predictor = run_predictor(run, load_run_network(run))
    scores = rows[rows["run"] == name].groupby("case", sort=False)["value"].mean()
    for case in cases:
        number = int(np.argmax(store.row(case).foreground))
        images, truth = store.image(case), store.mask(case)[number]
        labels = predictor.labels_of_slice(images, number, case, truth)
        if store.ignore_label is not None:
            ignored = truth == store.ignore_label
            truth, labels = np.where(ignored, 0, truth), np.where(ignored, 0, labels)
        seen = _Slice(np.asarray(images[number]), np.asarray(truth), number, store.classes)
        errors = compare_labels(labels, seen.mask)
        seed = int(rows.loc[rows["run"] == name, "seed"].iloc[0])
        text = f"DICE of the case {score(scores[case])}, seed {seed}"
        alt = f"{method} on {case}, slice {number}: {_account(errors)}. {text}."
        yield case, seen, View(method, text, alt, _overlay(errors, COLOURS))


def compare_labels(labels: Array, truth: Array) -> Array:
    """Return 1 where a pixel is correct, 2 missed, 3 spurious, 4 of another class, else 0.

    >>> compare_labels(np.array([1, 0, 1, 2]), np.array([1, 1, 0, 1])).tolist()
    [1, 2, 3, 4]
    """
    is_in, said = truth > 0, labels > 0
    cases = [is_in & (labels == truth), is_in & ~said, said & ~is_in, is_in & said]
    return np.select(cases, [1, 2, 3, 4], 0).astype(np.uint8)


def _begin(pair: Pair, case: str, why: str, seen: _Slice) -> Panel:
    empty = np.zeros_like(seen.mask)
    size = min(PIXELS, max(seen.mask.shape))
    panel = Panel(pair, case, why, seen.number, _uri(draw_slice(seen.image, empty, size)))
    share = float((seen.mask > 0).mean())
    alt = f"True labels of {case}, slice {seen.number}: {100 * share:.1f} % of the picture."
    classes = np.where(seen.mask > 0, (seen.mask - 1) % len(CLASSES) + 1, 0).astype(np.uint8)
    if len(seen.classes) > 2:
        there = (int(one) for one in np.unique(seen.mask) if one)
        panel.classes = [(seen.classes[one], CLASSES[(one - 1) % len(CLASSES)]) for one in there]
    panel.views.append(View("truth", "as labelled", alt, _overlay(classes, CLASSES)))
    plain = View("image", "without labels", f"Image of {case}.", _overlay(empty, COLOURS))
    panel.views.append(plain)
    return panel


def _account(errors: Array) -> str:
    counts = np.bincount(errors.ravel(), minlength=5)[1:]
    return ", ".join(f"{n} pixels {name}" for n, name in zip(counts, NAMES, strict=True) if n) or (
        "nothing labelled"
    )


def _overlay(values: Array, colours: tuple[Colour, ...]) -> str:
    """Return a see-through picture of labels; placed as `draw_slice` places its image."""
    size = min(PIXELS, max(values.shape))
    rows, columns = (max(1, round(n * size / max(values.shape))) for n in values.shape)
    picture = Image.fromarray(values).resize((columns, rows), Image.Resampling.NEAREST)
    square = Image.new("L", (size, size))
    square.paste(picture, ((size - columns) // 2, (size - rows) // 2))
    square.putpalette([0, 0, 0, *(part for colour in colours for part in colour)])
    return _uri(square, transparency=bytes([0, *[ALPHA] * len(colours)]))


def _uri(picture: Image.Image, **options: Any) -> str:
    extrema: Any = picture.getextrema()
    if picture.mode == "RGB" and extrema[0] == extrema[2]:
        gray = picture.convert("L")
        if np.array_equal(np.asarray(gray.convert("RGB")), np.asarray(picture)):
            picture = gray
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True, **options)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")

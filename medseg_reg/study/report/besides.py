"""What runs had besides their own training: teachers and pre-trainings, which cost and know too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from medseg_reg.study.placeholders import TEACHER, WEIGHTS
from medseg_reg.study.report.budgets import at
from medseg_reg.study.report.source import Source
from medseg_reg.study.report.tables import WHERE, Table, count, counted, from_frame, words

_WAYS = {
    "teacher": "teacher",
    "pre-training": "pre-training",
    "training": "training of its first weights",
    "file": "file of weights",
}
_NONE = "nothing"
Where = tuple[str, str]


class _Lesson(NamedTuple):
    """What one run had from one other.

    Attributes:
        where: data set and network of the run; likewise `method` and `run`.
        way: what it was, as `teacher` or `pre-training of the teacher`; or nothing at all.
        origin: what the run has noted of it.
    """

    where: Where
    method: str
    run: str
    way: str
    origin: dict[str, Any]

    def number(self, key: str) -> int | None:
        """Return a number that was noted, or how many names; None where nothing was."""
        found = self.origin.get(key)
        return len(found) if isinstance(found, list) else found

    @property
    def drawn(self) -> int | None:
        """How many slices were drawn in all epochs."""
        epochs, slices = self.number("epochs"), self.number("slices")
        return None if epochs is None or slices is None else epochs * slices


def besides(source: Source) -> Table | None:
    """Return what each method had besides its own training; None where no run had anything."""
    lessons = _lessons(source)
    if all(one.way == _NONE for one in lessons):
        return None
    rows = []
    for (where, method, way), found in _grouped(lessons):
        rows.append(
            {
                **{"dataset": where[0], "network": where[1], "method": method, "way": way},
                "runs": len({one.run for one in found}),
                "sources": len({one.origin["path"] for one in found}) if way != _NONE else None,
                **{key: _span(one.number(key) for one in found) for key in ("epochs", "cases")},
                "drawn": _span(one.drawn for one in found),
                **{key: _shared(found, key) for key in ("test", "val")},
            }
        )
    columns = {
        **WHERE,
        "way": ("had besides", words),
        "runs": ("runs", count),
        "sources": ("different ones", count),
        "epochs": ("its epochs", words),
        "drawn": ("slices drawn", words),
        "cases": ("cases", words),
        "test": ("test cases it knows", words),
        "val": ("validation cases it knows", words),
    }
    note = (
        "Of each run by itself: the cases that its teacher or its pre-training was trained on, and "
        "those of them by which the run is judged. A pre-training knows their images alone. The "
        "CSV has the names. Slices: epochs times slices of an epoch; at most a batch less in each."
    )
    caption = "What methods had besides their own training"
    frame, raw = source.ordered(pd.DataFrame(rows)), source.ordered(_raw(lessons))
    return from_frame("besides", caption, frame, columns, note, "method", raw=raw)


def told_besides(source: Source) -> Iterator[str]:
    """Say for each data set and network what was learned elsewhere, and whether by all alike."""
    lessons = _lessons(source)
    baselines: dict[str, dict[str, str]] = {}
    for where in dict.fromkeys(one.where for one in lessons):
        here = [one for one in lessons if one.where == where]
        methods = [method for method in source.methods if method in _methods(here)]
        had = {name: _had([one for one in here if one.method == name]) for name in methods}
        alike = _alike(had)
        place = f"{where[0]}, {where[1]}"
        if len(alike) > 1:
            yield (
                f"{place}: methods did not have the same budget. Besides their own training: "
                f"{_listed(alike)}. A difference between them may come from that."
            )
        elif _NONE not in alike:
            yield f"{place}: besides its own training every method had {next(iter(alike))}."
        yield from _known(place, here)
        if source.baseline in had:
            baselines.setdefault(where[0], {})[where[1]] = had[source.baseline]
    for dataset, networks in baselines.items():
        alike = _alike(networks)
        if len(alike) > 1:
            yield (
                f"{dataset}: networks did not have the same budget. Besides the training of "
                f"{source.baseline}: {_listed(alike)}."
            )


def _lessons(source: Source) -> list[_Lesson]:
    """Return what all runs had; one with nothing says so."""
    found = []
    for row in source.runs.itertuples():
        where = (str(row.dataset), str(row.network))
        ways = [*_flat(_noted(source, str(row.run)))] or [(_NONE, {})]
        found += [_Lesson(where, str(row.method), str(row.run), *way) for way in ways]
    return found


def _noted(source: Source, run: str) -> list[dict[str, Any]]:
    """Return what a run has noted; of one from before such notes, what its configuration names."""
    environment = source.file(run, "environment.json")
    noted = environment.get("learned_from") if isinstance(environment, dict) else None
    if isinstance(noted, list):
        return noted
    config = source.file(run, "config.yaml")
    named = [("teacher", at(config, TEACHER)), *(("file", at(config, key)) for key in WEIGHTS)]
    return [{"kind": kind, "path": str(path)} for kind, path in named if path]


def _flat(origins: Iterable[dict[str, Any]], of: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for origin in origins:
        way = _WAYS.get(origin["kind"], origin["kind"]) + of
        yield way, origin
        yield from _flat(origin.get("before") or [], f" of the {way}")


def _grouped(
    lessons: Sequence[_Lesson],
) -> Iterator[tuple[tuple[Where, str, str], list[_Lesson]]]:
    keys = dict.fromkeys((one.where, one.method, one.way) for one in lessons)
    for key in keys:
        yield key, [one for one in lessons if (one.where, one.method, one.way) == key]


def _runs(lessons: Sequence[_Lesson]) -> str:
    return f"{counted(len({one.run for one in lessons}), 'run')} ({', '.join(_methods(lessons))})"


def _methods(lessons: Sequence[_Lesson]) -> list[str]:
    return list(dict.fromkeys(one.method for one in lessons))


def _had(lessons: Sequence[_Lesson]) -> str:
    """Return in words what the runs of a method had."""
    runs, parts = len({one.run for one in lessons}), []
    for (_, _, way), found in _grouped(lessons):
        if way == _NONE:
            continue
        shares = {"epochs": _span(one.number("epochs") for one in found)}
        shares["slices"] = _span(one.drawn for one in found)
        shares["cases"] = _span(one.number("cases") for one in found)
        cost = ", ".join(f"{key} {value}" for key, value in shares.items() if value)
        having = len({one.run for one in found})
        some = "" if having == runs else f" in {having} of {runs} runs"
        parts.append(f"a {way}{some}" + (f" ({cost})" if cost else " (of unknown cost)"))
    return " and ".join(parts) or _NONE


def _alike(had: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the names that had the same, by what they had."""
    found: dict[str, list[str]] = {}
    for name, text in had.items():
        found.setdefault(text, []).append(name)
    return found


def _listed(alike: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{text} in {', '.join(names)}" for text, names in alike.items())


def _known(place: str, lessons: Sequence[_Lesson]) -> Iterator[str]:
    """Say which runs were judged by cases that what they learned from knows, or may know."""
    for way in dict.fromkeys(one.way for one in lessons if one.way != _NONE):
        found = [one for one in lessons if one.way == way]
        seen = [one for one in found if one.number("test")]
        unknown = [one for one in found if one.origin.get("test") is None]
        if seen:
            how = "" if way.startswith(("teacher", "training")) else ", without labels"
            yield (
                f"{place}: the {way} of {_runs(seen)} "
                f"has seen images of {_shared(seen, 'test')} test "
                f"cases{how}. The scores of these runs hold for patients whose images are at hand "
                "before."
            )
        if unknown:
            yield (
                f"{place}: whether the {way} of {_runs(unknown)} has seen test cases is not known."
            )


def _shared(lessons: Sequence[_Lesson], part: str) -> str:
    """Return in words how many cases of a part are known, over runs."""
    total = {"test": "tested", "val": "validated"}[part]
    known = [one for one in lessons if isinstance(one.origin.get(part), list)]
    if not known:
        return "" if all(one.way == _NONE for one in lessons) else "not known"
    numbers = [one.number(part) or 0 for one in known]
    if len(known) == len(lessons) and not any(numbers):
        return "none"
    most = known[numbers.index(max(numbers))]
    text = f"{_span(numbers)} of {most.origin.get(total)}"
    return text if len(known) == len(lessons) else f"{text}, or not known"


def _span(numbers: Iterable[int | None]) -> str:
    """Return the least and the largest of some numbers in words; nothing where none is known.

    >>> _span([3, 3]), _span([7, None, 3]), _span([None])
    ('3', '3 to 7', '')
    """
    known = sorted({one for one in numbers if one is not None})
    return " to ".join(str(one) for one in dict.fromkeys((known[0], known[-1]))) if known else ""


def _raw(lessons: Sequence[_Lesson]) -> pd.DataFrame:
    """Return one row a run and source, with all names."""
    rows = []
    for one in lessons:
        named = {key: one.origin.get(key) for key in ("cases", "test", "val")}
        rows.append(
            {
                **{"dataset": one.where[0], "network": one.where[1], "method": one.method},
                **{"run": one.run, "way": one.way, "path": one.origin.get("path")},
                **{key: one.number(key) for key in ("epochs", "slices")},
                **{k: None if names is None else " ".join(names) for k, names in named.items()},
            }
        )
    return pd.DataFrame(rows)

"""What is there: every registered regularizer with what it drops, by whom, and its arguments.

``python -m medseg_reg.regularizers`` prints it.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import textwrap
from dataclasses import dataclass

from medseg_reg.regularizers.base import regularizer_class, regularizer_names
from medseg_reg.regularizers.plugins import origin

__all__ = ["Entry", "Parameter", "as_json", "as_table", "describe", "entries", "entry"]


@dataclass(frozen=True)
class Parameter:
    """One argument of a regularizer's constructor.

    Attributes:
        name: its name.
        type: its annotation, as it is written.
        default: its default.
    """

    name: str
    type: str
    default: object


@dataclass(frozen=True)
class Entry:
    """One registered regularizer.

    Attributes:
        name: its name in configurations.
        class_name: its class.
        module: where the class is defined.
        plugin: the distribution that brought it; empty for this package's own.
        summary: the first line of its docstring.
        unit: what it drops.
        paper: authors, venue, year.
        needs: what it needs beside its input; empty for nothing.
        spatial_dims: the numbers of spatial axes it works for.
        stochastic: whether two training passes differ, by default, enough for MC-dropout.
        default_places: where a configuration without places puts it.
        parameters: the arguments of its constructor.
    """

    name: str
    class_name: str
    module: str
    plugin: str
    summary: str
    unit: str
    paper: str
    needs: str
    spatial_dims: tuple[int, ...]
    stochastic: bool
    default_places: tuple[str, ...]
    parameters: tuple[Parameter, ...]


def entry(name: str) -> Entry:
    """The catalogue's entry for a registered name.

    Raises:
        ValueError: unknown name; the message gives the nearest one and lists all.

    Example:
        >>> entry("dropout").unit
        'element'
    """
    cls = regularizer_class(name)
    return Entry(
        name=name,
        class_name=cls.__name__,
        module=cls.__module__,
        plugin=origin(name),
        summary=(inspect.getdoc(cls) or "").partition("\n")[0],
        unit=cls.unit,
        paper=cls.paper,
        needs=cls.needs,
        spatial_dims=tuple(cls.spatial_dims),
        stochastic=cls.stochastic,
        default_places=tuple(cls.default_places),
        parameters=tuple(
            Parameter(
                one.name,
                one.annotation if isinstance(one.annotation, str) else _type_name(one.annotation),
                None if one.default is one.empty else one.default,
            )
            for one in inspect.signature(cls).parameters.values()
        ),
    )


def entries() -> tuple[Entry, ...]:
    """Every registered regularizer, by name."""
    return tuple(entry(name) for name in regularizer_names())


def as_json(found: tuple[Entry, ...]) -> str:
    """Entries as a JSON list; an infinite default becomes text, which JSON has no number for."""
    return json.dumps(_plain([dataclasses.asdict(one) for one in found]), indent=2)


def as_table(found: tuple[Entry, ...], width: int = 100) -> str:
    """Entries as a table: a row of facts each, then class and paper, wrapped at ``width``.

    Example:
        >>> print(as_table((entry("dropout"),)))
        name     axes  random  default places  drops
        dropout  1-3   yes     between_convs   element
            Dropout: Srivastava et al., JMLR 2014
    """
    head = ("name", "axes", "random", "default places", "drops")
    rows = [_row(one) for one in found]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)][:-1]
    lines = []
    for row, one in zip([head, *rows], [None, *found], strict=True):
        facts = "".join(f"{text:{n + 2}}" for text, n in zip(row, widths, strict=False))
        lines += _wrap(row[-1], width, facts, " " * len(facts))
        if one is not None:
            notes = [f"{one.class_name}: {one.paper}"]
            notes += [f"needs {one.needs}"] if one.needs else []
            notes += [f"from the plugin {one.plugin}"] if one.plugin else []
            lines += [line for note in notes for line in _wrap(note, width, " " * 4, " " * 6)]
    return "\n".join(lines)


def _row(one: Entry) -> tuple[str, ...]:
    random = "yes" if one.stochastic else "no"
    return one.name, axes(one), random, ", ".join(one.default_places), one.unit


def _wrap(text: str, width: int, first: str, rest: str) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=rest)


def describe(name: str) -> str:
    """The signature of one regularizer with its defaults, and its docstring.

    Raises:
        ValueError: unknown name; the message gives the nearest one and lists all.
    """
    found = entry(name)
    arguments = "".join(
        f"    {one.name}: {one.type} = {one.default!r},\n" for one in found.parameters
    )
    facts = {
        "name": found.name,
        "import": f"from {_public(found)} import {found.class_name}",
        "drops": found.unit,
        "paper": found.paper,
        "needs": found.needs or "nothing beside its input",
        "axes": axes(found),
        "random": "yes" if found.stochastic else "no (by default): MC-dropout sees one network",
        "places": ", ".join(found.default_places),
        "plugin": found.plugin,
    }
    listed = "\n".join(f"{key:<8}{value}" for key, value in facts.items() if value)
    doc = inspect.getdoc(regularizer_class(name)) or ""
    return f"{found.class_name}(\n{arguments})\n\n{listed}\n\n{doc}"


def axes(found: Entry) -> str:
    """The numbers of spatial axes as a range or a list.

    Example:
        >>> axes(entry("dropout"))
        '1-3'
    """
    dims = sorted(found.spatial_dims)
    if len(dims) > 1 and dims == list(range(dims[0], dims[-1] + 1)):
        return f"{dims[0]}-{dims[-1]}"
    return ", ".join(map(str, dims))


def _public(found: Entry) -> str:
    package = found.module.rpartition(".")[0]
    return package if package == "medseg_reg.regularizers" else found.module


def _type_name(annotation: object) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _plain(value: object) -> object:
    """Lists, mappings and numbers that JSON knows; everything else as text."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)

"""Methods of a study that differ in one number of their regularization, such as k."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from medseg_reg.study.report.source import Pair, Source

LEAST = 3
# From this ratio of the highest to the lowest number on, an even axis would crowd the low ones.
WIDE = 20


@dataclass(frozen=True)
class Sweep:
    """Methods that are the same but for one number.

    Attributes:
        key: below `regularization`, as `architecture.0.k`.
        label: what a reader calls it, as "k of heuristic_dropout".
        values: method -> number, in rising order.
    """

    key: str
    label: str
    values: dict[str, float]

    @property
    def logarithmic(self) -> bool:
        """Whether the numbers are drawn by their logarithm: above 0, and over a factor of `WIDE`.

        >>> Sweep("k", "k", {"a": 0.1, "b": 1, "c": 2}).logarithmic
        True
        >>> Sweep("k", "k", {"a": 0, "b": 1, "c": 100}).logarithmic
        False
        """
        low, high = min(self.values.values()), max(self.values.values())
        # Rounded: 0.3 / 0.015 is a little below 20.
        return low > 0 and round(high / low, 9) >= WIDE


def find_sweeps(source: Source, pair: Pair) -> list[Sweep]:
    """Return all sets of three or more methods that differ in one number alone."""
    flat: dict[str, dict[str, Any]] = {}
    runs = source.runs
    chosen = runs[(runs["dataset"] == pair[0]) & (runs["network"] == pair[1])]
    for method, rows in chosen.groupby("method", sort=False):
        config = source.file(str(rows["run"].iloc[0]), "config.yaml")
        if isinstance(config, dict) and config.get("regularization"):
            flat[str(method)] = flatten(config["regularization"])
    found: list[Sweep] = []
    keys = sorted({k for one in flat.values() for k, v in one.items() if _is_number(v)})
    for key in keys:
        alike: dict[str, dict[str, float]] = {}
        for method, settings in flat.items():
            if _is_number(settings.get(key)):
                rest = repr(sorted((k, repr(v)) for k, v in settings.items() if k != key))
                alike.setdefault(rest, {})[method] = float(settings[key])
        for values in alike.values():
            if len(values) >= LEAST and len(set(values.values())) == len(values):
                rising = dict(sorted(values.items(), key=lambda item: item[1]))
                found.append(Sweep(key, _label(key, flat[next(iter(rising))]), rising))
    return found


def flatten(content: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings and lists by their dotted keys.

    >>> flatten({"architecture": [{"name": "dropout", "p": 0.1}]})
    {'architecture.0.name': 'dropout', 'architecture.0.p': 0.1}
    """
    if isinstance(content, dict):
        items = list(content.items())
    elif isinstance(content, list):
        items = list(enumerate(content))
    else:
        return {prefix: content}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _label(key: str, settings: dict[str, Any]) -> str:
    group, _, last = key.rpartition(".")
    name = settings.get(f"{group}.name")
    return f"{last} of {name}" if name else key


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

"""What was put where."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Placement:
    """One regularizer in its place.

    Attributes:
        place: the name of the place.
        path: the module's path in the network.
        regularizer: the class.
        p: the requested rate.
        map_size: channels and spatial size of the map that it gets; None before `measure`.
        measured_rate: the share really dropped (mean over draws); None before `measure`.
        attention_dropped: of layers that attention guides, the share of the attention that what
            they dropped had got (mean over draws); None for others.
    """

    place: str
    path: str
    regularizer: str
    p: float
    map_size: tuple[int, ...] | None = None
    measured_rate: float | None = None
    attention_dropped: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain types, for JSON; without the attention where none guides."""
        plain = asdict(self)
        if self.attention_dropped is None:
            del plain["attention_dropped"]
        return plain


class PlacementReport(list[Placement]):
    """A list of `Placement` that prints as a table.

    Attributes:
        note: what could not be checked; empty for nothing.

    >>> print(PlacementReport([Placement("head", "final.regularizer", "Dropout", 0.5)]))
    place  regularizer  p    map  measured rate  module
    head   Dropout      0.5                      final.regularizer
    """

    note: str = ""

    def __str__(self) -> str:
        """Return an aligned table with one line for each layer, and the note."""
        guided = any(one.attention_dropped is not None for one in self)
        titles = ["measured rate", *(["attention dropped"] if guided else [])]
        rows = [("place", "regularizer", "p", "map", *titles, "module")]
        for one in self:
            size = "x".join(map(str, one.map_size or ()))
            shares = (one.measured_rate, one.attention_dropped)[: len(titles)]
            shown = ["" if share is None else f"{share:.3f}" for share in shares]
            rows.append((one.place, one.regularizer, f"{one.p:g}", size, *shown, one.path))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, *([self.note] if self.note else [])])

    def as_dicts(self) -> list[dict[str, Any]]:
        """Return plain types."""
        return [placement.as_dict() for placement in self]

    def to_json(self) -> str:
        """Return the placements as a JSON list, as in a run's `placement.json`."""
        return json.dumps(self.as_dicts(), indent=2)

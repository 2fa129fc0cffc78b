"""Methods that stand for several: one for each combination of values of their parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any


def expand_methods(methods: Mapping[str, Any]) -> dict[str, Any]:
    """Return methods as they are written, those with a `grid` replaced by their combinations.

    A grid has a list of values for each of some keys of a layer, such as its `p`. A combination
    is laid over every layer of the method, and named by the method and its values.

    Args:
        methods: by name, as in the file of a study.

    Raises:
        ValueError: a grid has no lists or no layers, or two methods would have one name.

    Example:
        >>> layers = [{"name": "heuristic_dropout"}]
        >>> method = {"architecture": layers, "grid": {"p": [0.1], "k": [1, 2]}}
        >>> found = expand_methods({"hd": method})
        >>> list(found), found["hd-p0.1-k2"]["architecture"]
        (['hd-p0.1-k1', 'hd-p0.1-k2'], [{'name': 'heuristic_dropout', 'p': 0.1, 'k': 2}])
    """
    found: dict[str, Any] = {}
    for name, method in methods.items():
        several = isinstance(method, Mapping) and "grid" in method
        for one, content in _combinations(name, method) if several else [(name, method)]:
            if one in found:
                raise ValueError(f"two methods have the name '{one}'; leave one of them out")
            found[one] = content
    return found


def _combinations(name: str, method: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    grid, others = method["grid"], {key: v for key, v in method.items() if key != "grid"}
    if not isinstance(grid, Mapping) or not grid:
        raise ValueError(f"{name}.grid: give lists of values by their keys, as {{p: [0.1, 0.2]}}")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{name}.grid.{key}: give a list of values, not {values!r}")
        if any(isinstance(value, list | dict) or value is None for value in values):
            raise ValueError(f"{name}.grid.{key}: values are numbers, words, true or false")
    layers = others.get("architecture")
    if not isinstance(layers, list) or not layers:
        raise ValueError(f"{name}.grid: there is no layer in {name}.architecture to set it in")
    for layer in layers:
        if twice := [key for key in grid if isinstance(layer, Mapping) and key in layer]:
            raise ValueError(f"{name}: '{twice[0]}' stands in a layer and in the grid; keep one")
    for values in product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        label = "-".join([name, *(f"{key}{_word(value)}" for key, value in chosen.items())])
        yield label, {**others, "architecture": [{**layer, **chosen} for layer in layers]}


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

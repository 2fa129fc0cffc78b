"""Putting regularizers into any network, without touching its code, and taking them out again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from medseg_reg.errors import MedsegError
from medseg_reg.insertion.check import check_reached, check_suited, check_training
from medseg_reg.insertion.graph import record
from medseg_reg.insertion.hooks import hang, hooks_of, take
from medseg_reg.insertion.kinds import own_patch_dropout
from medseg_reg.insertion.placement import measure
from medseg_reg.insertion.places import Place, find_places, path_places
from medseg_reg.insertion.report import Placement, PlacementReport
from medseg_reg.insertion.running import Example
from medseg_reg.insertion.selection import choose
from medseg_reg.insertion.sequence import check_alone
from medseg_reg.insertion.slots import Slot
from medseg_reg.regularizers import Regularizer, build, regularizer_class, regularizer_names

_PATH = "path:"


def insert(
    model: nn.Module,
    regularizer: str | Regularizer | type[Regularizer],
    places: str | Sequence[str] | None = None,
    *,
    example: Example,
    **parameters: Any,
) -> PlacementReport:
    """Put a regularizer into every place of a network that is named.

    The network keeps its class, its code and the keys of its state_dict; in evaluation mode it
    computes the same numbers. Several calls add up: at one place, later layers come behind.

    Args:
        model: any network; one of this package's own has explicit slots, which are used.
        regularizer: a name, a class, or a ready layer, of which every place gets a copy.
        places: names or patterns, see `selection.choose`, such as "between_convs",
            "encoder.*.after_block", "skip"; or "path:GLOB", behind each module whose path
            matches. Default: what the regularizer's class says.
        example: an input (B, C, *spatial), or a tuple or dictionary of arguments. A batch of one
            is enough; use a size that you train with.
        parameters: of the regularizer, as p.

    Returns:
        One line for each layer: place, module path, class, p, map size, and the share that it
        really dropped while it ran on the example.

    Raises:
        MedsegError: no such regularizer, parameter or place; the network does not run with the
            example; or a layer was not reached by it. The network is unchanged then.

    >>> import torch
    >>> network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
    >>> print(insert(network, "dropout", "path:1", example=torch.ones(1, 1, 8, 8), p=0.0))
    place   regularizer  p  map    measured rate  module
    path:1  Dropout      0  8x6x6  0.000          1.regularizer
    """
    make, owner, default = _factory(regularizer, parameters)
    patterns = list(default if places is None else [places] if isinstance(places, str) else places)
    found = _chosen(model, example, patterns, owner)
    layers = [make() for _ in found]
    for where, layer in zip(found, layers, strict=True):
        check_suited(model, layer, where, owner)
        check_alone(model, where, owner)
        layer.prefix_tokens = where.prefix if hasattr(layer, "prefix_tokens") else 0
        if where.windows:
            layer.window = where.windows[0].side
    return _filled(model, example, found, layers, owner)


def _filled(
    model: nn.Module,
    example: Example,
    found: Sequence[Place],
    layers: Sequence[Regularizer],
    owner: str,
) -> PlacementReport:
    """Put layers into places, check that they are reached, and measure; or leave all as it was."""
    report = PlacementReport()
    try:
        for where, layer in zip(found, layers, strict=True):
            report.append(hang(model, where, layer))
        check_reached(model, example, report, found)
        measure(model, example, report)
        notes = [*_notes(found), *check_training(model, example, report, found)]
        if said := own_patch_dropout(model):
            notes.append(f"the network: {said}.")
        report.note = "\n".join(notes)
    except BaseException as error:
        for placement in reversed(report):
            take(model, placement.path)
        if any(where.chain for where in found) and isinstance(error, RuntimeError):
            text = " ".join(str(error).split())[:200]
            raise MedsegError(
                f"{owner}: the network does not run on a part of its tokens ({text}). Its blocks "
                "need the whole grid, as for relative positions. Use drop_key."
            ) from error
        raise
    return report


def _notes(places: Sequence[Place]) -> list[str]:
    """Return what is odd at places, each once with the place where it is met first."""
    met: dict[str, list[str]] = {}
    for place in places:
        if place.note:
            met.setdefault(place.note, []).append(place.name)
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {note}."
        for note, names in met.items()
    ]


def remove(
    model: nn.Module,
    regularizer: str | None = None,
    places: str | Sequence[str] | None = None,
) -> PlacementReport:
    """Take inserted regularizers out of a network, which is then as it was before.

    Args:
        model: the network, or a copy of it.
        regularizer: only those of this name or class; default: all.
        places: only those at these places, named as for `insert`; default: everywhere.

    Returns:
        What was taken out.

    Raises:
        MedsegError: a regularizer or places are given and nothing matches.
    """
    present = inserted(model)
    chosen = list(present)
    if regularizer is not None:
        known = regularizer in regularizer_names()
        cls = regularizer_class(regularizer).__name__ if known else regularizer
        chosen = [one for one in chosen if one.regularizer == cls]
        if not chosen:
            names = ", ".join(sorted({one.regularizer for one in present})) or "none"
            raise MedsegError(f"remove: no '{regularizer}' was inserted. Inserted: {names}.")
    if places is not None:
        patterns = [places] if isinstance(places, str) else list(places)
        kept = set(choose([one.place for one in chosen], patterns, "remove"))
        chosen = [one for one in chosen if one.place in kept]
    for placement in reversed(chosen):  # a slot renumbers what comes behind
        take(model, placement.path)
    return PlacementReport(chosen)


def inserted(model: nn.Module) -> PlacementReport:
    """Return the regularizers that `insert` put into a network, without sizes and rates."""
    report = PlacementReport()
    for path, module in model.named_modules():
        if isinstance(module, Slot):
            found = [(name, path) for name in module._modules]
        else:
            found = [(hook.child, hook.place) for hook in hooks_of(module)]
        for child, where in found:
            layer = module.get_submodule(child)
            if isinstance(layer, Regularizer):
                inside = f"{path}.{child}" if path else child
                report.append(Placement(where, inside, type(layer).__name__, float(layer.p)))
    return report


def _factory(
    regularizer: str | Regularizer | type[Regularizer], parameters: dict[str, Any]
) -> tuple[Callable[[], Regularizer], str, Sequence[str]]:
    """Return what makes a layer, how to call it in messages, and its default places."""
    if isinstance(regularizer, Regularizer):
        owner = f"regularizer {type(regularizer).__name__}"
        if parameters:
            raise MedsegError(
                f"{owner}: a ready layer has its parameters; {', '.join(parameters)} were given "
                "as well. Pass its class or its name with parameters, or the layer alone."
            )
        ready = regularizer
        return (lambda: copy.deepcopy(ready)), owner, regularizer.default_places
    if isinstance(regularizer, str):
        owner, named = f"regularizer '{regularizer}'", regularizer
        make: Callable[[], Regularizer] = lambda: build(named, **parameters)  # noqa: E731
    elif isinstance(regularizer, type) and issubclass(regularizer, Regularizer):
        owner, cls = f"regularizer {regularizer.__name__}", regularizer
        make = lambda: cls(**parameters)  # noqa: E731
    else:
        raise MedsegError(
            f"insert: expected the name of a regularizer, or a Regularizer; got {regularizer!r}. "
            "A layer of your own becomes one by subclassing medseg_reg.regularizers.Regularizer."
        )
    try:
        return make, owner, make().default_places
    except (ValueError, TypeError) as error:
        raise MedsegError(f"{owner}: {error}") from None


def _chosen(model: nn.Module, example: Example, patterns: Sequence[str], owner: str) -> list[Place]:
    """Return the places that patterns name, found in the network."""
    globs = [one.removeprefix(_PATH) for one in patterns if one.startswith(_PATH)]
    names = [one for one in patterns if not one.startswith(_PATH)]
    found: list[Place] = []
    if names or not globs:
        known = find_places(model, example)
        chosen = set(choose([place.name for place in known], names, owner))
        found += [place for place in known if place.name in chosen]
    if globs:
        found += path_places(record(model, example), globs, owner)
    return found

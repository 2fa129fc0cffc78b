"""Putting regularizers into the slots of a network, and measuring what they really do there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from medseg_reg.errors import MedsegError, nearest
from medseg_reg.insertion.slots import slots
from medseg_reg.regularizers import Regularizer, build


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
    """

    place: str
    path: str
    regularizer: str
    p: float
    map_size: tuple[int, ...] | None = None
    measured_rate: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain types, for JSON."""
        return asdict(self)


def place(
    network: nn.Module, name: str, places: Sequence[str], parameters: Mapping[str, Any]
) -> list[Placement]:
    """Put one regularizer into every place that a pattern names.

    A pattern is the name of a place (`encoder.2.between_convs`), its last part
    (`between_convs`, all of them), a shell pattern (`encoder.*.after_block`), or the name of a
    part of the network: of a block (`encoder.2`, `bottleneck`), which is its `after_block`, or of
    several (`encoder`: the `after_block` of each; `skip`: every skip connection). A number alone
    names nothing.

    Raises:
        MedsegError: no places are given, a pattern matches none, or the regularizer or a
            parameter is wrong.
            The network is unchanged then.
    """
    known = slots(network)
    if not places:
        raise MedsegError(f"regularizer '{name}': no places are given. Name at least one.")
    chosen: dict[str, None] = {}
    for pattern in places:
        found = _named(known, pattern)
        if not found:
            short = sorted({_short(place) for place in known})
            parts = {place.rsplit(".", n)[0] for place in known for n in (1, 2)}
            raise MedsegError(
                f"regularizer '{name}': no place matches '{pattern}'."
                f"{nearest(pattern, [*short, *sorted(parts), *known])} Places: {', '.join(short)}; "
                f"in full, for example, {', '.join(list(known)[:4])}."
            )
        chosen.update(dict.fromkeys(found))
    try:
        layers = {place: build(name, **parameters) for place in chosen}
    except (ValueError, TypeError) as error:
        raise MedsegError(f"regularizer '{name}': {error}") from None
    placements = []
    for where, layer in layers.items():
        slot = known[where]
        path = f"{where}.{len(slot)}"
        slot.append(layer)
        placements.append(Placement(where, path, type(layer).__name__, float(layer.p)))
    return placements


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """Seed the generators that a network on `device` draws from, for one block."""
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        # torch.manual_seed would seed every GPU, and only those forked get their state back.
        torch.default_generator.manual_seed(0)
        for index in devices:
            torch.cuda.default_generators[index].manual_seed(0)
        yield


def _named(known: Iterable[str], pattern: str) -> list[str]:
    """Return the places that a pattern names; see `place`."""
    found = [place for place in known if fnmatchcase(place, pattern) or _short(place) == pattern]
    if found:
        return found
    inside = [place for place in known if place.startswith(f"{pattern}.")]
    # "At a block" is read as on its output; a part that has no blocks is taken whole.
    return [place for place in inside if _short(place) == "after_block"] or inside


def _short(place: str) -> str:
    """Return the last part of a name; of a numbered place (`skip.0`) what is numbered."""
    rest, _, last = place.rpartition(".")
    return rest if last.isdigit() and rest else last


def measure(
    network: nn.Module, example: torch.Tensor, placements: Sequence[Placement], draws: int = 8
) -> None:
    """Run an example through the network and note map size and realised rate of each place.

    The network's weights, statistics, modes and torch's random state are as before.

    Args:
        network: the network.
        example: an input (B, C, *spatial).
        placements: filled in.
        draws: forward passes over which the rate is averaged.
    """
    modes = {module: module.training for module in network.modules()}
    rates: dict[str, list[float]] = {placement.path: [] for placement in placements}
    sizes: dict[str, tuple[int, ...]] = {}

    def watch(path: str) -> Any:
        def hook(
            layer: Regularizer, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
        ) -> None:
            sizes[path] = tuple(inputs[0].shape[1:])
            rates[path].append(layer.measured_rate(inputs[0], output))

        return hook

    hooks = []
    try:
        network.eval()
        for placement in placements:
            layer = network.get_submodule(placement.path)
            layer.train()
            hooks.append(layer.register_forward_hook(watch(placement.path)))
        with torch.no_grad(), _seeded(example.device):
            for _ in range(draws):
                network(example)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    for placement in placements:
        if not rates[placement.path]:
            raise MedsegError(
                f"regularizer {placement.regularizer} at '{placement.place}' was never reached: "
                "the network does not use this place."
            )
        placement.map_size = sizes[placement.path]
        placement.measured_rate = sum(rates[placement.path]) / len(rates[placement.path])

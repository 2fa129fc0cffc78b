"""Regularizers in the slots of a network, and what they really do there."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from medseg_reg.errors import MedsegError
from medseg_reg.insertion.report import Placement
from medseg_reg.insertion.running import Example, arguments, device_of, quietly
from medseg_reg.insertion.selection import choose, kind_of
from medseg_reg.insertion.slots import Slot, slots
from medseg_reg.regularizers import Regularizer, build
from medseg_reg.regularizers.guidance import GuidedDropout


def place(
    network: nn.Module, name: str, places: Sequence[str], parameters: Mapping[str, Any]
) -> list[Placement]:
    """Put one regularizer into every slot that a pattern names; see `selection.choose`.

    Raises:
        MedsegError: no places are given, a pattern matches none, or the regularizer or a
            parameter is wrong.
            The network is unchanged then.
    """
    known = slots(network)
    owner = f"regularizer '{name}'"
    chosen = choose(list(known), places, owner)
    try:
        layers = {place: build(name, **parameters) for place in chosen}
    except (ValueError, TypeError) as error:
        raise MedsegError(f"{owner}: {error}") from None
    for where, layer in layers.items():
        check_kind(layer, where, owner)
    return [fill(known[where], where, layer) for where, layer in layers.items()]


def check_kind(layer: Regularizer, where: str, owner: str) -> None:
    """See whether a layer is for places of a kind.

    Raises:
        MedsegError: it is for others.
    """
    wanted = layer.place_kinds
    if wanted and kind_of(where) not in wanted:
        raise MedsegError(
            f"{owner}: it is for places of the kind {' or '.join(wanted)}; '{where}' is none."
        )


def fill(slot: Slot, where: str, layer: Regularizer) -> Placement:
    """Put a layer behind those that are in a slot already."""
    path = f"{where}.{len(slot)}"
    slot.append(layer)
    return Placement(where, path, type(layer).__name__, float(layer.p))


def measure(
    network: nn.Module, example: Example, placements: Sequence[Placement], draws: int = 8
) -> None:
    """Run an example through the network and note map size and realised rate of each place.

    Of a layer that attention guides, also the share of the attention that it dropped. The
    network's weights, statistics, modes and torch's random state are as before.

    Args:
        network: the network.
        example: an input (B, C, *spatial), or a tuple or dictionary of arguments.
        placements: filled in.
        draws: forward passes over which the rate is averaged.

    Raises:
        MedsegError: a layer was never called.
    """
    args, kwargs = arguments(example)
    rates: dict[str, list[float]] = {placement.path: [] for placement in placements}
    attention: dict[str, list[float]] = {placement.path: [] for placement in placements}
    sizes: dict[str, tuple[int, ...]] = {}

    def watch(path: str) -> Any:
        def hook(
            layer: Regularizer, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
        ) -> None:
            sizes[path] = tuple(inputs[0].shape[1:])
            rates[path].append(layer.measured_rate(inputs[0], output))
            if isinstance(layer, GuidedDropout):
                attention[path].append(layer.attention_dropped(inputs[0], output))

        return hook

    hooks = []
    try:
        with quietly(network, device_of(example)):
            for placement in placements:
                layer = network.get_submodule(placement.path)
                layer.train()
                hooks.append(layer.register_forward_hook(watch(placement.path)))
            for _ in range(draws):
                network(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    for placement in placements:
        if not rates[placement.path]:
            raise MedsegError(
                f"regularizer {placement.regularizer} at '{placement.place}' was never reached: "
                "the network does not use this place."
            )
        placement.map_size = sizes[placement.path]
        placement.measured_rate = statistics.fmean(rates[placement.path])
        if shares := attention[placement.path]:
            placement.attention_dropped = statistics.fmean(shares)

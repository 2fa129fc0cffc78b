"""Explicit places for regularizers in a network."""

from __future__ import annotations

from torch import nn


class Slot(nn.Sequential):
    """A place where regularizers can be put; the identity while it is empty.

    Regularizers have no parameters, so a network's state_dict has the same keys whether its
    slots are filled or not. The place is named by the path of the module in the network, as in
    `encoder.2.between_convs`.
    """


class PartSlot(Slot):
    """A slot of a part that was built into a network, which may be of another package.

    The other places of such a network are found by following an example through it.
    """


def slots(network: nn.Module) -> dict[str, Slot]:
    """Return the slots of a network by the names of their places."""
    return {name: module for name, module in network.named_modules() if isinstance(module, Slot)}


def has_own_slots(network: nn.Module) -> bool:
    """Return whether a network has a slot at every place, so that none need be looked for."""
    return any(not isinstance(slot, PartSlot) for slot in slots(network).values())

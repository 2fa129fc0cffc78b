"""The rates of regularizers: over the training, and over the depth of the network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from medseg_reg.config_regularization import DepthRampSpec, LayerSpec, RateScheduleSpec
from medseg_reg.errors import MedsegError
from medseg_reg.insertion import Placement
from medseg_reg.networks.shapes import run_on_shape


def rate_factor(spec: RateScheduleSpec, t: float) -> float:
    """Return the factor on the rate of a layer.

    With t the optimizer steps done over the optimizer steps of the whole training, d =
    `duration`, s = `start`, c = `turn` and u = min(t / d, 1):

        constant   1
        linear     s + (1 - s) u                    (DropBlock, Ghiasi et al., NeurIPS 2018)
        cosine     s + (1 - s) (1 - cos(pi u)) / 2
        v_shape    1 - t / c before t = c, (t - c) / (1 - c) from there on
                                                    (Scheduled DropHead, Zhou et al., 2020)

    It depends on t alone, so all batches of a step, all passes over a batch and all processes
    see the same rate, and a resumed run goes on with the right one.

    >>> [rate_factor(RateScheduleSpec(name="v_shape", turn=0.5), t) for t in (0, 0.25, 0.5, 1)]
    [1.0, 0.5, 0.0, 1.0]
    """
    if spec.name == "v_shape":
        left, right = t / spec.turn, (t - spec.turn) / (1 - spec.turn)
        return 1 - left if t < spec.turn else min(right, 1.0)
    if spec.name == "constant":
        return 1.0
    rise = min(t / spec.duration, 1.0)
    if spec.name == "cosine":
        rise = (1 - math.cos(math.pi * rise)) / 2
    # Never above 1, which rounding may reach: a rate must stay below 1.
    return min(spec.start + (1 - spec.start) * rise, 1.0)


@dataclass(frozen=True, eq=False)
class PlacedEntry:
    """One entry of `regularization.architecture`, in its places.

    Attributes:
        number: its place in the list.
        spec: the entry.
        p: the rate asked for, before the ramp over the places.
        placements: where its layers are; their `p` is the rate at the end of the schedule.
    """

    number: int
    spec: LayerSpec
    p: float
    placements: tuple[Placement, ...]

    @property
    def key(self) -> str:
        """The key of the rate in the configuration."""
        return f"regularization.architecture.{self.number}.p"

    def description(self) -> dict[str, Any]:
        """Return all that decides its rates, as plain types."""
        return {
            "name": self.spec.name,
            "schedule": self.spec.schedule.model_dump(mode="json"),
            "rates": {placement.path: placement.p for placement in self.placements},
        }


def apply_depth_ramp(
    network: nn.Module, placements: Sequence[Placement], ramp: DepthRampSpec, size: Sequence[int]
) -> None:
    """Give each layer of one entry its own rate, rising evenly in the order of the data flow.

    The layer at place i of n gets p * (first + (last - first) * i / (n - 1)).

    Args:
        network: the network with the layers in their places.
        placements: the places of the entry; their `p` is changed too.
        ramp: the factors at the first and at the last place.
        size: an input (B, C, *spatial) that the network takes.

    Raises:
        MedsegError: there is one place only, or a place is not used by the network.
    """
    if len(placements) < 2:
        raise MedsegError(
            f"depth_ramp: {placements[0].regularizer} has one place, '{placements[0].place}', and "
            "a ramp needs two. Name more places, or leave depth_ramp out."
        )
    rise = (ramp.last - ramp.first) / (len(placements) - 1)
    for index, placement in enumerate(in_order_of_flow(network, placements, size)):
        placement.p *= ramp.first + rise * index
        network.get_submodule(placement.path).p = placement.p  # type: ignore[assignment]


def in_order_of_flow(
    network: nn.Module, placements: Sequence[Placement], size: Sequence[int]
) -> list[Placement]:
    """Return placements in the order in which an input (B, C, *spatial) comes by.

    The input runs through as a shape without values, so it costs no time at any size.
    """
    met: dict[str, None] = {}
    hooks = [
        network.get_submodule(placement.path).register_forward_pre_hook(
            lambda *_, path=placement.path: met.setdefault(path)
        )
        for placement in placements
    ]
    try:
        run_on_shape(network, size, values=True)
    finally:
        for hook in hooks:
            hook.remove()
    for placement in placements:
        if placement.path not in met:
            raise MedsegError(
                f"regularizer {placement.regularizer} at '{placement.place}' was never reached: "
                "the network does not use this place."
            )
    order = list(met)
    return sorted(placements, key=lambda placement: order.index(placement.path))

"""Running a network on shapes without values, which costs no time at any size."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from medseg_reg.regularizers import Regularizer


def run_on_shape(
    network: nn.Module, shape: Sequence[int], *, training: bool = False, values: bool = False
) -> Any:
    """Return what a network makes of an input of this shape, without values.

    Weights, statistics, modes and torch's random state stay as they are. Regularizers are left
    in evaluation mode.

    Args:
        network: any network.
        shape: of the input (B, C, *spatial).
        training: whether the network is in training mode.
        values: whether it is tried once more with a real input if it fails: some code computes
            with values on the way, which shapes do not have.

    Raises:
        Exception: what the network raises for this shape.
    """
    with _mode(network, training), torch.no_grad():
        shapes = {name: value.to("meta") for name, value in _state(network)}
        image = torch.empty(*shape, device="meta")
        try:
            # Tied weights are in the dictionary; tying them here would put a module that has two
            # names back with the shapes in place of its weights.
            return functional_call(network, shapes, (image,), tie_weights=False)
        except Exception:
            if not values:
                raise
            twin, device = copy.deepcopy(network), next(network.parameters()).device
            with torch.random.fork_rng(devices=[]):
                return twin(torch.zeros(*shape, device=device))


@contextmanager
def _mode(network: nn.Module, training: bool) -> Iterator[None]:
    modes = {module: module.training for module in network.modules()}
    for module in network.modules():
        module.training = training and not isinstance(module, Regularizer)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _state(
    module: nn.Module, path: str = "", met: set[nn.Module] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights and statistics of every module, each module once.

    Of children, not of `named_modules`, which leaves out a coarse network that is taken along.
    """
    met = set() if met is None else met
    if module in met:
        return
    met.add(module)
    for name, value in (*module._parameters.items(), *module._buffers.items()):
        if value is not None:
            yield f"{path}{name}", value
    for name, child in module.named_children():
        yield from _state(child, f"{path}{name}.", met)

"""The training pass of a network, compiled by torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from medseg_reg.engine.layer_memory import layers_of
from medseg_reg.errors import MedsegError


def compiled_pass(network: nn.Module) -> Callable[[torch.Tensor], Any]:
    """Return a function that does what `network` does, compiled at its first call.

    The network keeps its weights and their names, so checkpoints stay as they are; validation
    goes on without compiling, because there each size of a batch would be compiled anew. Layers of
    this package are left out: rates that change would compile them again and again, and what they
    draw must be the same in a resumed run.

    Args:
        network: the network with its layers, in training mode when the function is called.
    """
    for layer in layers_of(network).values():
        layer.forward = torch.compiler.disable(layer.forward)  # type: ignore[method-assign]

    def forward(image: torch.Tensor) -> Any:
        return network(image)

    return torch.compile(forward, dynamic=False)


@contextmanager
def told_in_a_line() -> Iterator[None]:
    """Turn what goes wrong while torch compiles into a message.

    Raises:
        MedsegError: the network cannot be compiled here, as without a C++ compiler.
    """
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        first = " ".join(str(error).split())[:160]
        raise MedsegError(
            f"training.compile: torch cannot compile this network here ({first}). Set "
            "training.compile=false; on a CPU torch.compile needs a C++ compiler."
        ) from None

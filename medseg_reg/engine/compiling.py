"""The training pass of a network, compiled by torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from medseg_reg.engine.layer_memory import layers_of
from medseg_reg.errors import MedsegError


def require_compilable(wanted: bool | str, accelerator: str) -> None:
    """Refuse a way of compiling that the accelerator does not have.

    Args:
        wanted: `training.compile`: True, False, `reduce-overhead` or `max-autotune`.
        accelerator: `cpu`, `cuda` or `mps`.

    Raises:
        MedsegError: `reduce-overhead`, which is CUDA graphs, without a CUDA device.
    """
    if wanted == "reduce-overhead" and accelerator != "cuda":
        raise MedsegError(
            f"training.compile 'reduce-overhead': it replays CUDA graphs, which a {accelerator} "
            "does not have. Use true, 'max-autotune' or false."
        )


def compiled_pass(
    network: nn.Module, wanted: bool | str = True, accelerator: str = "cpu"
) -> Callable[[torch.Tensor], Any]:
    """Return a function that does what `network` does, compiled at its first call.

    The network keeps its weights and their names, so checkpoints stay as they are; validation
    goes on without compiling, because there each size of a batch would be compiled anew. Layers of
    this package are left out: rates that change would compile them again and again, and what they
    draw must be the same in a resumed run.

    Args:
        network: the network with its layers, in training mode when the function is called.
        wanted: True, or a mode of torch.compile: `reduce-overhead`, which replays the kernels
            between two layers as a CUDA graph, or `max-autotune`, which does that too and tries
            several kernels for each product.
        accelerator: `cpu`, `cuda` or `mps`.
    """
    for layer in layers_of(network).values():
        layer.forward = torch.compiler.disable(layer.forward)  # type: ignore[method-assign]

    def forward(image: torch.Tensor) -> Any:
        return network(image)

    mode = wanted if isinstance(wanted, str) else None
    compiled: Callable[[torch.Tensor], Any] = torch.compile(forward, dynamic=False, mode=mode)
    if mode is None or accelerator != "cuda":
        return compiled

    def replayed(image: torch.Tensor) -> Any:
        # The outputs of a graph live in its memory until it is replayed. Where a step begins is
        # told, or torch takes what is still referred to for a step that goes on.
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(image)

    return replayed


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

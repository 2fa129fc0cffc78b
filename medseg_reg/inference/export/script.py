"""The network as TorchScript: traced inside, scripted where sizes matter.

torch 2.9 and later call TorchScript deprecated; it is still what MONAI's tools load without the
code of a network.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medseg_reg.data.preprocessing import ImageSpec
from medseg_reg.inference.export.plan import Plan, Shape, images
from medseg_reg.inference.export.program import METADATA
from medseg_reg.inference.export.scripted import AnySize, Joined, OneSize, WholeSlices
from medseg_reg.networks.build import Network
from medseg_reg.networks.reuse import coarse_of


def script_of(network: Network, plan: Plan) -> torch.jit.ScriptModule:
    """Return a network as TorchScript that takes any batch, and any size where the plan says so."""
    coarse = coarse_of(network)
    if coarse is None or not plan.dynamic:
        return _script_of(network, plan, plan.example)
    # Each by itself: they pad images of other sizes differently.
    batch, channels, rows, columns = plan.example
    inner: Any = coarse.network
    example = (batch, channels, *(coarse.size or (rows, columns)))
    first = script_of(inner, replace(plan, dynamic=coarse.size is None, example=example))
    whole = _script_of(network, plan, (batch, channels + coarse.channels, rows, columns))
    joined = Joined(first, whole, coarse.size, coarse.fit, coarse.what == "logits")
    with without_warnings():
        return torch.jit.script(joined.eval())


def _script_of(network: Network, plan: Plan, shape: Shape) -> torch.jit.ScriptModule:
    if plan.dynamic:
        rows, columns = (-(-n // network.factor) * network.factor for n in shape[2:])
        shape = (*shape[:2], rows, columns)
    with without_warnings(), torch.no_grad():
        traced = torch.jit.trace(network, images(shape, 0), check_trace=False)
        if plan.dynamic:
            whole = AnySize(traced, network.factor, network.two_at_least)
            return torch.jit.script(whole.eval())
        return torch.jit.script(OneSize(traced, *shape[2:]).eval())


def whole_slices(network: nn.Module, spec: ImageSpec) -> torch.jit.ScriptModule:
    """Return TorchScript that takes slices of their own size, around one that gives logits."""
    with without_warnings():
        return torch.jit.script(WholeSlices(network, spec).eval())


def write_script(module: torch.jit.ScriptModule, path: Path, metadata: str) -> None:
    """Write TorchScript with its metadata into one file."""
    with without_warnings():
        torch.jit.save(module, path, _extra_files={METADATA: metadata})


def open_script(path: Path) -> Callable[[Tensor], Tensor]:
    """Return the TorchScript of a file as a function."""
    with without_warnings():
        module = torch.jit.load(path, map_location="cpu")
    return lambda x: module(x)


@contextmanager
def without_warnings() -> Iterator[None]:
    """Silence that TorchScript is deprecated, and that a trace keeps numbers of the example.

    That it keeps none that matters is proved by comparing other sizes.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*torch\.jit\.\w+` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", r".*torch\.jit\.\w+` is deprecated", DeprecationWarning)
        # Documented, but not listed among the names of torch.jit.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        yield

"""Operators for Heuristic Dropout that run Triton kernels on a GPU, and plain rules elsewhere.

They are custom operators of torch: to ``torch.compile`` each is one node with a known shape and a
known derivative, so a compiled network with the layer stays one graph. Triton is imported when a
map on a GPU first comes by. Before a kernel is used in a process, it is compared with the plain
rule on a small example; where it does not compile or gives another result, a warning says so, and
the plain rules are used.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["filter_planes", "fits", "sum_levels"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The kernel compares each value with all thresholds, in registers.
MOST_LEVELS = 32
# AMD's GPUs pass for CUDA devices too; nothing was tested there.
_HERE = importlib.util.find_spec("triton") is not None and torch.version.hip is None


def fits(x: Tensor, levels: int = 0) -> bool:
    """Whether a map is one for the kernels: on a CUDA device, of a type and size they take.

    Example:
        >>> import torch
        >>> fits(torch.ones(1, 2, 3))
        False
    """
    return (
        _HERE
        and x.is_cuda
        and x.dtype in _DTYPES
        and levels <= MOST_LEVELS
        and 0 < x.numel() < 2**31
    )


@torch.library.custom_op(
    "medseg_reg::sum_levels", mutates_args=(), schema="(Tensor x, float[] thresholds) -> Tensor"
)
def sum_levels(x: Tensor, thresholds: Sequence[float]) -> Tensor:
    """`histogram.level_sums` as an operator.

    Shapes:
        x (B, C, *spatial); the result (B, C, 1 + len(thresholds)), float32.
    """
    if fits(x, len(thresholds)) and _sound("sum_levels", x.device):
        with torch.cuda.device(x.get_device()):
            sums: Tensor = _kernels().sum_levels(x, tuple(thresholds))
        return sums
    return _plain_sums(x, thresholds)


@sum_levels.register_fake
def _(x: Tensor, thresholds: Sequence[float]) -> Tensor:
    return x.new_empty((*x.shape[:2], 1 + len(thresholds)), dtype=torch.float32)


@torch.library.custom_op(
    "medseg_reg::filter_planes",
    mutates_args=(),
    schema="(Tensor x, Tensor index, Tensor chosen, bool zero) -> Tensor",
)
def filter_planes(x: Tensor, index: Tensor, chosen: Tensor, zero: bool) -> Tensor:
    """`planes.filter_channels` as an operator; the same for the gradient, twice and more too.

    Shapes:
        x (B, C, *spatial); index and chosen (B, n), integer and bool; the result is alike x.
    """
    if fits(x) and x.dim() == 4 and _sound("filter_planes", x.device):
        with torch.cuda.device(x.get_device()):
            out: Tensor = _kernels().filter_planes(x, index, chosen, zero)
        return out
    return _plain_filter(x, index, chosen, zero)


@filter_planes.register_fake
def _(x: Tensor, index: Tensor, chosen: Tensor, zero: bool) -> Tensor:
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
    _, index, chosen, ctx.zero = inputs
    ctx.save_for_backward(index, chosen)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    # both filters are symmetric linear maps
    index, chosen = ctx.saved_tensors
    return filter_planes(grad, index, chosen, ctx.zero), None, None, None


filter_planes.register_autograd(_backward, setup_context=_setup)


def _plain_sums(x: Tensor, thresholds: Sequence[float]) -> Tensor:
    from medseg_reg.regularizers.kernels.histogram import plain_sums  # it imports this module

    return plain_sums(x.float(), tuple(thresholds))


def _plain_filter(x: Tensor, index: Tensor, chosen: Tensor, zero: bool) -> Tensor:
    from medseg_reg.regularizers.kernels.planes import plain_filter  # it imports this module

    return plain_filter(x, index, chosen, zero)


def _kernels() -> Any:
    """The module of the kernels, which imports Triton."""
    from medseg_reg.regularizers.kernels import triton_kernels

    return triton_kernels


@functools.cache
def _sound(name: str, device: torch.device) -> bool:
    """Whether a kernel compiles here and agrees with the plain rule on a small example."""
    trials: dict[str, Callable[[Tensor], None]] = {
        "sum_levels": _try_sums,
        "filter_planes": _try_filter,
    }
    try:
        x = torch.linspace(-1.5, 1.5, 2 * 5 * 7 * 9, device=device).view(2, 5, 7, 9)
        for each in (x, x.sin().to(memory_format=torch.channels_last)):
            trials[name](each)
    except Exception as error:  # of many types: Triton's, LLVM's, the driver's
        reason = " ".join(str(error).split())[:200]
        warnings.warn(
            f"medseg_reg: the Triton kernel {name} is not used on {device}: "
            f"{type(error).__name__}: {reason}",
            stacklevel=2,
        )
        return False
    return True


def _try_sums(x: Tensor) -> None:
    thresholds = (-0.5, 0.1, 0.7)
    found, expected = _kernels().sum_levels(x, thresholds), _plain_sums(x, thresholds)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if not torch.equal(found[..., 1:], expected[..., 1:]):
        raise ValueError("it counts otherwise than the plain rule")


def _try_filter(x: Tensor) -> None:
    index = torch.tensor([[4, 1], [0, 3]], device=x.device)
    chosen = torch.tensor([[True, True], [True, False]], device=x.device)
    for zero in (False, True):
        found = _kernels().filter_planes(x, index, chosen, zero)
        torch.testing.assert_close(found, _plain_filter(x, index, chosen, zero))

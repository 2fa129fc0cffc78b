"""Element-wise dropout on CPU, with a quarter of a random draw for each element.

torch draws a 53-bit number for each element, one after the other, and this is nine tenths of its
dropout's time. Here a 64-bit draw serves four elements.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medseg_reg.regularizers.kernels.blocks import BLOCK, memory_order, worth_splitting
from medseg_reg.regularizers.kernels.functions import differentiable, with_signature

__all__ = ["drop_elements", "multiply_kept"]

_STEPS = 1 << 16  # a 16-bit number for each element
_FEWEST = 64  # with less of them the rounding of p would show
_SMALL = 1 << 12  # with less elements than these, calling the operators costs more than is saved


def drop_elements(x: Tensor, p: float) -> Tensor:
    """Zeroes single elements with probability q and divides the others by 1 - q.

    q is p rounded to a multiple of 2^-16, so that the expectation is that of ``x`` exactly. Off
    the CPU, in compiled code, for maps of few elements, and for p within .001 of 0 or 1, this is
    ``torch.nn.functional.dropout``, with its own draws and the p as given. What is kept for the
    backward pass is two bytes an element.

    Args:
        x: map of any shape.
        p: drop probability, in (0, 1).

    Example:
        >>> import torch
        >>> drop_elements(torch.ones(1, 4, 64, 64), 0.5).unique().tolist()
        [0.0, 2.0]
    """
    dropped = round(p * _STEPS)
    ours = x.device.type == "cpu" and x.numel() >= _SMALL and not torch.compiler.is_compiling()
    if not ours or not _FEWEST <= dropped <= _STEPS - _FEWEST:
        return F.dropout(x, p, training=True)
    return multiply_kept(x, _keep(x, dropped), _STEPS / (_STEPS - dropped))


def multiply_kept(x: Tensor, keep: Tensor, scale: float) -> Tensor:
    """Multiplies by ``scale`` where ``keep``, by 0 elsewhere; only ``keep`` is held for backward.

    Args:
        x: map.
        keep: zeros and ones of its shape and of any dtype, as booleans; in its memory format, if
            it is to be fast.
        scale: factor.

    Example:
        >>> import torch
        >>> multiply_kept(torch.tensor([1.0, 2, 3]), torch.tensor([True, False, True]), 2.0)
        tensor([2., 0., 6.])
    """
    if keep.dtype == torch.bool:  # torch converts bytes to floats eight times faster
        keep = keep.view(torch.uint8)
    kept: Tensor = _MultiplyKept.apply(x, keep, scale)
    return kept


def _keep(x: Tensor, dropped: int) -> Tensor:
    """int16 ones where the 16-bit draw of an element is not among the lowest, else zeros."""
    size = x.numel()
    keep = torch.empty(-(-size // 4) * 4, dtype=torch.int16)
    threshold = dropped - _STEPS // 2  # as int16, draws begin at -2^15
    for part in torch.split(keep, BLOCK):
        words = torch.randint(-(2**63), 2**63 - 1, (part.numel() // 4,), dtype=torch.int64)
        torch.ge(words.view(torch.int16), threshold, out=part)
    keep = keep[:size]
    if x.is_contiguous() or x.dim() < 4:
        return keep.view(x.shape)
    return keep.view(x.movedim(1, -1).shape).movedim(-1, 1)  # channels_last, as x is


class _MultiplyKept(torch.autograd.Function):
    """y = scale * keep * x; the backward pass is the same applied to the gradient."""

    @staticmethod
    @with_signature
    def forward(x: Tensor, keep: Tensor, scale: float) -> Tensor:
        out = torch.empty_like(x)
        flat = memory_order(x, keep, out) if worth_splitting(x) else None
        if flat is None:
            return out.copy_(keep).mul_(x).mul_(scale)
        for values, kept, result in zip(*(torch.split(m, BLOCK) for m in flat), strict=True):
            result.copy_(kept).mul_(values).mul_(scale)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        _, keep, ctx.scale = inputs
        ctx.save_for_backward(keep)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return differentiable(_MultiplyKept)(grads[0], keep, ctx.scale), None, None

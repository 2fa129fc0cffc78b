"""Multiplies a map by one factor for each channel and one for each position, in a single pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from medseg_reg.regularizers.kernels.blocks import BLOCK, worth_splitting
from medseg_reg.regularizers.kernels.functions import differentiable, with_signature

__all__ = ["multiply_masks"]


def multiply_masks(x: Tensor, channels: Tensor, positions: Tensor) -> Tensor:
    """Computes x * channels * positions without the map between the two products.

    Neither is that map kept for the backward pass, which is the same rule applied to the gradient.

    Args:
        x: map.
        channels: factors of the channels, constant for the gradient.
        positions: factors of the positions, constant for the gradient.

    Shapes:
        x (B, C, *spatial), channels (B, C, 1, ...), positions (B, 1, *spatial), all of one dtype.

    Example:
        >>> import torch
        >>> x = torch.ones(1, 2, 3)
        >>> multiply_masks(x, torch.tensor([[[0.0], [2]]]), torch.tensor([[[1.0, 0, 1]]]))
        tensor([[[0., 0., 0.],
                 [2., 0., 2.]]])
    """
    product: Tensor = _MultiplyMasks.apply(x, channels, positions)
    return product


class _MultiplyMasks(torch.autograd.Function):
    """The product, and for its backward pass the two small masks."""

    @staticmethod
    @with_signature
    def forward(x: Tensor, channels: Tensor, positions: Tensor) -> Tensor:
        if not worth_splitting(x):
            return (x * channels).mul_(positions)
        out = torch.empty_like(x)
        # along channels, or where they lie side by side in memory along the first spatial axis
        axis = 1 if x.is_contiguous() else 2
        step = max(1, BLOCK * x.shape[axis] // x[0].numel())
        for sample, result, by_channel, by_position in zip(
            x, out, channels, positions, strict=True
        ):
            for start in range(0, x.shape[axis], step):
                length = min(step, x.shape[axis] - start)
                part = result.narrow(axis - 1, start, length)
                # the mask whose size along the axis is 1 serves all parts
                factors = [
                    mask if mask.shape[axis - 1] == 1 else mask.narrow(axis - 1, start, length)
                    for mask in (by_channel, by_position)
                ]
                torch.mul(sample.narrow(axis - 1, start, length), factors[0], out=part)
                part.mul_(factors[1])
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return differentiable(_MultiplyMasks)(grads[0], *ctx.saved_tensors), None, None

"""Inputs of any size for a network that halves its maps a fixed number of times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.instancenorm import _InstanceNorm


def pad_to_multiple(x: Tensor, factor: int, two_at_least: bool = False) -> Tensor:
    """Repeat the border of (B, C, *spatial) at the end of each axis, up to a multiple of factor.

    Args:
        x: the image.
        factor: the number.
        two_at_least: whether an image that would become one multiple along every axis becomes two
            along each, so that more than one pixel is left of it on the smallest map.

    >>> pad_to_multiple(torch.zeros(1, 1, 13, 16), 8).shape
    torch.Size([1, 1, 16, 16])
    >>> pad_to_multiple(torch.zeros(1, 1, 3, 8), 8, two_at_least=True).shape
    torch.Size([1, 1, 16, 16])
    """
    multiples = [(n + factor - 1) // factor for n in x.shape[2:]]
    if two_at_least:
        # Whole numbers alone, because an exported program would keep the answer to a question.
        multiples = [n + 1 // math.prod(multiples) for n in multiples]
    sizes = [n * factor for n in multiples]
    if torch.compiler.is_exporting():
        return _by_index(x, sizes)
    pads: list[int] = []
    for have, want in zip(reversed(x.shape[2:]), reversed(sizes), strict=True):
        pads += [0, want - have]
    return functional.pad(x, pads, mode="replicate") if any(pads) else x


def needs_two_pixels(network: nn.Module) -> bool:
    """Whether a network normalizes each map by itself, which torch refuses for a map of one pixel.

    >>> needs_two_pixels(nn.Sequential(nn.InstanceNorm2d(3))), needs_two_pixels(nn.BatchNorm2d(3))
    (True, False)
    """
    return any(isinstance(module, _InstanceNorm) for module in network.modules())


def crop(x: Tensor, size: Sequence[int]) -> Tensor:
    """Take away what `pad_to_multiple` added to an image of this size."""
    if torch.compiler.is_exporting():
        return _by_index(x, size)
    kept: tuple[Any, ...] = (..., *(slice(0, n) for n in size))
    return x[kept]


def _by_index(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Cut, or repeat the border, to these sizes.

    Padding and slicing ask whether the size changes at all, and an exported program would keep
    the answer for the example; this asks nothing, so the program takes images of any size.
    """
    for axis, size in enumerate(sizes, start=2):
        index = torch.arange(size, device=x.device).clamp(max=x.shape[axis] - 1)
        x = x.index_select(axis, index)
    return x

"""Inputs of any size for a network that halves its maps a fixed number of times."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def pad_to_multiple(x: Tensor, factor: int) -> Tensor:
    """Repeat the border of (B, C, *spatial) at the end of each axis, up to a multiple of factor.

    >>> pad_to_multiple(torch.zeros(1, 1, 13, 16), 8).shape
    torch.Size([1, 1, 16, 16])
    """
    if torch.compiler.is_exporting():
        sizes = [(n + factor - 1) // factor * factor for n in x.shape[2:]]
        return _by_index(x, sizes)
    pads: list[int] = []
    for n in reversed(x.shape[2:]):
        pads += [0, -n % factor]
    return functional.pad(x, pads, mode="replicate") if any(pads) else x


def crop(x: Tensor, size: Sequence[int]) -> Tensor:
    """Take away what `pad_to_multiple` added to an image of this size."""
    if torch.compiler.is_exporting():
        return _by_index(x, size)
    return x[(..., *(slice(0, n) for n in size))]


def _by_index(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Cut, or repeat the border, to these sizes.

    Padding and slicing ask whether the size changes at all, and an exported program would keep
    the answer for the example; this asks nothing, so the program takes images of any size.
    """
    for axis, size in enumerate(sizes, start=2):
        index = torch.arange(size, device=x.device).clamp(max=x.shape[axis] - 1)
        x = x.index_select(axis, index)
    return x

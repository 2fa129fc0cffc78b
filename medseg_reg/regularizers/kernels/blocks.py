"""Goes through a map on CPU a cache-full at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["BLOCK", "by_planes", "memory_order", "worth_splitting"]

BLOCK = 1 << 17  # elements, 512 KiB of float32: a block and what is made of it stay in the cache


def worth_splitting(x: Tensor) -> bool:
    """Whether blocks pay: on CPU, for maps beyond one block; compiled code makes its own loops."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and x.numel() > BLOCK


def by_planes(rule: Callable[..., Tensor], *maps: Tensor) -> Tensor:
    """Applies a rule that treats each channel of each sample for itself, to a block at a time.

    Whole passes would write every intermediate map to memory, and there to pages new to the
    process, in every step. The rule is called once, with the maps as they are, where blocks do
    not pay or the first map is not contiguous.

    Args:
        rule: takes planes (1, n, ...) of each map, and gives (1, n, ...).
        maps: (B, C, ...); any but the first may have one channel for all, as (B, 1, ...).

    Example:
        >>> import torch
        >>> by_planes(lambda planes: planes.sum(-1), torch.ones(2, 3, 4)).tolist()
        [[4.0, 4.0, 4.0], [4.0, 4.0, 4.0]]
    """
    if not (worth_splitting(maps[0]) and maps[0].is_contiguous()):
        return rule(*maps)
    batch, channels = maps[0].shape[:2]
    planes = [m.expand(batch, channels, *m.shape[2:]).reshape(1, -1, *m.shape[2:]) for m in maps]
    step = max(1, BLOCK // math.prod(maps[0].shape[2:]))
    parts = [torch.split(plane, step, dim=1) for plane in planes]
    first = rule(*[split[0] for split in parts])
    whole = first.new_empty(1, batch * channels, *first.shape[2:])
    whole[:, :step] = first
    # each result is copied at once, so that the next one finds its memory still in the cache
    for i in range(1, len(parts[0])):
        whole[:, i * step : (i + 1) * step] = rule(*[split[i] for split in parts])
    return whole.view(batch, channels, *whole.shape[2:])


def memory_order(*maps: Tensor) -> list[Tensor] | None:
    """One-axis views of maps of one shape, in the order of their memory; None if that differs.

    Example:
        >>> import torch
        >>> x = torch.arange(4.0).view(1, 2, 1, 2).to(memory_format=torch.channels_last)
        >>> [m.tolist() for m in memory_order(x)]
        [[0.0, 2.0, 1.0, 3.0]]
    """
    if all(m.is_contiguous() for m in maps):
        return [m.view(-1) for m in maps]
    if maps[0].dim() > 3:
        moved = [m.movedim(1, -1) for m in maps]
        if all(m.is_contiguous() for m in moved):
            return [m.view(-1) for m in moved]
    return None

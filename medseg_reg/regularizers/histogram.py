"""Histogram sums of every channel, without the 11-fold tensor that comparing with each level makes.

Used by Heuristic Dropout. Each level costs one comparison of the untouched map with a threshold;
the squared deviations come from the same blocks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["level_sums", "level_thresholds"]

_BLOCK = 1 << 18  # 1 MiB of float32: block, threshold buffer and sums stay in the L2 cache


def level_sums(x: Tensor, thresholds: tuple[float, ...]) -> Tensor:
    """Squared deviations of every channel, and how many values reach each threshold.

    On CPU the map is read in cache-sized blocks, which takes half the time of whole passes and
    bounds the memory. Counts are float32: exact up to 2^24 pixels a channel.

    Args:
        x: detached float32 map.
        thresholds: for example of `level_thresholds`.

    Shapes:
        x (B, C, *spatial); the result (B, C, 1 + len(thresholds)).

    Example:
        >>> import torch
        >>> level_sums(torch.tensor([[[0.0, 1.0, 2.0]]]), (0.5, 1.5)).tolist()
        [[[2.0, 2.0, 1.0]]]
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or x.numel() == 0:
        return _sums(x, _mean(x), thresholds, buffered=False)
    if x.is_contiguous():
        planes = x.view(1, -1, math.prod(x.shape[2:]))
        blocks = torch.split(planes, max(1, _BLOCK // planes.shape[2]), dim=1)
        sums = [_sums(block, _mean(block), thresholds, buffered=True) for block in blocks]
        return torch.cat(sums, dim=1).view(*x.shape[:2], -1)
    mean = _mean(x)
    rows = max(1, _BLOCK * x.shape[2] // x[0].numel())
    samples = []
    for sample, its_mean in zip(torch.split(x, 1), torch.split(mean, 1), strict=True):
        parts = torch.split(sample, rows, dim=2)
        sums = [_sums(part, its_mean, thresholds, buffered=True) for part in parts]
        samples.append(torch.stack(sums).sum(0))
    return torch.cat(samples)


def _mean(x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


def _sums(x: Tensor, mean: Tensor, thresholds: tuple[float, ...], buffered: bool) -> Tensor:
    """Squared deviations, then the number of values at or above each threshold (B, C, 1 + n).

    Reductions run over the spatial axes in the layout that is there: flattening a channels_last
    map first costs ten times more, and so does torch.var.
    """
    space = tuple(range(2, x.dim()))
    buffer = x - mean
    sums = [buffer.square_().sum(space)]
    if buffered:  # on CPU, writing 0.0/1.0 into one reused buffer is 8 times faster than bools
        sums += [torch.ge(x, t, out=buffer).sum(space) for t in thresholds]
    else:
        sums += [(x >= t).sum(space).float() for t in thresholds]
    return torch.stack(sums, dim=-1)


_TABLE: dict[tuple[int, bool], tuple[float, ...]] = {}


def level_thresholds(bins: int, signed: bool) -> tuple[float, ...]:
    """The least float32 of each level of round(bins * tanh(x)).

    Of levels 0..bins, or, if ``signed``, of -bins+1..bins (every value reaches -bins).
    Comparing with them equals rounding ``bins * tanh(x)`` to even in float32, ties included, as
    far as tanh itself is rounded correctly. A plain dictionary, because dynamo reads it without
    a warning.

    Example:
        >>> [round(t, 3) for t in level_thresholds(2, signed=False)]
        [-0.255, 0.255, 0.973]
    """
    found = _TABLE.get((bins, signed))
    if found is None:
        edges = [_edge(level, bins) for level in range(1, bins + 1)]
        # tanh is odd: level(x) >= -j exactly where -x lies below the edge of level j + 1
        mirrored = [-below for below, _ in edges]
        negative = mirrored[::-1] if signed else mirrored[:1]
        found = (*negative, *(at for _, at in edges))
        _TABLE[bins, signed] = found
    return found


def _edge(level: int, bins: int) -> tuple[float, float]:
    """The greatest float32 below a level and the least one in it, by bisection."""
    middle = math.atanh((level - 0.5) / bins)
    below, at = _float32(middle * (1 - 1e-3)), _float32(middle * (1 + 1e-3))
    while True:
        half = _float32((below + at) / 2)
        if half in (below, at):
            return below, at
        if round(_float32(_float32(math.tanh(half)) * bins)) >= level:
            at = half
        else:
            below = half


def _float32(value: float) -> float:
    """Rounds a Python float to float32 (Veltkamp splitting; ``struct`` would stop dynamo)."""
    scaled = value * (2**29 + 1)
    return scaled - (scaled - value)


level_thresholds(10, False)

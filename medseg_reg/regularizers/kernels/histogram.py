"""Histogram and variance of every channel, in one pass over the map.

For Heuristic Dropout. Comparing with all levels at once makes an 11-fold tensor; here each level
costs one comparison of the untouched map with a threshold, and the moments come from the same
blocks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from medseg_reg.regularizers.kernels import blocks, loops, operators

__all__ = ["deviation_sums", "level_sums", "level_thresholds", "plain_sums", "scores_of"]

EPSILON = 1e-7


def level_sums(x: Tensor, thresholds: tuple[float, ...]) -> Tensor:
    """Squared deviations of every channel, and how many values reach each threshold.

    On CPU the map is read once, in cache-sized blocks, and never copied as a whole: all sums of a
    block are taken while it lies in the cache, by a compiled loop where numba is installed. Halves
    are counted by their bits, as integers. On a CUDA GPU a Triton kernel reads the map once. Counts
    are float32: exact up to 2^24 pixels a channel. The deviations are right within float32
    rounding; channels with NaN have NaN there, and counts without meaning.

    Args:
        x: detached floating map.
        thresholds: rising, for example of `level_thresholds`.

    Shapes:
        x (B, C, *spatial); the result (B, C, 1 + len(thresholds)), float32.

    Example:
        >>> import torch
        >>> level_sums(torch.tensor([[[0.0, 1.0, 2.0]]]), (0.5, 1.5)).tolist()
        [[[2.0, 2.0, 1.0]]]
    """
    if operators.fits(x, len(thresholds)):
        sums: Tensor = operators.sum_levels(x, thresholds)
        return sums
    if x.device.type != "cpu" or torch.compiler.is_compiling() or x.numel() == 0:
        return plain_sums(x.float(), thresholds)
    compiled = loops.level_sums(x, thresholds)
    if compiled is not None:
        return compiled
    if x.is_contiguous():
        raw = blocks.by_planes(lambda part: _raw_sums(part, thresholds), x.flatten(2))
    else:
        rows = max(1, blocks.BLOCK * x.shape[2] // x[0].numel())
        raw = torch.cat([_sums_by_rows(sample, thresholds, rows) for sample in torch.split(x, 1)])
    return torch.cat([_deviations_of(raw, x)[..., None], raw[..., 2:]], dim=-1)


def deviation_sums(x: Tensor) -> Tensor:
    """The first column of `level_sums`, for a contiguous map on CPU: a sixth of the work.

    Shapes:
        x (B, C, *spatial); the result (B, C), float32.

    Example:
        >>> import torch
        >>> deviation_sums(torch.tensor([[[0.0, 1.0, 2.0]]])).tolist()
        [[2.0]]
    """
    return level_sums(x, ())[..., 0]


def scores_of(sums: Tensor, pixels: int, k: float, signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy, unbiased variance and score of every channel; see `heuristic_scores`.

    Shapes:
        sums (B, C, 1 + levels) of `level_sums`; each result (B, C).

    Example:
        >>> import torch
        >>> sums = torch.tensor([[[2.0, 4, 2]]])  # of 0, 0, 1, 1: half of them at each level
        >>> [round(t.item(), 3) for t in scores_of(sums, 4, 2.0, signed=False)]
        [0.693, 0.667, 3.693]
    """
    variance, reached = sums[..., 0] / max(pixels - 1, 1), sums[..., 1:]
    if signed:  # every value reaches the lowest level
        reached = torch.cat([torch.full_like(reached[..., :1], pixels), reached], dim=-1)
    counts = reached - torch.nn.functional.pad(reached[..., 1:], (0, 1))
    # no value counted at all: entropy 0 rather than 0 / 0
    entropy = torch.special.entr(counts / reached[..., :1].clamp(min=1)).sum(-1)
    return entropy, variance, entropy + k / (variance + EPSILON)


def _sums_by_rows(sample: Tensor, thresholds: tuple[float, ...], rows: int) -> Tensor:
    """`_raw_sums` of a channels_last sample, whose rows lie together in memory."""
    parts = [_raw_sums(part, thresholds) for part in torch.split(sample, rows, dim=2)]
    return torch.stack(parts).sum(0)


def plain_sums(x: Tensor, thresholds: tuple[float, ...]) -> Tensor:
    """`level_sums` in whole passes, for compiled code and other devices."""
    space = tuple(range(2, x.dim()))
    sums = [_deviations(x), *[(x >= t).sum(space).float() for t in thresholds]]
    return torch.stack(sums, dim=-1)


def _deviations(x: Tensor) -> Tensor:
    """Sums of squared deviations, in the layout that is there: torch.var costs ten times more."""
    space = tuple(range(2, x.dim()))
    return (x - x.mean(space, keepdim=True)).square_().sum(space)


def _raw_sums(part: Tensor, thresholds: tuple[float, ...]) -> Tensor:
    """Of one block: the sum, the sum of squares and the counts of every channel."""
    space = tuple(range(2, part.dim()))
    exact = part.float()
    # a reused buffer of 0.0 and 1.0 is three times faster than booleans
    buffer = exact * exact
    sums = [exact.sum(space), buffer.sum(space)]
    if thresholds and thresholds[0] <= exact.amin().item():  # as after ReLU: nothing to compare
        sums.append(torch.full_like(sums[0], math.prod(part.shape[2:])))
        thresholds = thresholds[1:]
    halves = part.element_size() == 2 and part.is_contiguous() and part.shape[-1] % 4 == 0
    if halves and thresholds and thresholds[0] > 0 and part.shape[-1] < 1 << 18:
        return torch.cat([torch.stack(sums, dim=-1), _bit_counts(part, thresholds)], dim=-1)
    sums += [torch.ge(exact, t, out=buffer).sum(space) for t in thresholds]
    return torch.stack(sums, dim=-1)


def _bit_counts(part: Tensor, thresholds: tuple[float, ...]) -> Tensor:
    """Counts of halves (B, C, 4 n) by their bits: positive halves are ordered as their bits are.

    A row of int16 zeros and ones is added up as int64 words, four counters in each; below 2^18
    values none of them runs over.
    """
    bits = torch.empty_like(part, dtype=torch.int16)
    values, words = part.view(torch.int16), bits.view(torch.int64)
    packed = []
    for t in thresholds:
        torch.ge(values, _bits_of(t, part.dtype), out=bits)
        packed.append(words.sum(-1))
    # little-endian or not, the four counters of a word are added up
    return (
        torch.stack(packed, dim=-1)
        .view(torch.int16)
        .view(*part.shape[:2], -1, 4)
        .int()
        .bitwise_and_(0xFFFF)
        .sum(-1)
        .float()
    )


def _deviations_of(raw: Tensor, x: Tensor) -> Tensor:
    """The squared deviations (B, C) from the moments, where need be from the values again."""
    total, squares = raw[..., 0], raw[..., 1]
    deviations = squares - total.square() / math.prod(x.shape[2:])
    # a mean far from 0 cancels; constant channels must have a variance of exactly 0
    sound = ((deviations > 0.1 * squares) & squares.isfinite()) | (squares == 0)
    if bool(sound.all()):
        return deviations
    if not x.is_contiguous():
        return torch.where(sound, deviations, _deviations(x.float()))
    number, planes = (~sound).flatten().nonzero()[:, 0], x.flatten(0, 1)
    for part in torch.split(number, max(1, blocks.BLOCK // planes[0].numel())):
        few = planes.index_select(0, part)[None].float()
        deviations.view(-1)[part] = _deviations(few)[0]
    return deviations


_BITS: dict[tuple[float, torch.dtype], int] = {}


def _bits_of(threshold: float, dtype: torch.dtype) -> int:
    """The bits of the least half at or above a positive threshold: they grow as the values do."""
    found = _BITS.get((threshold, dtype))
    if found is None:
        nearest = torch.tensor(threshold, dtype=dtype)
        found = int(nearest.view(torch.int16).item()) + int(nearest.item() < threshold)
        _BITS[threshold, dtype] = found
    return found


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

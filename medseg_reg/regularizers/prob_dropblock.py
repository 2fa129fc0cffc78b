"""ProbDropBlock: drop blocks around the strongest activations more often than others."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from medseg_reg.regularizers.base import (
    Regularizer,
    check_count,
    check_map,
    check_rate,
    register,
)
from medseg_reg.regularizers.dropblock import block_reach, grow
from medseg_reg.regularizers.kernels.blocks import BLOCK, by_planes, worth_splitting
from medseg_reg.regularizers.kernels.elements import multiply_kept
from medseg_reg.regularizers.kernels.points import random_points

__all__ = ["ProbDropBlock", "prob_drop_block"]

_SAMPLE = 1 << 14  # values of a sample on which the solution is approached before all are taken
_APPROACH, _FINISH = 12, 3  # steps of Newton's method on that part, then on the whole
_FAR = 1e30  # weight of a dead pixel: exp(-alpha * _FAR) is 0, so that no mean counts it
_NEAR = 1e-20  # an alpha so small that it drops no live pixel, though every dead one
_TINY = 1e-30


def prob_drop_block(
    x: Tensor,
    p: float = 0.1,
    block_size: int = 7,
    training: bool = True,
    *,
    faithful: bool = False,
) -> Tensor:
    """Zeroes blocks around strong activations; see `ProbDropBlock`.

    Example:
        >>> import torch
        >>> y = prob_drop_block(torch.rand(2, 3, 16, 16) + 1, p=0.2, block_size=3)
        >>> 0.1 < (y == 0).float().mean().item() < 0.3
        True
    """
    p = check_rate(p, "prob_drop_block")
    check_count(block_size, "block_size", "prob_drop_block")
    if not training or p == 0.0:
        return x
    check_map(x, "prob_drop_block")
    if x.numel() == 0:
        return x
    with torch.no_grad():
        strength = _strength(x.detach())
        if faithful:
            scale = _published(strength, p, block_size).to(x.dtype)
        else:
            keep = _calibrated(strength, p, block_size)
    return x * scale if faithful else multiply_kept(x, keep, 1.0 / (1.0 - p))


@register("prob_drop_block")
class ProbDropBlock(Regularizer):
    """Zeroes blocks around activations, the more likely the stronger they are.

    Each element a of each channel is the centre of a block with probability
    1 - exp(-alpha |a|), about alpha |a| where that is small; elements in no block are kept,
    y = x * keep / (1 - p). An element is then kept with probability exp(-alpha W), W the sum of
    |a| over the window around it. alpha is solved in every sample so that the share of non-zero
    elements that are dropped is p in expectation; strong channels and regions lose more than p,
    weak ones less. Dead channels are left out, since zeroing zeros changes nothing.

    On CPU, maps beyond 2^17 values draw their centres in another way than compiled code does: of
    the same distribution, but one seed gives other blocks.

    Args:
        p: share of non-zero elements to drop, in [0, 1).
        block_size: side of a block, as in `DropBlock`: it may be even, or larger than the map.
        faithful: the published rule instead, see below.

    Shapes:
        (B, C, *spatial) with one to three spatial axes; the output is alike.

    Raises:
        ValueError: a bad parameter, or an input of another shape or kind.

    Paper:
        Y. Zhao, O. Dada, X. Gao, R. Mullins, "Revisiting Structured Dropout", ACML 2023, PMLR
        222:1699-1714, arXiv 2210.02570.
        The published rule (``faithful=True``) has centres with probability
        min(1, alpha gamma), gamma = |a| * count(a != 0) / sum |a|, whose mean over the non-zero
        elements is 1, and alpha the parameter. Here alpha is p: p is then the share of
        **centres**, and a block of k^n pixels around each drops far more than p, about
        1 - (1 - p)^(k^n): practically all for k = 7 and p = .1. Use a p some k^n times smaller.
        The paper prints the last step as a product with sum(M) / count(M), M the mask, which
        would shrink what is kept; this is taken for a misprint of count / sum, the rescaling of
        DropBlock. It does not say over what the sums run; here over each channel of each sample.
        Its linear ramp of alpha belongs to a schedule, which a compiled layer follows without
        compiling anew.
        The default has 1 - exp(-alpha |a|) in place of min(1, alpha |a|), because then overlap
        of blocks and the border enter the solution exactly.

    Example:
        >>> import torch
        >>> layer = ProbDropBlock(p=0.1, block_size=3)
        >>> x = torch.rand(64, 16, 12, 20)
        >>> abs(layer.measured_rate(x, layer(x)) - 0.1) < 0.01
        True
    """

    unit = "block of pixels"
    paper = "Zhao et al., ACML 2023"

    def __init__(self, p: float = 0.1, block_size: int = 7, faithful: bool = False) -> None:
        super().__init__(p)
        self.block_size = check_count(block_size, "block_size", type(self).__name__)
        self.faithful = bool(faithful)

    def regularize(self, x: Tensor) -> Tensor:
        """Applies `prob_drop_block`."""
        return prob_drop_block(x, self.p, self.block_size, faithful=self.faithful)


def _strength(x: Tensor) -> Tensor:
    """|x| relative to the greatest of its sample, float32, 0 where it is not finite.

    Relative, and divided in the precision of x, so that no sum of it can overflow.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    if worth_splitting(x) and x.is_contiguous():
        size = torch.empty_like(x, dtype=exact)
        for values, part in zip(*[torch.split(m.view(-1), BLOCK) for m in (x, size)], strict=True):
            part.copy_(values).abs_().nan_to_num_(0.0, 0.0, 0.0)
    else:
        size = x.abs().to(exact).contiguous().nan_to_num_(0.0, 0.0, 0.0)
    peak = size.amax(tuple(range(1, x.dim())), keepdim=True)
    return size.div_(torch.where(peak > 0, peak, 1.0)).float()


def _published(strength: Tensor, p: float, block_size: int) -> Tensor:
    """The factors of the published rule, float32; p is its alpha."""
    space = tuple(range(2, strength.dim()))
    count = (strength > 0).sum(space, keepdim=True)
    total = strength.sum(space, keepdim=True)
    gamma = strength * (count / total.clamp(min=_TINY))
    keep = grow(torch.rand_like(gamma) < p * gamma, *block_reach(block_size)).logical_not_()
    pixels = math.prod(strength.shape[2:])
    return keep * (pixels / keep.sum(space, keepdim=True).clamp(min=1))


def _calibrated(strength: Tensor, p: float, block_size: int) -> Tensor:
    """What the default rule keeps, as booleans."""
    before, after = block_reach(block_size)
    alpha = _solve(by_planes(lambda s: _live_window_sum(s, before, after), strength), p)
    pixels = math.prod([min(block_size, n) for n in strength.shape[2:]])
    if pixels > 4096:  # rates near the 2^-24 of a float32 draw: two coins are fine enough
        rate = strength.mul_(-alpha).expm1_().neg_().sqrt_()
        seeds = (torch.rand_like(rate) < rate) & (torch.rand_like(rate) < rate)
    else:
        seeds = random_points(strength, alpha)
    return grow(seeds, before, after).logical_not_()


def _live_window_sum(values: Tensor, before: int, after: int) -> Tensor:
    """The sum over the centres whose block covers a pixel, out of reach for dead pixels.

    Axis by axis, and by doubling: only sums, since differences of running sums would cancel.
    """
    dead = torch.eq(values, 0.0, out=torch.empty_like(values))  # faster than booleans on CPU
    for axis in range(2, values.dim()):
        size = values.shape[axis]
        left, right = min(after, size - 1), min(before, size - 1)
        length = left + 1 + right
        # window sums of 1, 2, 4, ... pixels; those in the binary form of the length make it up
        span = F.pad(values, [0, 0] * (values.dim() - 1 - axis) + [left, right])
        total, offset, power = torch.zeros_like(values), 0, 1
        while power <= length:
            if length & power:
                total.add_(span.narrow(axis, offset, size))
                offset += power
            if 2 * power <= length:
                rest = span.shape[axis] - power
                span = span.narrow(axis, 0, rest) + span.narrow(axis, power, rest)
            power *= 2
        values = total
    return values.add_(dead, alpha=_FAR)


def _solve(window: Tensor, p: float) -> Tensor:
    """The alpha (B, 1, ...) for which the mean of exp(-alpha window) over live pixels is 1 - p.

    Newton's method on the logarithm of the mean, which is convex: whatever the start, all but its
    first step come from the left, so that what the last one misses leaves the rate below p.
    """
    wanted = torch.log1p(-(window.new_zeros(()) + p)) / math.log(2.0)
    alpha = torch.full_like(window[(slice(None), *[slice(0, 1)] * (window.dim() - 1))], _NEAR)
    step = 1
    while window[0].numel() > _SAMPLE * step ** (window.dim() - 2) and step < max(window.shape[2:]):
        step += 2  # odd, so that it does not fall in with the halvings of an encoder
    axes = [slice(min(step // 2, n - 1), None, step) for n in window.shape[2:]]
    part = window[(slice(None), slice(None), *axes)]
    for values, steps in ((part, _APPROACH), (window, _FINISH if step > 1 else 0)):
        live = by_planes(_live, values).sum(1).clamp(min=1.0).view_as(alpha)
        for _ in range(steps):
            kept, slope = by_planes(_moments, values, alpha).sum(1).unbind(1)
            mean, slope = kept.view_as(alpha) / live, slope.view_as(alpha) / live
            change = (mean.clamp(min=_TINY).log2() - wanted) * mean / slope.clamp(min=_TINY)
            alpha = (alpha + change).clamp(min=_NEAR)  # a dead sample has change 0
    return alpha * math.log(2.0)


def _live(window: Tensor) -> Tensor:
    """The number of live pixels of each channel."""
    live = torch.lt(window, _FAR, out=torch.empty_like(window))
    return live.sum(tuple(range(2, window.dim())))


def _moments(window: Tensor, alpha: Tensor) -> Tensor:
    """For each channel, along the last axis: the sums of e and window * e, e = 2^(-alpha window).

    Powers of 2, since exp is 7 times slower on CPU where it underflows, as for dead pixels.
    """
    space = tuple(range(2, window.dim()))
    kept = window.mul(-alpha).exp2_()
    return torch.stack([kept.sum(space), kept.mul_(window).sum(space)], dim=2)

"""DropBlock: drop square blocks, at a rate that is p on any map.

`calibrated_gamma` gives the rate of block centres for a wanted share of dropped pixels;
`drop_block` and `DropBlock` are the rule. Blocks are painted by shifting bytes axis by axis, and
where few centres are needed they are drawn one by one rather than by a coin for each pixel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

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
from medseg_reg.regularizers.kernels.blocks import by_planes
from medseg_reg.regularizers.kernels.elements import multiply_kept

__all__ = ["DropBlock", "block_reach", "calibrated_gamma", "drop_block", "grow"]

_STEPS = 5  # of Newton's method: float64 precision for p up to .999 on any map
_CEILINGS = (0.05, 0.15, 0.5, 0.9, 0.99)  # of p, for the number of draws that is reserved
_DENSE = 16  # a coin for each position is cheaper than reserving more than a 16th of them
_POISSON = ("cpu", "cuda", "meta")


def block_reach(block_size: int) -> tuple[int, int]:
    """How many pixels of a block lie before and after its centre, along one axis.

    Example:
        >>> block_reach(5), block_reach(4)  # an even block has its longer half after the centre
        ((2, 2), (1, 2))
    """
    return (block_size - 1) // 2, block_size // 2


def calibrated_gamma(size: Sequence[int], block_size: int, p: float) -> float:
    """The rate of block centres at which the mean share of dropped pixels is exactly p.

    Solves mean over pixels of 1 - (1 - gamma)^n(pixel) = p, where n(pixel) counts the centres
    whose block, cut off at the border, covers the pixel. Centres may be anywhere on the map.

    Args:
        size: the spatial sizes of the map.
        block_size: side of a block; it may be even, and larger than the map.
        p: wanted share of dropped pixels, in [0, 1).

    Raises:
        ValueError: ``p`` outside [0, 1), or a size that is no whole number above 0.

    Example:
        >>> round(calibrated_gamma((28, 28), 7, 0.1), 6)
        0.002442
        >>> round(calibrated_gamma((2, 2), 7, 0.1), 6)  # all blocks cover all: 1 - .9 ** (1 / 4)
        0.025996
    """
    p = check_rate(p, "calibrated_gamma")
    check_count(block_size, "block_size", "calibrated_gamma")
    sizes = tuple(check_count(n, "each size", "calibrated_gamma") for n in size)
    return -math.expm1(-_cached_intensity(sizes, block_size, p))


def drop_block(
    x: Tensor,
    p: float = 0.1,
    block_size: int = 7,
    per_channel: bool = True,
    training: bool = True,
    *,
    faithful: bool = False,
) -> Tensor:
    """Zeroes square blocks of every channel, or of all channels at once; see `DropBlock`.

    Example:
        >>> import torch
        >>> y = drop_block(torch.ones(2, 3, 8, 8), p=0.5, block_size=3)
        >>> set(y.unique().tolist()) <= {0.0, 2.0}
        True
    """
    p = check_rate(p, "drop_block")
    check_count(block_size, "block_size", "drop_block")
    if not training or p == 0.0:
        return x
    check_map(x, "drop_block")
    if x.numel() == 0:
        return x
    with torch.no_grad():
        channels = x.shape[1] if per_channel else 1
        if faithful:
            keep = _published_blocks(x, p, block_size, channels).logical_not_()
            scale = (keep * (keep.numel() / keep.sum().clamp(min=1))).to(x.dtype)
        else:
            keep = _calibrated_blocks(x, p, block_size, channels).logical_not_()
            scale = keep if per_channel else keep.to(x.dtype).div_(1.0 - p)
    if per_channel and not faithful:
        return multiply_kept(x, keep, 1.0 / (1.0 - p))
    return x * scale


@register("drop_block")
class DropBlock(Regularizer):
    """Zeroes square blocks of the map and rescales the rest.

    Each pixel of each channel is the centre of a block with probability gamma; pixels in no
    block are kept: y = x * keep / (1 - p). gamma is solved for the map at hand so that the share
    of dropped pixels is p, with the overlap of blocks and the border counted in: see
    `calibrated_gamma`. Near the border a pixel lies in fewer blocks and is dropped less often
    than p, in the middle slightly more often.

    With a block as large as the map, whole channels are dropped, as by `SpatialDropout`;
    ``per_channel=False`` with such a block drops whole samples.

    Args:
        p: share of pixels to drop, in [0, 1).
        block_size: side of a block. An even one reaches one pixel further after its centre than
            before; one larger than the map is allowed.
        per_channel: draw blocks for each channel (published) or once for all of them.
        faithful: the published rule instead, see below. It couples the samples of a batch.

    Shapes:
        (B, C, *spatial) with one to three spatial axes; the output is alike. Memory beyond it:
        one byte a pixel for the mask; a map for the random numbers, where blocks are small or
        rates high.

    Raises:
        ValueError: a bad parameter, or an input of another shape or kind.

    Paper:
        G. Ghiasi, T.-Y. Lin, Q. V. Le, "DropBlock: A regularization method for convolutional
        networks", NeurIPS 2018, arXiv 1810.12890.
        The published rule (``faithful=True``) lets centres lie only where the block fits into
        the map, takes gamma = p / k^2 * H W / ((H - k + 1) (W - k + 1)), k = min(block_size,
        size) for each axis, and rescales by pixels / kept pixels over the whole batch. gamma
        ignores that blocks overlap: at p = .1 and k = 7 it drops .094 on maps of 28 and .093 on
        14, at p = .5 and 14 only .36. The published code takes square maps alone. timm draws
        centres everywhere but has the published gamma, and drops .93 on a 7 x 7 map.
        The ramp of p over training belongs to a schedule. A compiled layer follows one without
        compiling anew, but for the few times that p crosses .05, .15, .5, .9 or .99.

    Example:
        >>> import torch
        >>> layer = DropBlock(p=0.1, block_size=5)
        >>> x = torch.ones(64, 16, 12, 20)
        >>> abs(layer.measured_rate(x, layer(x)) - 0.1) < 0.01
        True
    """

    unit = "block of pixels"
    paper = "Ghiasi et al., NeurIPS 2018"

    def __init__(
        self,
        p: float = 0.1,
        block_size: int = 7,
        per_channel: bool = True,
        faithful: bool = False,
    ) -> None:
        super().__init__(p)
        self.block_size = check_count(block_size, "block_size", type(self).__name__)
        self.per_channel = bool(per_channel)
        self.faithful = bool(faithful)

    def regularize(self, x: Tensor) -> Tensor:
        """Applies `drop_block`."""
        return drop_block(x, self.p, self.block_size, self.per_channel, faithful=self.faithful)


def grow(seeds: Tensor, before: int, after: int) -> Tensor:
    """Paints the block around every seed of a boolean (B, C, *spatial) mask.

    A pooling window of k^n pixels, axis by axis and by doubling: some 2 log2(k) shifts an axis.

    Example:
        >>> import torch
        >>> grow(torch.tensor([[[False, False, True, False, False, False]]]), 1, 2).int()
        tensor([[[0, 1, 1, 1, 1, 0]]], dtype=torch.int32)
    """
    return by_planes(lambda planes: _grow(planes, before, after), seeds)


def _grow(seeds: Tensor, before: int, after: int) -> Tensor:
    for axis in range(2, seeds.dim()):
        for reach, ahead in ((after, True), (before, False)):
            seeds = _smear(seeds, axis, min(reach, seeds.shape[axis] - 1), ahead)
    return seeds


def _smear(mask: Tensor, axis: int, reach: int, ahead: bool) -> Tensor:
    """Also sets the ``reach`` pixels ahead of (or behind) every set pixel, along one axis."""
    covered = 0
    while covered < reach:
        step = min(covered + 1, reach - covered)
        rest = mask.shape[axis] - step
        to, origin = (step, 0) if ahead else (0, step)
        wider = mask.clone()
        wider.narrow(axis, to, rest).logical_or_(mask.narrow(axis, origin, rest))
        mask = wider
        covered += step
    return mask


def _published_blocks(x: Tensor, p: float, block_size: int, channels: int) -> Tensor:
    """The dropped pixels of the published rule; seeds are the first corners of whole blocks."""
    sizes = x.shape[2:]
    blocks = [min(block_size, n) for n in sizes]
    places = [n - k + 1 for n, k in zip(sizes, blocks, strict=True)]
    gamma = p * math.prod(sizes) / (math.prod(blocks) * math.prod(places))
    mask = torch.rand(x.shape[0], channels, *places, device=x.device) < gamma
    mask = F.pad(mask, [side for k in reversed(blocks) for side in (0, k - 1)])
    for axis, k in enumerate(blocks, start=2):
        mask = _smear(mask, axis, k - 1, ahead=True)
    return mask


def _calibrated_blocks(x: Tensor, p: float, block_size: int, channels: int) -> Tensor:
    """The dropped pixels of the default rule."""
    sizes = tuple(x.shape[2:])
    shape = (x.shape[0], channels, *sizes)
    intensity: float | Tensor
    if torch.compiler.is_compiling():  # p may be symbolic: it goes through the graph as a tensor
        intensity = _intensity(sizes, block_size, p, x.device)
    else:
        intensity = _cached_intensity(sizes, block_size, p)
    mean = torch.zeros((), device=x.device) + intensity
    slots = _slots(sizes, block_size, p, math.prod(shape))
    if slots is None or x.device.type not in _POISSON:
        seeds = torch.rand(shape, device=x.device) < -torch.expm1(-mean)
    else:
        seeds = _sparse_seeds(shape, mean * math.prod(shape), slots, x)
    return grow(seeds, *block_reach(block_size))


def _slots(sizes: tuple[int, ...], block_size: int, p: float, total: int) -> int | None:
    """How many seeds to reserve for, 8 standard deviations above the mean; None for too many.

    It depends on p through the next ceiling alone, so that compiled code serves many p.
    """
    before, _ = block_reach(block_size)
    fewest = math.prod([min(before, n - 1) + 1 for n in sizes])  # centres that cover a corner
    ceiling = next((c for c in _CEILINGS if p <= c), None)
    if ceiling is None:
        return None
    most = -math.log1p(-ceiling) / fewest * total
    slots = math.ceil(most + 8 * math.sqrt(most)) + 16
    return slots if slots * _DENSE <= total else None


def _sparse_seeds(shape: tuple[int, ...], mean: Tensor, slots: int, x: Tensor) -> Tensor:
    """A Poisson number of seeds, each anywhere in the mask, in the memory format of ``x``.

    Exactly as a coin of 1 - exp(-intensity) for each position, since hits are Poisson at each.
    """
    total = math.prod(shape)
    index = torch.randint(total, (slots,), device=x.device)
    count = torch.poisson(mean)
    used = torch.arange(slots, device=x.device) < count
    channels_last = _is_channels_last(x) and shape[1] == x.shape[1]
    if channels_last:  # the same pixels as in the other format, at their places in this one
        pixels = math.prod(shape[2:])
        plane, pixel = index // pixels, index % pixels
        index = (plane // shape[1] * pixels + pixel) * shape[1] + plane % shape[1]
    index = torch.where(used, index, total)  # a spare place beyond the mask
    seeds = torch.zeros(total + 1, dtype=torch.bool, device=x.device)
    seeds = seeds.index_fill_(0, index, True)[:total]
    if channels_last:
        return seeds.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    return seeds.view(shape)


def _is_channels_last(x: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if x.dim() not in formats or x.is_contiguous():
        return False
    return x.is_contiguous(memory_format=formats[x.dim()])


@lru_cache(maxsize=4096)
def _cached_intensity(sizes: tuple[int, ...], block_size: int, p: float) -> float:
    """`_intensity` as a plain float, on the CPU: no layer waits for its device."""
    return _intensity(sizes, block_size, p, torch.device("cpu")).item()


def _intensity(sizes: tuple[int, ...], block_size: int, p: float, device: torch.device) -> Tensor:
    """-log(1 - gamma): the u for which the mean of 1 - exp(-u n) is p, a float64 scalar.

    Newton's method on log(1 - mean), which is convex and nearly straight: from the left, where
    Jensen's inequality puts the start, it can neither overshoot nor leave the positive numbers.
    """
    exact = torch.float32 if device.type == "mps" else torch.float64  # it has no other
    reached = torch.ones(1, dtype=exact, device=device)
    share = torch.ones(1, dtype=exact, device=device)
    for size in sizes:
        counts, weights = _axis_counts(size, block_size)
        counts_here = torch.tensor(counts, dtype=exact, device=device)
        share_here = torch.tensor(weights, dtype=exact, device=device) / size
        reached = (reached[:, None] * counts_here).flatten()
        share = (share[:, None] * share_here).flatten()
    wanted = torch.log1p(-(torch.zeros((), dtype=exact, device=device) + p))
    u = -wanted / (share * reached).sum()
    for _ in range(_STEPS):
        dropped = -(share * torch.expm1(-u * reached)).sum()
        slope = (share * reached * torch.exp(-u * reached)).sum() / (1.0 - dropped)
        u = u + (torch.log1p(-dropped) - wanted) / slope
    return u


def _axis_counts(size: int, block_size: int) -> tuple[list[float], list[float]]:
    """How many centres reach a pixel along one axis, and how many pixels that is true of."""
    before, after = block_reach(block_size)
    pixels: dict[int, int] = {}
    edge = min(size, 2 * block_size)  # all further pixels are like the one in the middle of these
    for i in range(edge):
        j = i if i < edge // 2 else size - edge + i
        count = min(j + before, size - 1) - max(j - after, 0) + 1
        pixels[count] = pixels.get(count, 0) + 1
    if size > edge:
        pixels[block_size] = pixels.get(block_size, 0) + size - edge
    return [float(n) for n in pixels], [float(n) for n in pixels.values()]

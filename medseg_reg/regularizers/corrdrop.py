"""CorrDrop: drop the units that correlate least with the others, blocks of pixels or channels.

`row_correlation` is the paper's measure, `drop_probability` turns it into calibrated rates;
`corrdrop_spatial` and `corrdrop_channel` are the rules, each with its module.
"""

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
from medseg_reg.regularizers.drop_rates import check_temperature, drop_probability

__all__ = [
    "CorrDropChannel",
    "CorrDropSpatial",
    "corrdrop_channel",
    "corrdrop_spatial",
    "drop_probability",
    "row_correlation",
]

EPSILON = 1e-8
_MATRIX = 1 << 24  # elements of |A A^T| held at once: 64 MiB of float32
_SPLIT = 128  # units from which products of a quarter of them are still as fast for their size
_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def row_correlation(rows: Tensor, eps: float = EPSILON) -> Tensor:
    """The mean absolute correlation of every row with all rows, F in the paper.

    F_i = (1/N) sum_j |a_i . a_j / (|a_i| |a_j|) - delta_ij|, with |a| = sqrt(sum a^2 + eps).

    Args:
        rows: units with their features.
        eps: added to the squared norms, so that a zero row does not divide by zero.

    Shapes:
        rows (B, N, d); the result (B, N), float32. Memory beyond the input stays bounded: the
        N x N matrix is formed 64 MiB at a time.

    Raises:
        ValueError: rows of another shape.

    Paper:
        Y. Zeng, T. Dai, S.-T. Xia, ICASSP 2020, pp. 3742-3746, equations 1 to 3.

    Example:
        >>> import torch
        >>> rows = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 2], [1, 0, 0]]])
        >>> [round(f, 4) for f in row_correlation(rows)[0].tolist()]
        [0.3414, 0.1414, 0.4243, 0.0, 0.3414]
    """
    if rows.dim() != 3:
        raise ValueError(f"row_correlation: expected (B, N, d), got shape {tuple(rows.shape)}")
    return _correlation(rows, eps)[0]


def _correlation(rows: Tensor, eps: float = EPSILON) -> tuple[Tensor, Tensor]:
    """`row_correlation`, and which rows are not zero everywhere."""
    device = "cpu" if rows.is_meta else rows.device.type  # autocast knows no meta device
    with torch.no_grad(), torch.autocast(device, enabled=False):
        rows = rows.detach().float()
        squared = rows.square().sum(-1)
        inverse = (squared + eps).rsqrt()
        if _all_positive(rows):  # |a_i . a_j| = a_i . a_j, so the sum moves into the product
            mean = torch.bmm(inverse[:, None], rows)
            total = torch.bmm(rows, mean.transpose(1, 2)).squeeze(-1)
        else:
            total = _absolute_row_sums(rows, inverse)
        own = squared * inverse.square()
        return (total * inverse - own + (own - 1).abs()) / rows.shape[1], squared > 0


def _all_positive(rows: Tensor) -> bool:
    """Whether no feature is negative; answered only where asking costs no synchronisation."""
    if rows.device.type != "cpu" or torch.compiler.is_compiling() or rows.numel() == 0:
        return False
    return bool(rows.amin() >= 0)


def _absolute_row_sums(rows: Tensor, inverse: Tensor) -> Tensor:
    """sum_j |a_i . a_j| / |a_j|, for as many rows i at a time as the memory bound allows.

    The matrix is symmetric: each block of rows meets itself and those after it, and its products
    count for both. On CPU four blocks spare three eighths of the work; elsewhere one launch counts
    for more.
    """
    batch, units = inverse.shape
    step = max(1, _MATRIX // max(1, batch * units))
    if rows.device.type == "cpu" and units >= _SPLIT:
        step = min(step, -(-units // 4))
    columns, weight = rows.transpose(1, 2), inverse[..., None]
    total = torch.zeros_like(weight)
    for start in range(0, units, step):
        end = min(start + step, units)
        product = torch.bmm(rows[:, start:end], columns[:, :, start:]).abs_()
        total[:, start:end] += torch.bmm(product, weight[:, start:])
        later = product[:, :, end - start :].transpose(1, 2)
        total[:, end:] += torch.bmm(later, weight[:, start:end])
    return total.squeeze(-1)


def _published_keep(correlation: Tensor, p: float) -> Tensor:
    """The paper's mask Psi, 1 = keep: random twice over, and batch-wide in its second rate."""
    keep = torch.rand_like(correlation) < correlation.softmax(1)
    missing = (keep.numel() - keep.sum()).clamp(min=1)
    rate = (p * keep.numel() / missing).clamp(max=1.0)
    return keep | (torch.rand_like(correlation) >= rate)


def corrdrop_spatial(
    x: Tensor,
    p: float = 0.1,
    block_size: int = 5,
    temperature: float = 1.0,
    training: bool = True,
    *,
    faithful: bool = False,
) -> Tensor:
    """Zeroes blocks of pixels that correlate least with the others; see `CorrDropSpatial`.

    Example:
        >>> import torch
        >>> y = corrdrop_spatial(torch.rand(2, 8, 16, 16) + 1, p=0.3, block_size=4)
        >>> bool(((y == 0).all(1) == (y == 0).any(1)).all())  # one mask for all channels
        True
    """
    p = check_rate(p, "corrdrop_spatial")
    check_count(block_size, "block_size", "corrdrop_spatial")
    _check_temperature(temperature, faithful, "corrdrop_spatial")
    if not training or p == 0.0:
        return x
    check_map(x, "corrdrop_spatial")
    with torch.no_grad():
        exact = x.detach().float()  # torch has no average pooling of half volumes on CPU
        if faithful:
            scale = _published_spatial(exact, p, block_size)
        else:
            scale = _calibrated_spatial(exact, p, block_size, temperature)
        scale = scale[:, None].to(x.dtype)
    return x * scale


def _calibrated_spatial(x: Tensor, p: float, block_size: int, temperature: float) -> Tensor:
    """The factor (B, *spatial) of the default rule."""
    sizes = x.shape[2:]
    blocks = [min(block_size, (size + 1) // 2) for size in sizes]
    cells = [-(-size // block) for size, block in zip(sizes, blocks, strict=True)]
    # centred grid: what does not divide is cut off at both borders
    left = [(n * k - size) // 2 for n, k, size in zip(cells, blocks, sizes, strict=True)]
    pooled = _POOL[len(sizes)](  # divides by the real pixels of a cell alone
        x, blocks, blocks, left, ceil_mode=True, count_include_pad=False
    )
    area = torch.ones(1, device=x.device)
    for n, k, start, size in zip(cells, blocks, left, sizes, strict=True):
        edge = torch.arange(n, device=x.device) * k - start
        length = (edge + k).clamp(max=size) - edge.clamp(min=0)
        area = (area[:, None] * length).flatten()
    correlation, live = _correlation(pooled.flatten(2).transpose(1, 2))
    rate = drop_probability(correlation, p, temperature, area * live)
    keep = (torch.rand_like(rate) >= rate).view(-1, *cells)
    return _enlarge(keep, blocks, left, sizes) / (1.0 - p)


def _published_spatial(x: Tensor, p: float, block_size: int) -> Tensor:
    """The factor (B, *spatial) of the published rule, per axis: padding, pooling, Psi, rescale."""
    sizes = x.shape[2:]
    blocks = [k if k <= n else max(n - 1, 1) for k, n in ((block_size, n) for n in sizes)]
    pads = [-(-((k - n % k) % k) // 2) for k, n in zip(blocks, sizes, strict=True)]
    padded = F.pad(x, [pad for pad in reversed(pads) for _ in range(2)])
    pooled = _POOL[len(sizes)](padded, blocks, blocks)
    cells = list(pooled.shape[2:])
    rate = p / math.prod(blocks) * math.prod(sizes) / math.prod(cells)
    keep = _published_keep(row_correlation(pooled.flatten(2).transpose(1, 2)), rate)
    left = [(n * k - size) // 2 for n, k, size in zip(cells, blocks, sizes, strict=True)]
    return _rescale(_enlarge(keep.view(-1, *cells), blocks, left, sizes))


def _enlarge(keep: Tensor, blocks: list[int], left: list[int], sizes: torch.Size) -> Tensor:
    """Repeats each cell over its block and crops to the map."""
    for axis, (block, start, size) in enumerate(zip(blocks, left, sizes, strict=True), start=1):
        keep = keep.repeat_interleave(block, axis).narrow(axis, start, size)
    return keep.float()


def _rescale(keep: Tensor) -> Tensor:
    """Divides by the share of ones over the whole batch, as published; all zeros stay zeros."""
    return keep * (keep.numel() / keep.sum().clamp(min=1))


@register("corrdrop_spatial")
class CorrDropSpatial(Regularizer):
    """Zeroes blocks of pixels, over all channels, the more likely the less they correlate.

    The map is averaged over the blocks of a grid; F = `row_correlation` of the cells' channel
    vectors; cell i is dropped with probability q_i = `drop_probability` (F, p), independently;
    y = x * mask / (1 - p). The area-weighted mean of q is p in every sample, at every map size:
    cells that the border cuts off are averaged and weighted by their real pixels. Cells that are
    zero in every channel correlate with nothing, but there is nothing to drop: they take no part,
    and p is the share of the others.

    Args:
        p: share of pixels to drop, in [0, 1).
        block_size: side of a block. An axis is always cut into two blocks or more (one if it has
            a single pixel), so that small maps are not dropped whole.
        temperature: how sharply the rates fall with the correlation; infinity means uniform. See
            `drop_probability`.
        faithful: the published rule instead, see below.

    Shapes:
        (B, C, *spatial) with one to three spatial axes; the output is alike.

    Raises:
        ValueError: a bad parameter, a temperature together with ``faithful``, or an input of
            another shape or kind.

    Paper:
        Y. Zeng, T. Dai, S.-T. Xia, "CorrDrop: Correlation based dropout for convolutional neural
        networks", ICASSP 2020, pp. 3742-3746; Y. Zeng, T. Dai, B. Chen, S.-T. Xia, J. Lu,
        "Correlation-based structural dropout for convolutional neural networks", Pattern
        Recognition 120:108117, 2021.
        The published rule (``faithful=True``) takes 1 - softmax(F) for the rates. They differ by
        less than 1 % for 50 cells and more, so it drops almost uniformly, and less than p where
        the block does not divide the map (.083 instead of .1 for 32 x 32 and 5; nothing where
        the map is a single cell). It rescales over the whole batch. Unlike the published code,
        a block larger than the map is clamped for that call alone, each axis is padded by
        itself, and there is no ramp counted in forward calls: use a schedule.

    Example:
        >>> import torch
        >>> CorrDropSpatial(p=0.1, block_size=7)(torch.rand(2, 8, 30, 20)).shape
        torch.Size([2, 8, 30, 20])
    """

    unit = "block of pixels"
    paper = "Zeng et al., ICASSP 2020; Pattern Recognition 2021"

    def __init__(
        self,
        p: float = 0.1,
        block_size: int = 5,
        temperature: float = 1.0,
        faithful: bool = False,
    ) -> None:
        super().__init__(p)
        self.block_size = check_count(block_size, "block_size", type(self).__name__)
        self.temperature = _check_temperature(temperature, faithful, type(self).__name__)
        self.faithful = bool(faithful)

    def regularize(self, x: Tensor) -> Tensor:
        """Applies `corrdrop_spatial`."""
        return corrdrop_spatial(
            x, self.p, self.block_size, self.temperature, faithful=self.faithful
        )


def corrdrop_channel(
    x: Tensor,
    p: float = 0.1,
    temperature: float = 1.0,
    training: bool = True,
    *,
    faithful: bool = False,
) -> Tensor:
    """Zeroes channels that correlate least with the others; see `CorrDropChannel`.

    Example:
        >>> import torch
        >>> y = corrdrop_channel(torch.ones(2, 8, 4, 4), p=0.5)
        >>> sorted(set(y.flatten().tolist())) in ([0.0], [0.0, 2.0], [2.0])
        True
    """
    p = check_rate(p, "corrdrop_channel")
    _check_temperature(temperature, faithful, "corrdrop_channel")
    if not training or p == 0.0:
        return x
    check_map(x, "corrdrop_channel")
    with torch.no_grad():
        # a transposed product of a channels_last map is many times slower than this copy
        correlation, live = _correlation(x.detach().flatten(2).contiguous())
        if faithful:
            scale = _rescale(_published_keep(correlation, p).float())
        else:
            rate = drop_probability(correlation, p, temperature, live)
            scale = (torch.rand_like(rate) >= rate).float() / (1.0 - p)
        scale = scale.view(*scale.shape, *[1] * (x.dim() - 2)).to(x.dtype)
    return x * scale


@register("corrdrop_channel")
class CorrDropChannel(Regularizer):
    """Zeroes whole channels, the more likely the less they correlate with the others.

    F = `row_correlation` of the flattened channels; channel i is dropped with probability
    q_i = `drop_probability` (F, p), independently; y = x * mask / (1 - p). Channels that are zero
    everywhere take no part: they correlate with nothing, and would be dropped first, for nothing.
    The mean of q over the others is p in every sample. A single one, as in a map of one channel,
    is therefore zeroed as a whole with probability p, as by `SpatialDropout`.

    Args:
        p: share of channels to drop, in [0, 1).
        temperature: how sharply the rates fall with the correlation; infinity means uniform,
            which is `SpatialDropout`. See `drop_probability`.
        faithful: the published rule instead, see below.

    Shapes:
        (B, C, *spatial) with one to three spatial axes; the output is alike.

    Raises:
        ValueError: a bad parameter, a temperature together with ``faithful``, or an input of
            another shape or kind.

    Paper:
        As `CorrDropSpatial`. The published rule (``faithful=True``) takes 1 - softmax(F) for the
        rates, which lie within .983 to .986 before scaling for 64 channels: almost uniform. It
        rescales over the whole batch and never drops a single channel. The published file
        returns a pair while training and cannot run in its own network; this returns the map.

    Example:
        >>> import torch
        >>> CorrDropChannel(p=0.2)(torch.rand(2, 8, 6, 6, 6)).shape
        torch.Size([2, 8, 6, 6, 6])
    """

    unit = "channel"
    paper = "Zeng et al., ICASSP 2020; Pattern Recognition 2021"

    def __init__(self, p: float = 0.1, temperature: float = 1.0, faithful: bool = False) -> None:
        super().__init__(p)
        self.temperature = _check_temperature(temperature, faithful, type(self).__name__)
        self.faithful = bool(faithful)

    def regularize(self, x: Tensor) -> Tensor:
        """Applies `corrdrop_channel`."""
        return corrdrop_channel(x, self.p, self.temperature, faithful=self.faithful)


def _check_temperature(temperature: float, faithful: bool, owner: str) -> float:
    value = check_temperature(temperature, owner)
    if faithful and value != 1.0:
        raise ValueError(
            f"{owner}: the published rule has no temperature; got faithful=True with "
            f"temperature={temperature!r}. Drop one of the two."
        )
    return value

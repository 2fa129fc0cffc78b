"""Triton kernels of Heuristic Dropout; importing this module imports Triton.

`operators.py` decides when they are used. The plain rules that they equal are
`histogram.plain_sums` and `planes.plain_filter`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["filter_planes", "sum_levels"]

# Values of a tile, and values that one program goes through.
_TILE, _SHARE = 2048, 1 << 16


@triton.jit  # type: ignore[untyped-decorator]
def _sums_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    out_ptr,
    thresholds: tl.constexpr,
    channels,
    pixels,
    share,
    batch_stride,
    channel_stride,
    pixel_stride,
    LEVELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Mean, squared deviations and counts of some channels of a sample over a share of its pixels.

    One read of the map. Deviations of a tile are taken from the mean of that tile, while it is in
    registers, and tiles are put together by the formula of Chan, Golub and LeVeque (1979): nothing
    cancels, however far the mean is from 0.
    """
    part = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    sample = tl.program_id(2)
    begin = part * share
    end = tl.minimum(begin + share, pixels)
    there = channel < channels
    base = (
        x_ptr
        + sample.to(tl.int64) * batch_stride
        + (channel[:, None].to(tl.int64) * channel_stride)
    )
    column = tl.arange(0, COLUMNS)
    mean = tl.zeros([BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_C], tl.float32)
    counts = tl.zeros([BLOCK_C, COLUMNS], tl.float32)
    seen = tl.zeros([BLOCK_C], tl.float32)
    for start in range(begin, end, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        inside = there[:, None] & (pixel < end)[None, :]
        value = tl.load(base + pixel[None, :] * pixel_stride, mask=inside, other=0.0)
        value = value.to(tl.float32)
        number = tl.minimum(end - start, BLOCK_P).to(tl.float32)
        middle = tl.sum(value, axis=1) / number
        apart = tl.where(inside, value - middle[:, None], 0.0)
        step = middle - mean
        total = seen + number
        mean += step * (number / total)
        squares += tl.sum(apart * apart, axis=1) + step * step * (seen * number / total)
        seen = total
        for level in tl.static_range(LEVELS):
            reached = tl.where(inside & (value >= thresholds[level]), 1.0, 0.0)
            found = tl.sum(reached, axis=1)
            counts += tl.where(column[None, :] == level + 2, found[:, None], 0.0)
    result = tl.where(column[None, :] == 0, mean[:, None], counts)
    result = tl.where(column[None, :] == 1, squares[:, None], result)
    row = (part * tl.num_programs(2) + sample) * channels + channel
    where = out_ptr + row[:, None].to(tl.int64) * (LEVELS + 2) + column[None, :]
    tl.store(where, result, mask=there[:, None] & (column < LEVELS + 2)[None, :])


def sum_levels(x: Tensor, thresholds: tuple[float, ...]) -> Tensor:
    """Squared deviations of every channel, and how many values reach each threshold.

    The counts are those of `histogram.plain_sums`; the deviations equal its within rounding.

    Shapes:
        x (B, C, *spatial), float32, float16 or bfloat16 in any layout; the result
        (B, C, 1 + len(thresholds)), float32.
    """
    batch, channels = x.shape[:2]
    flat = x.reshape(batch, channels, -1)  # a view of contiguous and of channels_last maps
    pixels = flat.shape[2]
    # Neighbours in memory belong together in a tile: pixels, or the channels of channels_last.
    together = triton.next_power_of_2(channels) if flat.stride(1) == 1 and pixels > 1 else 1
    block_c = min(32, together)
    block_p = min(_TILE // block_c, max(16, triton.next_power_of_2(pixels)))
    share = triton.cdiv(min(pixels, _SHARE // block_c), block_p) * block_p
    parts, levels = triton.cdiv(pixels, share), len(thresholds)
    out = torch.empty((parts, batch, channels, levels + 2), dtype=torch.float32, device=x.device)
    _sums_kernel[(parts, triton.cdiv(channels, block_c), batch)](
        flat,
        out,
        thresholds,
        channels,
        pixels,
        share,
        *flat.stride(),
        LEVELS=levels,
        COLUMNS=triton.next_power_of_2(levels + 2),
        BLOCK_C=block_c,
        BLOCK_P=block_p,
    )
    return _together(out, pixels, share)


def _together(parts: Tensor, pixels: int, share: int) -> Tensor:
    """Put the sums over shares of the pixels together."""
    squares = parts[..., 1:]
    if len(parts) == 1:
        return squares[0].contiguous()
    number = parts.new_full((len(parts), 1, 1), share)
    number[-1] = pixels - share * (len(parts) - 1)
    means = parts[..., 0]
    middle = (means * (number / pixels)).sum(0)
    between = ((means - middle).square() * number).sum(0)
    total = squares.sum(0)
    return torch.cat([(total[..., 0] + between)[..., None], total[..., 1:]], dim=-1)


@triton.jit  # type: ignore[untyped-decorator]
def _planes_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    out_ptr,
    index_ptr,
    chosen_ptr,
    number,
    height,
    width,
    x_batch,
    x_channel,
    x_row,
    x_column,
    out_batch,
    out_channel,
    out_row,
    out_column,
    ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes zeros or the Laplacian of a chosen plane over its copy; other planes stay."""
    # On one axis of the grid: the others end at 65535, and planes may be more.
    blocks = tl.cdiv(height * width, BLOCK)
    place = tl.program_id(0) // blocks
    if tl.load(chosen_ptr + place) != 0:
        sample = (place // number).to(tl.int64)
        channel = tl.load(index_ptr + place).to(tl.int64)
        pixel = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
        row, column = pixel // width, pixel % width
        inside = pixel < height * width
        total = tl.zeros([BLOCK], tl.float32)
        if not ZERO:
            source = x_ptr + sample * x_batch + channel * x_channel
            for down in tl.static_range(-1, 2):
                for right in tl.static_range(-1, 2):
                    r, c = row + down, column + right
                    there = inside & (r >= 0) & (r < height) & (c >= 0) & (c < width)
                    value = tl.load(source + r * x_row + c * x_column, mask=there, other=0.0)
                    total -= value.to(tl.float32)
            centre = source + row * x_row + column * x_column
            total += 9.0 * tl.load(centre, mask=inside, other=0.0).to(tl.float32)
        target = out_ptr + sample * out_batch + channel * out_channel
        tl.store(target + row * out_row + column * out_column, total, mask=inside)


def filter_planes(x: Tensor, index: Tensor, chosen: Tensor, zero: bool) -> Tensor:
    """A copy of the map with some channels replaced by their Laplacian, or by zeros.

    Shapes:
        x (B, C, H, W), float32, float16 or bfloat16 in any layout; index and chosen (B, n), integer
        and bool; the result is alike x.
    """
    out = x.clone()
    height, width = x.shape[2:]
    if not index.numel():
        return out
    block = min(1024, triton.next_power_of_2(height * width))
    _planes_kernel[(triton.cdiv(height * width, block) * index.numel(),)](
        x,
        out,
        index.contiguous(),
        chosen.contiguous().to(torch.int8),
        index.shape[1],
        height,
        width,
        *x.stride(),
        *out.stride(),
        ZERO=zero,
        BLOCK=block,
    )
    return out

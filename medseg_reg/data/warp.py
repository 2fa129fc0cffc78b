"""Geometric and smoothing steps of augmentation on batches, as OpenCV computes them on slices."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# OpenCV's numbers. It interpolates by areas only when it resizes: elsewhere linearly.
MODES = {0: "nearest", 1: "bilinear", 2: "bicubic", 3: "bilinear"}
CONSTANT, REPLICATE, REFLECT, REFLECT_101 = 0, 1, 2, 4
# How `grid_sample` calls a border, and whether it mirrors at the centres of the outermost pixels.
_BORDERS = {
    CONSTANT: ("zeros", False),
    REPLICATE: ("border", False),
    REFLECT: ("reflection", False),
    REFLECT_101: ("reflection", True),
}
BORDERS = tuple(_BORDERS)


def bring(values: Tensor, device: torch.device) -> Tensor:
    """Copy a small tensor of the CPU to a device, without waiting for what the device computes."""
    if device.type == "cuda":
        # By way of pinned memory: a copy from other memory waits for all that was asked before.
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def pixel_grid(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the columns (1, 1, W) and rows (1, H, 1) of the pixels of a slice, float32."""
    x = torch.arange(width, device=device, dtype=torch.float32)
    y = torch.arange(height, device=device, dtype=torch.float32)
    return x[None, None], y[None, :, None]


def affine_grid(inverse: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return where each pixel of a result comes from under affine maps.

    Args:
        inverse: (B, 2, 3), from a (column, row) of the result to that of the source.
        height: rows of a slice.
        width: columns of a slice.

    Returns:
        Columns and rows of the source, each (B, H, W).
    """
    x, y = pixel_grid(height, width, inverse.device)
    a = inverse[:, :, :, None, None]
    return (
        a[:, 0, 0] * x + a[:, 0, 1] * y + a[:, 0, 2],
        a[:, 1, 0] * x + a[:, 1, 1] * y + a[:, 1, 2],
    )


def remap(images: Tensor, x: Tensor, y: Tensor, mode: str, border: int, fill: Tensor) -> Tensor:
    """Read images at real positions, as `cv2.remap` does.

    OpenCV rounds positions to 1/32 pixel when it interpolates; here they are not rounded.

    Args:
        images: (B, C, H, W) float32.
        x: columns to read at, (B, H, W).
        y: rows to read at, (B, H, W).
        mode: `nearest`, `bilinear` or `bicubic`.
        border: what lies outside: `CONSTANT`, `REPLICATE`, `REFLECT` or `REFLECT_101`.
        fill: (C,), the values outside of a constant border.

    Returns:
        (B, C, H, W).
    """
    if mode == "nearest":
        return _nearest(images, x, y, border, fill)
    padding, corners = _BORDERS[border]
    height, width = images.shape[2:]
    if corners:
        grid = [2 * x / max(width - 1, 1) - 1, 2 * y / max(height - 1, 1) - 1]
    else:
        grid = [(2 * x + 1) / width - 1, (2 * y + 1) / height - 1]
    # Zeros are what lies outside: less the fill, they are the fill.
    fill = fill[:, None, None]
    shifted = images - fill if border == CONSTANT else images
    read = functional.grid_sample(shifted, torch.stack(grid, -1), mode, padding, corners)
    return read + fill if border == CONSTANT else read


def remap_labels(masks: Tensor, x: Tensor, y: Tensor, border: int) -> Tensor:
    """Read masks (B, H, W) at real positions: the nearest label, never a mixture; outside, 0."""
    return _nearest(masks[:, None], x, y, border, masks.new_zeros(1))[:, 0]


def _nearest(images: Tensor, x: Tensor, y: Tensor, border: int, fill: Tensor) -> Tensor:
    height, width = images.shape[2:]
    column, row = (torch.floor(v + 0.5).long() for v in (x, y))
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    index = _within(row, height, border) * width + _within(column, width, border)
    flat = index.flatten(1)[:, None].expand(-1, images.shape[1], -1)
    read = images.flatten(2).gather(2, flat).view_as(images)
    if border != CONSTANT:
        return read
    return torch.where(inside[:, None], read, fill[:, None, None])


def _within(index: Tensor, size: int, border: int) -> Tensor:
    """Bring indices beyond an axis back to it."""
    if border in (CONSTANT, REPLICATE) or size == 1:
        return index.clamp(0, size - 1)
    if border == REFLECT:
        index = index.remainder(2 * size)
        return torch.minimum(index, 2 * size - 1 - index)
    index = index.remainder(2 * size - 2)
    return torch.minimum(index, 2 * size - 2 - index)


def filter_separably(images: Tensor, kernels: Tensor, border: int) -> Tensor:
    """Correlate each image of a batch with its own kernel, along rows and along columns.

    By products with a matrix for each axis: on a GPU a convolution of float32 may round to TF32,
    and so 400 taps cost no more than 3.

    Args:
        images: (B, C, H, W) float32.
        kernels: (B, K), or (1, K) for all, with odd K.
        border: `REPLICATE` or `REFLECT_101`.

    Returns:
        (B, C, H, W).
    """
    rows, columns = (_filter_matrix(kernels, size, border)[:, None] for size in images.shape[2:])
    return rows @ images @ columns.mT


def _filter_matrix(kernels: Tensor, size: int, border: int) -> Tensor:
    """Return the matrices (B, size, size) that correlate an axis with kernels."""
    count = kernels.shape[1]
    taps = torch.arange(count, device=kernels.device) - count // 2
    read = _within(torch.arange(size, device=kernels.device)[:, None] + taps, size, border)
    matrix = kernels.new_zeros(len(kernels), size, size)
    return matrix.scatter_add_(
        2, read.expand(len(kernels), -1, -1), kernels[:, None].expand(-1, size, -1)
    )

"""Images as tensors brought to the size that a network takes, as OpenCV does it for arrays.

What `medseg_reg.data.preprocessing.Fit` does to one slice on its way into a network, these
functions do to a batch, so that it can be a part of a network. All of them can be compiled by
`torch.jit.script`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def fitted(x: Tensor, fit: str, outer: list[int]) -> Tensor:
    """Bring images (B, C, H, W) to the size `outer`, by `resize`, `letterbox` or `crop`."""
    inner = inner_size(fit, [x.shape[2], x.shape[3]], outer)
    return functional.pad(to_size(shrunk(x, inner), inner), margins(inner, outer))


def unfitted(x: Tensor, fit: str, source: list[int]) -> Tensor:
    """Bring maps back to the size `source` of images that were `fitted`; 0 where they were cut."""
    outer = [x.shape[2], x.shape[3]]
    inner = inner_size(fit, source, outer)
    return to_size(functional.pad(x, margins(outer, inner)), source)


def inner_size(fit: str, source: list[int], outer: list[int]) -> list[int]:
    """Return the size that a slice is scaled to, before it is cut or padded.

    >>> inner_size("letterbox", [40, 20], [16, 16]), inner_size("crop", [40, 20], [16, 16])
    ([16, 8], [40, 20])
    """
    if fit == "resize":
        return outer
    if fit != "letterbox":
        return source
    scale = min(outer[0] / source[0], outer[1] / source[1])
    # TorchScript rounds to a float.
    return [max(1, int(round(n * scale))) for n in source]  # noqa: RUF046


def shrunk(x: Tensor, size: list[int]) -> Tensor:
    """Shrink each axis of (B, C, H, W) that is larger than `size`, by the mean of areas."""
    rows, columns = x.shape[2], x.shape[3]
    if size[0] < rows:
        x = torch.matmul(areas(rows, size[0], x), x)
    if size[1] < columns:
        x = torch.matmul(x, areas(columns, size[1], x).transpose(0, 1))
    return x


def areas(have: int, want: int, like: Tensor) -> Tensor:
    """Return the share of each of `have` pixels in each of `want` larger ones (want, have)."""
    scale = have / want
    number = torch.arange(want, dtype=torch.float64, device=like.device)[:, None]
    pixel = torch.arange(have, dtype=torch.float64, device=like.device)[None]
    stop = torch.minimum((number + 1) * scale, pixel + 1)
    share = stop - torch.maximum(number * scale, pixel)
    # OpenCV leaves out what is touched by less.
    share = torch.where(share > 1e-3, share, torch.zeros_like(share))
    return (share / scale).to(like.dtype)


def to_size(x: Tensor, size: list[int]) -> Tensor:
    """Enlarge (B, C, H, W), or bring it back, by linear interpolation."""
    if x.shape[2] == size[0] and x.shape[3] == size[1]:
        return x
    return functional.interpolate(x, size, mode="bilinear", align_corners=False)


def margins(have: list[int], want: list[int]) -> list[int]:
    """Return what `pad` adds, or takes where negative, so that the middle stays the middle."""
    pads: list[int] = []
    for axis in (1, 0):
        more = want[axis] - have[axis]
        before = more // 2 if more >= 0 else -(-more // 2)
        pads += [before, more - before]
    return pads

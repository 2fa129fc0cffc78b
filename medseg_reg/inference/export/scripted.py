"""What TorchScript wraps around a network, so that sizes are not those of the example.

A trace keeps the numbers that Python computed from the example's size; a script computes them anew.
So what depends on the size stands here and is scripted, and the network inside is traced.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from medseg_reg.data.preprocessing import ImageSpec


class AnySize(nn.Module):
    """A network behind padding to a multiple of `factor`, which repeats the border.

    Args:
        network: maps (B, C, H, W) to (B, K, H, W), for H and W that are multiples of `factor`.
        factor: the number.
        two_at_least: see `medseg_reg.networks.padding.pad_to_multiple`.
    """

    def __init__(self, network: nn.Module, factor: int, two_at_least: bool = False) -> None:
        super().__init__()
        self.network = network
        self.factor = factor
        self.two_at_least = two_at_least

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, K, H, W)."""
        rows, columns = x.shape[2], x.shape[3]
        pads = [0, -columns % self.factor, 0, -rows % self.factor]
        if self.two_at_least and rows <= self.factor and columns <= self.factor:
            pads = [0, 2 * self.factor - columns, 0, 2 * self.factor - rows]
        logits: Tensor = self.network(functional.pad(x, pads, mode="replicate"))
        return logits[:, :, :rows, :columns]


class OneSize(nn.Module):
    """A network that was traced with a size and would be wrong for another, which it refuses.

    Args:
        network: maps (B, C, rows, columns) to (B, K, rows, columns).
        rows: the size.
        columns: the size.
    """

    def __init__(self, network: nn.Module, rows: int, columns: int) -> None:
        super().__init__()
        self.network = network
        self.rows, self.columns = rows, columns

    def forward(self, x: Tensor) -> Tensor:
        """Map images to logits."""
        if x.shape[2] != self.rows or x.shape[3] != self.columns:
            raise ValueError(
                f"images are {x.shape[2]}x{x.shape[3]}, expected {self.rows}x{self.columns}"
            )
        logits: Tensor = self.network(x)
        return logits


class WholeSlices(nn.Module):
    """A network that takes slices of their own size and gives class probabilities of that size.

    It does what `medseg_reg.data.preprocessing.Fit` and `medseg_reg.networks.build.probabilities`
    do around the network: the same slices give the same probabilities, up to rounding.

    Args:
        network: maps images (B, C, H, W) to logits (B, K, H, W); K = 1 means sigmoid.
        spec: the size that slices get, and how.
    """

    def __init__(self, network: nn.Module, spec: ImageSpec) -> None:
        super().__init__()
        self.network = network
        self.rows, self.columns = spec.size or (0, 0)
        self.fit = "none" if spec.size is None else str(spec.fit)

    def forward(self, x: Tensor) -> Tensor:
        """Map slices (B, C, H, W), 0 to 1, to class probabilities (B, max(K, 2), H, W)."""
        source = [x.shape[2], x.shape[3]]
        outer = source if self.fit == "none" else [self.rows, self.columns]
        inner = self.inner(source, outer)
        x = to_size(shrunk(x, inner), inner)
        logits = self.network(functional.pad(x, margins(inner, outer))).float()
        if logits.shape[1] == 1:
            foreground = torch.sigmoid(logits)
            p = torch.cat([1 - foreground, foreground], dim=1)
        else:
            p = torch.softmax(logits, dim=1)
        return to_size(functional.pad(p, margins(outer, inner)), source)

    def inner(self, source: list[int], outer: list[int]) -> list[int]:
        """Return the size that a slice is scaled to, before it is cut or padded."""
        if self.fit == "resize":
            return outer
        if self.fit != "letterbox":
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

"""What TorchScript wraps around a network, so that sizes are not those of the example.

A trace keeps the numbers that Python computed from the example's size; a script computes them anew.
So what depends on the size stands here and is scripted, and the network inside is traced.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from medseg_reg.data.preprocessing import ImageSpec
from medseg_reg.networks.build import probabilities
from medseg_reg.networks.fitting import fitted, unfitted


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
        p = probabilities(self.network(fitted(x, self.fit, outer)))
        return unfitted(p, self.fit, source)


class Joined(nn.Module):
    """Two networks of which the finer one takes in what the coarse one says.

    It does what `medseg_reg.networks.reuse.Coarse` does in front of the finer network.

    Args:
        coarse: maps images to logits.
        network: maps images, with what the coarse network says as further channels, to logits.
        size: what images get for the coarse network; None where it takes them as they are.
        fit: how they get it.
        logits: whether the logits are joined, and not the probabilities.
    """

    def __init__(
        self,
        coarse: nn.Module,
        network: nn.Module,
        size: tuple[int, int] | None,
        fit: str,
        logits: bool,
    ) -> None:
        super().__init__()
        self.coarse, self.network = coarse, network
        self.rows, self.columns = size or (0, 0)
        self.fit, self.logits = "none" if size is None else fit, logits

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, K, H, W)."""
        source = [x.shape[2], x.shape[3]]
        outer = source if self.fit == "none" else [self.rows, self.columns]
        told = unfitted(self.coarse(fitted(x, self.fit, outer)), self.fit, source)
        if not self.logits:
            told = probabilities(told)
        logits: Tensor = self.network(torch.cat([x, told.to(x.dtype)], dim=1))
        return logits

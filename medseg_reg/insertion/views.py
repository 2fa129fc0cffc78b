"""How a layer sees a tensor that is no map: with channels, or heads, on the second axis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Layer = Callable[[Tensor], Tensor]


def idle(layer: Layer, x: Tensor) -> bool:
    """Whether a layer does nothing in a network that is exported: the graph shows no trace then."""
    return torch.compiler.is_exporting() and layer(x) is x


@dataclass(frozen=True)
class View:
    """The tensor is a map (B, C, *spatial) already."""

    def __call__(self, layer: Layer, x: Tensor) -> Tensor:
        """Return what the layer makes of a tensor; the very same tensor if it changes nothing."""
        return layer(x)


MAP = View()


@dataclass(frozen=True)
class ChannelsLast(View):
    """Tokens (B, N, C) or (B, H, W, C) are seen as (B, C, N) or (B, C, H, W)."""

    def __call__(self, layer: Layer, x: Tensor) -> Tensor:
        """Return what the layer makes of tokens."""
        if idle(layer, x):
            return x
        seen = x.movedim(-1, 1)
        y = layer(seen)
        return x if y is seen else y.movedim(1, -1)


@dataclass(frozen=True)
class Heads(View):
    """Heads side by side (B, N, H * d) are seen as (B, H, N, d).

    In an attention of windows the axis of the batch has all windows of the first sample, then
    those of the second, and so on; all of a sample are seen as one map (B, H, windows * n, d), so
    that whatever is drawn for a sample holds in all of its windows.

    Attributes:
        heads: how many.
    """

    heads: int = 1

    def __call__(self, layer: Layer, x: Tensor) -> Tensor:
        """Return what the layer makes of the heads."""
        if idle(layer, x):
            return x
        samples = getattr(layer, "samples", None)
        if not samples or x.shape[0] % samples:
            samples = x.shape[0]
        seen = x.reshape(samples, -1, self.heads, x.shape[-1] // self.heads).transpose(1, 2)
        y = layer(seen)
        return x if y is seen else y.transpose(1, 2).reshape(x.shape)

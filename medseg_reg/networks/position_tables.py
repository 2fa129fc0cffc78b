"""Learned positions of a transformer, brought to another size of the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# The names in MONAI, timm and torchvision.
TABLES = ("position_embeddings", "pos_embed", "pos_embedding")


def resize_table(
    table: Tensor, before: Sequence[int], after: Sequence[int], prefix: int = 0
) -> Tensor:
    """Interpolate positions (1, prefix + N, C) of one grid of patches to another; bicubic.

    Args:
        table: the positions, row after row, behind those of class tokens.
        before: rows and columns of the grid that it is for.
        after: those that are wanted.
        prefix: class tokens in front, which are kept as they are.

    >>> resize_table(torch.ones(1, 5, 3), (2, 2), (3, 4), prefix=1).shape
    torch.Size([1, 13, 3])
    """
    front, grid = table[:, :prefix], table[:, prefix:]
    maps = grid.float().transpose(1, 2).unflatten(2, tuple(before))
    maps = functional.interpolate(maps, tuple(after), mode="bicubic", antialias=True)
    return torch.cat([front, maps.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


def fitting_table(network: nn.Module, name: str, table: Tensor) -> Tensor | None:
    """Return positions of a file in the size that a network has, or None if that cannot be told.

    The grid of the file is the one with the proportions of the network's, or a square.

    Args:
        network: what has the positions.
        name: its tensor of positions.
        table: that of the file.
    """
    path, _, last = name.rpartition(".")
    mine: Any = getattr(network.get_submodule(path), last) if last in TABLES else None
    if mine is None or table.ndim != 3 or table.shape[::2] != mine.shape[::2]:
        return None
    after = _grid(network, path)
    prefix = -1 if after is None else mine.shape[1] - math.prod(after)
    if after is None or prefix < 0:
        return None
    patches = table.shape[1] - prefix
    rows = round(math.sqrt(max(0, patches) * after[0] / after[1]))
    sides = ((rows, patches // max(1, rows)), (math.isqrt(max(0, patches)),) * 2)
    before = next((one for one in sides if math.prod(one) == patches > 0), None)
    return None if before is None else resize_table(table, before, after, prefix)


def _grid(network: nn.Module, path: str) -> tuple[int, int] | None:
    """Return rows and columns of the patches of a transformer that has a table at a path."""
    owner: Any = network.get_submodule(path)
    grid = getattr(getattr(owner, "patch_embed", None), "grid_size", None)  # timm
    if grid is None:
        grid = getattr(getattr(network, "network", network), "feat_size", None)  # UNETR
    if grid is None or len(grid) != 2:
        return None
    return int(grid[0]), int(grid[1])

"""Tokens between processes: all-to-all with a gradient, and a coin that all agree on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["agreed_coin", "all_to_all", "exchange_counts", "machine"]

_groups: dict[int, Any] = {}


def machine() -> tuple[int, int]:
    """The number of this process and how many there are; (0, 1) where nothing is distributed.

    Example:
        >>> machine()
        (0, 1)
    """
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def agreed_coin(device: torch.device) -> Tensor:
    """A number from [0, 1), which is that of process 0 in every process.

    Every process must ask at the same time, and draws from its own generator all the same. Where no
    gradients are computed a process tosses alone: it may be the only one that looks at a network.

    Example:
        >>> 0 <= agreed_coin(torch.device("cpu")).item() < 1
        True
    """
    coin = torch.rand((), device=device)
    if machine()[1] > 1 and torch.is_grad_enabled():
        dist.broadcast(coin, src=0)
    return coin


def all_to_all(rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    """Send the first sent[0] rows to process 0, the next to process 1, and so on.

    Every process must call it at the same time. Its gradient takes the way back.

    Args:
        rows: (sum of sent, ...).
        sent: rows for each process.
        received: rows from each process.

    Returns:
        (sum of received, ...), in the order of the processes.
    """
    result: Tensor = _AllToAll.apply(rows, tuple(sent), tuple(received))
    return result


def exchange_counts(counts: Tensor, sent: Sequence[int], own: int) -> Tensor:
    """Tell every process how many rows it will get for each of its experts.

    Args:
        counts: rows for each expert of all processes.
        sent: how many experts each process has.
        own: how many this one has.

    Returns:
        (processes, own).
    """
    world = len(sent)
    result = counts.new_empty(world * own)
    dist.all_to_all_single(result, counts, [own] * world, list(sent), group=_group())
    return result.view(world, own)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: tuple[int, ...], received: tuple[int, ...]) -> Tensor:
        ctx.sent, ctx.received = sent, received
        return _moved(rows, sent, received)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _moved(gradients[0], ctx.received, ctx.sent), None, None


def _moved(rows: Tensor, sent: tuple[int, ...], received: tuple[int, ...]) -> Tensor:
    result = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(result, rows.contiguous(), list(received), list(sent), group=_group())
    return result


def _group() -> Any:
    """A group of its own: among the gradients that DDP sums up, the order of calls may differ."""
    key = id(dist.group.WORLD)
    if key not in _groups:
        _groups.clear()
        _groups[key] = dist.new_group()
    return _groups[key]

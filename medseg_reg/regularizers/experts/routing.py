"""Which tokens go to which experts of a sparsely gated mixture, and the balance between experts."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Assignments", "assign", "balance_loss", "expert_capacity"]


class Assignments(NamedTuple):
    """Tokens on their way to experts, sorted by expert.

    Attributes:
        tokens: which token each assignment is of, (A,).
        experts: to which expert it goes, (A,), ascending.
        weights: by how much its answer counts, (A,), float32.
    """

    tokens: Tensor
    experts: Tensor
    weights: Tensor


def expert_capacity(tokens: int, experts: int, top: int, factor: float) -> int:
    """How many tokens an expert takes: ceil(factor * top * tokens / experts), at least 1.

    Example:
        >>> expert_capacity(tokens=100, experts=8, top=1, factor=1.25)
        16
    """
    return max(1, math.ceil(factor * top * tokens / experts - 1e-9))


def assign(gates: Tensor, top: int = 1, capacity: int | None = None) -> Assignments:
    """Send each token to its `top` experts of the highest gates, as far as there is room.

    With one expert a token, its answer is weighted by the gate itself, as in the Switch
    Transformer; with two, by the gates divided by their sum, as in GShard. A gate of 0 is no
    assignment. Where an expert is full, first choices go before second ones, and among them those
    of a higher gate: in order of position, which language models use, tokens at the end of the
    last image of a batch would be left out most often.

    Args:
        gates: (T, E), at least 0; their gradient flows into the weights.
        top: 1 or 2.
        capacity: how many tokens an expert takes; None for all that come.

    Returns:
        The assignments, sorted by expert; a token that found no room is in none.

    Example:
        >>> import torch
        >>> gates = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
        >>> assign(gates, capacity=1).tokens.tolist()  # the second token found expert 0 full
        [0, 2]
    """
    weights, experts = gates.float().topk(top, dim=1)
    if top > 1:
        weights = weights / weights.sum(1, keepdim=True).clamp_min(1e-9)
    # First choices of all tokens, then second ones.
    weights, experts = weights.t().flatten(), experts.t().flatten()
    tokens = torch.arange(len(gates), device=gates.device).repeat(top)
    kept = weights > 0
    if capacity is not None:
        kept = kept & _with_room(gates, experts, tokens, kept, capacity)
    chosen = kept.nonzero().squeeze(1)
    chosen = chosen[experts[chosen].argsort(stable=True)]
    return Assignments(tokens[chosen], experts[chosen], weights[chosen])


def _with_room(
    gates: Tensor, experts: Tensor, tokens: Tensor, wanted: Tensor, capacity: int
) -> Tensor:
    """Whether each wanted assignment is among the first `capacity` of its expert."""
    with torch.no_grad():
        rank = torch.arange(len(experts), device=gates.device) // max(1, len(gates))
        # Gates are at most 1, so every first choice stands before every second one.
        order = (gates[tokens, experts].float() - 2.0 * rank).argsort(descending=True, stable=True)
        coming = torch.nn.functional.one_hot(experts[order], gates.shape[1])
        coming = coming * wanted[order].unsqueeze(1)
        before = coming.cumsum(0).gather(1, experts[order].unsqueeze(1)).squeeze(1)
        room = torch.empty_like(wanted)
        room[order] = before <= capacity
    return room


def balance_loss(gates: Tensor) -> Tensor:
    """What is least when all experts are chosen equally often: E * sum_e f_e P_e.

    f_e is the share of tokens whose highest gate is that of expert e, P_e the mean of its gates.
    It is 1 for a uniform choice and E if one expert gets everything; the gradient flows through
    P_e alone.

    Args:
        gates: softmax of the router, (T, E).

    Paper:
        W. Fedus, B. Zoph, N. Shazeer, "Switch Transformers: Scaling to Trillion Parameter Models
        with Simple and Efficient Sparsity", JMLR 23, 2022, arXiv 2101.03961, equations 4 to 6.

    Example:
        >>> import torch
        >>> balance_loss(torch.tensor([[1.0, 0.0], [1.0, 0.0]])).item()
        2.0
        >>> balance_loss(torch.tensor([[1.0, 0.0], [0.0, 1.0]])).item()
        1.0
    """
    gates = gates.float()
    count = gates.shape[1]
    first = torch.nn.functional.one_hot(gates.argmax(1), count).float().mean(0)
    return count * (first * gates.mean(0)).sum()

"""Attention as a guide: the rates of tokens that follow from it, and what its layers share."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from medseg_reg.regularizers.attention_weights import check_tokens
from medseg_reg.regularizers.base import Regularizer, check_rate
from medseg_reg.regularizers.coins import drop_exactly
from medseg_reg.regularizers.drop_rates import water_level

__all__ = [
    "GuidedDropout",
    "attention_share",
    "guided_rates",
    "kept_tokens",
    "received_attention",
]

_LEAST, _WIDEST = 1e-6, 30.0  # a score below, and a log of a ratio above, change nothing more


def received_attention(weights: Tensor) -> Tensor:
    """The attention that each key gets, u_j = mean over heads h and queries i of M A_ihj.

    Rows of attention weights sum to 1, so its mean over the M keys is 1.

    Shapes:
        weights (B, heads, queries, keys); the result (B, keys), float32, without a gradient.

    Example:
        >>> import torch
        >>> received_attention(torch.tensor([[[[0.5, 0.5], [0.9, 0.1]]]]))
        tensor([[1.4000, 0.6000]])
    """
    with torch.no_grad():
        return weights.detach().float().mean((1, 2)) * weights.shape[-1]


def guided_rates(
    scores: Tensor, p: float, beta: float = 1.0, p_max: float = 0.5, area: Tensor | None = None
) -> Tensor:
    """Drop rates p_j = min(p_max, c u_j^beta), with c such that their mean is p in every sample.

    Without the solution for c, the cap lets the mean fall far below p where the attention is
    peaked: with beta = 2 to a sixth of it.

    Args:
        scores: u, at least 0, such as `received_attention`; a sample with NaN gets even rates.
        p: mean rate, in [0, 1).
        beta: above 0 drops what gets much attention, below 0 what gets little; at 0 all rates
            are p.
        p_max: no rate is higher, but p itself may be.
        area: 0 for tokens that take no part, whose rate is 0; else 1. Of shape (N,) or (B, N).

    Shapes:
        scores (B, N); the result (B, N), float32.

    Example:
        >>> import torch
        >>> u = torch.tensor([[0.1, 0.3, 0.6, 3.0]])
        >>> [[round(v, 2) for v in guided_rates(u, 0.2, b)[0].tolist()] for b in (-1, 0, 1)]
        [[0.5, 0.19, 0.09, 0.02], [0.2, 0.2, 0.2, 0.2], [0.03, 0.09, 0.18, 0.5]]
    """
    p, high = check_rate(p, "guided_rates"), max(p, p_max)
    with torch.no_grad():
        u = scores.detach().float()
        area = torch.ones_like(u) if area is None else area.to(u).expand_as(u)
        area = torch.where((area > 0).any(1, keepdim=True), area, 1.0)
        if p >= high:  # so they are all p
            return p * (area > 0).float()
        known = u.isfinite().all(1, keepdim=True) & (u > 0).any(1, keepdim=True)
        u = torch.where(known, u, 1.0)
        u = u / (u * area).sum(1, keepdim=True).clamp(min=torch.finfo(u.dtype).tiny)
        log = beta * (u * area.sum(1, keepdim=True)).clamp(min=_LEAST).log()
        log = torch.where(area > 0, log, -torch.inf)
        weight = (log - log.amax(1, keepdim=True)).clamp(min=-_WIDEST).exp() * (area > 0)
        share = area / area.sum(1, keepdim=True)
        return (weight * water_level(weight, share, p / high)).clamp(max=1.0) * high


def kept_tokens(
    scores: Tensor,
    p: float,
    beta: float,
    p_max: float,
    prefix_tokens: int,
    exact: bool,
    padding: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Which tokens are kept (B, N), and their rates."""
    area = torch.ones(1, scores.shape[1], device=scores.device)
    area[:, :prefix_tokens] = 0.0
    if padding is not None:
        area = area * ~padding
    rates = guided_rates(scores, p, beta, p_max, area)
    if exact:
        return ~drop_exactly(rates, p), rates
    return torch.rand(rates.shape, device=rates.device) >= rates, rates


def attention_share(attention: Tensor, dropped: Tensor) -> float:
    """The share of some attention that what was dropped had; 0.0 where there is none."""
    attention = attention.float().nan_to_num()
    total = float(attention.sum())
    return float(attention[dropped].sum()) / total if total > 0 else 0.0


def _check_guidance(beta: object, p_max: object, owner: str) -> tuple[float, float]:
    """Returns both as floats, or raises a ValueError that says what is expected."""
    if not isinstance(beta, Real) or isinstance(beta, bool) or not math.isfinite(beta):
        raise ValueError(f"{owner}: beta must be a finite number, got {beta!r}")
    high = check_rate(p_max, f"{owner}, p_max")
    if high == 0.0:
        raise ValueError(f"{owner}: p_max must be above 0, the highest rate of a token; got 0")
    return float(beta), high


class GuidedDropout(Regularizer):
    """What both modes have in common: their parameters, and how much attention they drop.

    The share of attention that is dropped is no parameter: it follows from p, beta and what the
    network attends to. `insert` measures it beside the rate and reports it.
    """

    def __init__(
        self,
        p: float = 0.2,
        beta: float = 1.0,
        p_max: float = 0.5,
        prefix_tokens: int = 0,
        exact: bool = False,
    ) -> None:
        super().__init__(p)
        self.beta, self.p_max = _check_guidance(beta, p_max, type(self).__name__)
        self.prefix_tokens = check_tokens(prefix_tokens, type(self).__name__)
        self.exact = bool(exact)

    def attention_dropped(self, x: Tensor, y: Tensor) -> float:
        """The share of the attention that what one training pass ``x -> y`` dropped had got.

        Among what may be dropped; 0.0 where nothing of that gets any.
        """
        raise NotImplementedError(f"{type(self).__name__} must define attention_dropped(x, y)")

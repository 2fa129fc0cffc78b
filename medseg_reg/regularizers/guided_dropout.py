"""Attention-guided spatial dropout: the attention that a token gets decides its drop rate.

Two ways to drop a token without losing its place in the map: `GuidedKeyDropout` hides it from the
other tokens (mode K), `GuidedResidualDropout` lets it skip a block (mode R).
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from medseg_reg.regularizers.attention_weights import check_tokens, check_weights, hide_keys
from medseg_reg.regularizers.base import (
    Regularizer,
    check_map,
    check_rate,
    register,
)
from medseg_reg.regularizers.drop_rates import water_level

__all__ = [
    "GuidedKeyDropout",
    "GuidedResidualDropout",
    "guided_key_dropout",
    "guided_rates",
    "guided_residual_dropout",
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


def guided_key_dropout(
    x: Tensor,
    p: float = 0.2,
    beta: float = 1.0,
    p_max: float = 0.5,
    prefix_tokens: int = 0,
    training: bool = True,
    *,
    padding: Tensor | None = None,
) -> Tensor:
    """Hides tokens from all others, as often as their attention says; see `GuidedKeyDropout`.

    Args:
        x: attention weights (B, heads, queries, keys).
        p: share of the keys to hide.
        beta: which; see `guided_rates`.
        p_max: highest rate of a key.
        prefix_tokens: keys in front that are never hidden.
        training: False returns the very same tensor.
        padding: where keys (B, keys) only fill a window up: they take no part.

    Example:
        >>> import torch
        >>> y = guided_key_dropout(torch.full((1, 2, 64, 64), 1 / 64), p=0.5)
        >>> bool((y.diagonal(dim1=2, dim2=3) > 0).all())  # a token always sees itself
        True
    """
    p = check_rate(p, "guided_key_dropout")
    if not training or p == 0.0:
        return x
    check_weights(x, "GuidedKeyDropout")
    if x.numel() == 0:
        return x
    with torch.no_grad():
        queries, keys = x.shape[2:]
        area = torch.ones(1, keys, device=x.device)
        area[:, :prefix_tokens] = 0.0
        if padding is not None:
            area = area * ~padding
        rates = guided_rates(received_attention(x), p, beta, p_max, area)
        keep = torch.rand(rates.shape, device=x.device) >= rates
        keep = keep | (rates == rates.amin(1, keepdim=True)) & ~keep.any(1, keepdim=True)
        keep = keep[:, None, None, :].expand(-1, 1, queries, -1)
        if queries == keys:
            keep = keep | torch.eye(keys, dtype=torch.bool, device=x.device)
        like = torch.empty_like(x, dtype=torch.bool)  # in the memory format of x
        keep = like.copy_(keep.expand_as(x))
    return hide_keys(x, keep)


def check_guidance(beta: object, p_max: object, owner: str) -> tuple[float, float]:
    """Returns both as floats, or raises a ValueError that says what is expected."""
    if not isinstance(beta, Real) or isinstance(beta, bool) or not math.isfinite(beta):
        raise ValueError(f"{owner}: beta must be a finite number, got {beta!r}")
    high = check_rate(p_max, f"{owner}, p_max")
    if high == 0.0:
        raise ValueError(f"{owner}: p_max must be above 0, the highest rate of a token; got 0")
    return float(beta), high


@register("guided_key_dropout")
class GuidedKeyDropout(Regularizer):
    """Hides tokens from all others, the more (or less) often the more attention they get.

    A_ij becomes m_ij A_ij / sum_k m_ik A_ik, with m_ii = 1 and m_ij = m_j ~ Bernoulli(1 - p_j)
    for all heads and queries of a sample alike. The rates are p_j = min(p_max, c u_j^beta), where
    u_j is the attention that token j gets and c makes their mean p: see `received_attention` and
    `guided_rates`. Every token keeps its own features and its output, so small targets are never
    erased; what is dropped is the help they give.

    At beta > 0 the most attended tokens are hidden, which forces the network to use context; at
    beta < 0 the least attended, which removes noise; beta = 0 is the control without guidance. At
    equal p they take very different shares of the attention away. While a network is untrained
    its attention is even, and beta changes nothing.

    Scores are those of a window where attention is in windows; tokens that only fill a window up
    take no part.

    Args:
        p: mean share of the tokens to hide, in [0, 1).
        beta: exponent of the attention.
        p_max: highest rate of a token, in (0, 1); p itself where p is higher.
        prefix_tokens: how many tokens in front are no patches, as a class token; they are never
            hidden. `insert` sets what the network has.

    Attributes:
        padding: where keys (B, keys) only fill a window up, for the pass that comes next; set from
            outside, None for nowhere.

    Shapes:
        Attention weights (B, heads, queries, keys); the output is alike.

    Raises:
        ValueError: a bad parameter, or an input of another shape or kind.

    Paper:
        None: spatial dropout guided by a transformer's attention was proposed in public notes of
        2022 without a formula, and no publication of it for segmentation was found. Relatives:
        J. Choe, H. Shim, "Attention-Based Dropout Layer for Weakly Supervised Object
        Localization", CVPR 2019, hides the most active region of a map; I. Kakogeorgiou et al.,
        "What to Hide from Your Students: Attention-Guided Masked Image Modeling", ECCV 2022, the
        most attended patches; Y. Rao et al., "DynamicViT", NeurIPS 2021, has this masked softmax
        with learned masks.

    Example:
        >>> import torch
        >>> weights = torch.rand(2, 3, 36, 36).softmax(-1)
        >>> GuidedKeyDropout(p=0.2)(weights).sum(-1).allclose(torch.ones(2, 3, 36))
        True
    """

    default_places = ("attention",)
    place_kinds = ("attention",)
    spatial_dims = (2,)
    unit = "token, for all others"
    paper = "no paper; after Choe and Shim, CVPR 2019, and Kakogeorgiou et al., ECCV 2022"
    needs = "an attention whose weights are computed"

    def __init__(
        self, p: float = 0.2, beta: float = 1.0, p_max: float = 0.5, prefix_tokens: int = 0
    ) -> None:
        super().__init__(p)
        self.beta, self.p_max = check_guidance(beta, p_max, type(self).__name__)
        self.prefix_tokens = check_tokens(prefix_tokens, type(self).__name__)
        self.padding: Tensor | None = None
        self._padded: Tensor | None = None  # of the last pass, for `measured_rate`

    def regularize(self, x: Tensor) -> Tensor:
        """Applies `guided_key_dropout`."""
        padding, self.padding = self.padding, None
        if not torch.compiler.is_compiling():
            self._padded = padding
        return guided_key_dropout(
            x, self.p, self.beta, self.p_max, self.prefix_tokens, padding=padding
        )

    def measured_rate(self, x: Tensor, y: Tensor) -> float:
        """The share of pairs that were hidden, among those that may be."""
        free = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device)
        if x.shape[-2] == x.shape[-1]:
            free.fill_diagonal_(False)
        free[:, : self.prefix_tokens] = False
        free = free.expand_as(x)
        if self._padded is not None and self._padded.shape == (x.shape[0], x.shape[-1]):
            free = free & ~self._padded[:, None, None, :]
        return super().measured_rate(x[free], y[free])


def guided_residual_dropout(
    x: Tensor,
    p: float = 0.2,
    beta: float = 1.0,
    p_max: float = 0.5,
    prefix_tokens: int = 0,
    training: bool = True,
    *,
    attention: Tensor | None = None,
) -> Tensor:
    """Zeroes what a block adds to tokens, rescaled without bias; see `GuidedResidualDropout`.

    Args:
        x: what a block adds (B, C, *tokens).
        p: share of the tokens to drop.
        beta: which; see `guided_rates`.
        p_max: highest rate of a token.
        prefix_tokens: tokens in front that are never dropped.
        training: False returns the very same tensor.
        attention: what each token gets, (B, tokens); by default the mean of |x| over channels.

    Example:
        >>> import torch
        >>> y = guided_residual_dropout(torch.ones(1, 3, 8, 8), p=0.5)
        >>> sorted(set(y.flatten().tolist()))
        [0.0, 2.0]
    """
    p = check_rate(p, "guided_residual_dropout")
    if not training or p == 0.0:
        return x
    check_map(x, "guided_residual_dropout")
    if x.numel() == 0:
        return x
    with torch.no_grad():
        scores = x.detach().float().abs().mean(1).flatten(1) if attention is None else attention
        area = torch.ones(1, scores.shape[1], device=x.device)
        area[:, :prefix_tokens] = 0.0
        rates = guided_rates(scores, p, beta, p_max, area)
        keep = torch.rand(rates.shape, device=x.device) >= rates
        scale = (keep / (1.0 - rates)).view(x.shape[0], 1, *x.shape[2:]).to(x.dtype)
    return x * scale


@register("guided_residual_dropout")
class GuidedResidualDropout(Regularizer):
    """Lets tokens skip a transformer block, the more (or less) often the more attention they get.

    x_j becomes x_j + m_j / (1 - p_j) F(x)_j, where F(x) is all that the block adds to its tokens
    and m_j ~ Bernoulli(1 - p_j). The rates are those of `GuidedKeyDropout`, from the attention of
    this block: p_j = min(p_max, c u_j^beta), their mean p. The weight 1 / (1 - p_j) keeps the
    expectation of what is added; p_max bounds it.

    At the `residual` branch of another network it takes the mean of |x| over channels for the
    attention, a map's own activity.

    Args:
        p: mean share of the tokens that skip the block, in [0, 1).
        beta: exponent of the attention: above 0 the most attended tokens skip, below 0 the least
            attended; at 0 it is dropping paths token by token.
        p_max: highest rate of a token, in (0, 1); p itself where p is higher.
        prefix_tokens: how many tokens in front are no patches, as a class token; they are never
            dropped. `insert` sets what the network has.

    Attributes:
        attention: what each token gets (B, tokens) in the pass that comes next; set from outside.

    Shapes:
        (B, C, *tokens) with one to three axes for tokens; the output is alike.

    Raises:
        ValueError: a bad parameter, or an input of another shape or kind.

    Paper:
        None, as for `GuidedKeyDropout`. Tokens that skip a block but stay: Y. Liu, M. Gehrig, N.
        Messikommer, M. Cannici, D. Scaramuzza, "Revisiting Token Pruning for Object Detection and
        Instance Segmentation", WACV 2024, arXiv 2306.07050, with learned choices.

    Example:
        >>> import torch
        >>> GuidedResidualDropout(p=0.2)(torch.ones(2, 24, 36)).shape
        torch.Size([2, 24, 36])
    """

    default_places = ("block_residual",)
    place_kinds = ("block_residual", "residual")
    unit = "what a block adds to a token"
    paper = "no paper; after Liu et al., WACV 2024"
    needs = "an attention over all tokens, whose weights are computed"

    def __init__(
        self, p: float = 0.2, beta: float = 1.0, p_max: float = 0.5, prefix_tokens: int = 0
    ) -> None:
        super().__init__(p)
        self.beta, self.p_max = check_guidance(beta, p_max, type(self).__name__)
        self.prefix_tokens = check_tokens(prefix_tokens, type(self).__name__)
        self.attention: Tensor | None = None

    def regularize(self, x: Tensor) -> Tensor:
        """Applies `guided_residual_dropout`."""
        attention, self.attention = self.attention, None
        return guided_residual_dropout(
            x, self.p, self.beta, self.p_max, self.prefix_tokens, attention=attention
        )

    def measured_rate(self, x: Tensor, y: Tensor) -> float:
        """The share of tokens that were dropped, among those that may be."""
        x, y = (one.flatten(2).abs().amax(1, keepdim=True) for one in (x, y))
        return super().measured_rate(x[..., self.prefix_tokens :], y[..., self.prefix_tokens :])

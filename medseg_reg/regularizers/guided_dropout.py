"""Attention-guided spatial dropout: the attention that a token gets decides its drop rate.

Two ways to drop a token without losing its place in the map: `GuidedKeyDropout` hides it from the
other tokens (mode K), `GuidedResidualDropout` lets it skip a block (mode R).
"""

from __future__ import annotations

import torch
from torch import Tensor

from medseg_reg.regularizers.attention_weights import check_weights, hide_keys
from medseg_reg.regularizers.base import check_map, check_rate, register
from medseg_reg.regularizers.guidance import (
    GuidedDropout,
    attention_share,
    guided_rates,
    kept_tokens,
    received_attention,
)

__all__ = [
    "GuidedKeyDropout",
    "GuidedResidualDropout",
    "guided_key_dropout",
    "guided_rates",
    "guided_residual_dropout",
    "received_attention",
]


def guided_key_dropout(
    x: Tensor,
    p: float = 0.2,
    beta: float = 1.0,
    p_max: float = 0.5,
    prefix_tokens: int = 0,
    training: bool = True,
    *,
    exact: bool = False,
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
        exact: hide p of them in every sample, up to rounding.
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
        scores = received_attention(x)
        keep, rates = kept_tokens(scores, p, beta, p_max, prefix_tokens, exact, padding)
        keep = keep | (rates == rates.amin(1, keepdim=True)) & ~keep.any(1, keepdim=True)
        keep = keep[:, None, None, :].expand(-1, 1, queries, -1)
        if queries == keys:
            keep = keep | torch.eye(keys, dtype=torch.bool, device=x.device)
        like = torch.empty_like(x, dtype=torch.bool)  # in the memory format of x
        keep = like.copy_(keep.expand_as(x))
    return hide_keys(x, keep)


@register("guided_key_dropout")
class GuidedKeyDropout(GuidedDropout):
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
        exact: drop p of the tokens in every sample, up to rounding, instead of on average, by
            systematic sampling: the rate of each token stays the same.

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

    padding: Tensor | None = None
    _padded: Tensor | None = None  # of the last pass, for what is measured

    def regularize(self, x: Tensor) -> Tensor:
        """Applies `guided_key_dropout`."""
        padding, self.padding = self.padding, None
        if not torch.compiler.is_compiling():
            self._padded = padding
        return guided_key_dropout(
            x, self.p, self.beta, self.p_max, self.prefix_tokens, exact=self.exact, padding=padding
        )

    def measured_rate(self, x: Tensor, y: Tensor) -> float:
        """The share of pairs that were hidden, among those that may be."""
        free = self._free(x)
        return super().measured_rate(x[free], y[free])

    def attention_dropped(self, x: Tensor, y: Tensor) -> float:
        """The share of the attention that the hidden pairs had, of that of all that may be."""
        free = self._free(x)
        return attention_share(x[free], y[free] == 0)

    def _free(self, x: Tensor) -> Tensor:
        """Which pairs may be hidden, of the shape of the weights."""
        free = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device)
        if x.shape[-2] == x.shape[-1]:
            free.fill_diagonal_(False)
        free[:, : self.prefix_tokens] = False
        free = free.expand_as(x)
        if self._padded is not None and self._padded.shape == (x.shape[0], x.shape[-1]):
            free = free & ~self._padded[:, None, None, :]
        return free


def guided_residual_dropout(
    x: Tensor,
    p: float = 0.2,
    beta: float = 1.0,
    p_max: float = 0.5,
    prefix_tokens: int = 0,
    training: bool = True,
    *,
    exact: bool = False,
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
        exact: drop p of them in every sample, up to rounding.
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
        scores = _activity(x) if attention is None else attention
        keep, rates = kept_tokens(scores, p, beta, p_max, prefix_tokens, exact)
        scale = (keep / (1.0 - rates)).view(x.shape[0], 1, *x.shape[2:]).to(x.dtype)
    return x * scale


def _activity(x: Tensor) -> Tensor:
    """The mean of |x| over channels (B, tokens)."""
    return x.detach().float().abs().mean(1).flatten(1)


@register("guided_residual_dropout")
class GuidedResidualDropout(GuidedDropout):
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
        exact: drop p of the tokens in every sample, up to rounding, instead of on average, by
            systematic sampling: the rate of each token stays the same.

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

    attention: Tensor | None = None
    _attended: Tensor | None = None  # of the last pass, for what is measured

    def regularize(self, x: Tensor) -> Tensor:
        """Applies `guided_residual_dropout`."""
        attention, self.attention = self.attention, None
        if not torch.compiler.is_compiling():
            self._attended = attention
        return guided_residual_dropout(
            x, self.p, self.beta, self.p_max, self.prefix_tokens,
            exact=self.exact, attention=attention,
        )  # fmt: skip

    def measured_rate(self, x: Tensor, y: Tensor) -> float:
        """The share of tokens that were dropped, among those that may be."""
        return super().measured_rate(self._free(x), self._free(y))

    def attention_dropped(self, x: Tensor, y: Tensor) -> float:
        """The share of the attention that the dropped tokens got, of that of all that may be."""
        attention = self._attended
        if attention is None or attention.shape != (x.shape[0], x[0, 0].numel()):
            attention = _activity(x)
        dropped = (self._free(x) != 0) & (self._free(y) == 0)
        return attention_share(attention[:, self.prefix_tokens :], dropped)

    def _free(self, x: Tensor) -> Tensor:
        """The largest |x| of each token that may be dropped."""
        return x.flatten(2).abs().amax(1)[:, self.prefix_tokens :]

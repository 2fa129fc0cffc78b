"""DropKey: every query of an attention is kept from a random part of the keys."""

from __future__ import annotations

import torch
from torch import Tensor

from medseg_reg.regularizers.attention_weights import check_tokens, check_weights, hide_keys
from medseg_reg.regularizers.base import Regularizer, check_rate, register
from medseg_reg.regularizers.coins import keep_some

__all__ = ["DropKey", "drop_key"]

_NEVER = 1e-9  # of all keys at once: where it happens after all, `hide_keys` leaves the row


def drop_key(
    x: Tensor,
    p: float = 0.1,
    prefix_tokens: int = 0,
    training: bool = True,
    *,
    faithful: bool = False,
) -> Tensor:
    """Hides from each query of an attention a random part of the keys; see `DropKey`.

    Example:
        >>> import torch
        >>> y = drop_key(torch.full((1, 2, 16, 16), 1 / 16), p=0.5)
        >>> bool((y == 0).any()), torch.allclose(y.sum(-1), torch.ones(1, 2, 16))
        (True, True)
    """
    p = check_rate(p, "drop_key")
    if not training or p == 0.0:
        return x
    check_weights(x, "DropKey")
    if x.numel() == 0:
        return x
    with torch.no_grad():
        draws = torch.rand_like(x, dtype=torch.float32)
        if faithful or prefix_tokens or p ** x.shape[-1] < _NEVER:
            keep = draws >= p
        else:
            keep = keep_some(draws, p)
        if prefix_tokens and not faithful:
            keep[..., :prefix_tokens] = True
    y = hide_keys(x, keep)
    if faithful:  # a large negative number for all keys of a row is the same number for each
        even = x.mean(-1, keepdim=True)
        some = keep.any(-1, keepdim=True)
        y = torch.where(keep | some, y, even)
    return y


@register("drop_key")
class DropKey(Regularizer):
    """Hides from each query of an attention a random part of the keys.

    A_ij = m_ij exp(z_ij) / sum_k m_ik exp(z_ik), with m ~ Bernoulli(1 - p) drawn for each sample,
    head, query and key. So a query finds its answer in other tokens each time, and its weights
    still sum to 1, which dropout of the weights themselves would break.

    The layer gets the weights behind the softmax and scales what is left of a row up, which is
    the same. A key of the best draw is always kept, and the coins are adjusted so that the share
    dropped is p, which at most n - 1 of n keys can be. A row whose kept keys have no weight at
    all, as in a shifted window, stays as it is.

    Args:
        p: share of the keys to hide from a query, in [0, 1). Published are 0.05 to 0.1 in the
            first block, falling linearly with the depth, and none in the last epochs.
        prefix_tokens: how many tokens in front are no patches, as a class token; they are never
            hidden. `insert` sets what the network has.
        faithful: the published rule: no key is protected, and a query that loses all keys
            attends to all of them evenly (where the attention is fused, as it would without).

    Shapes:
        Attention weights (B, heads, queries, keys); the output is alike.

    Raises:
        ValueError: ``p`` outside [0, 1), or an input of another shape or kind.

    Paper:
        B. Li, Y. Hu, X. Nie, C. Han, X. Jiang, T. Guo, L. Liu, "DropKey for Vision Transformer",
        CVPR 2023, arXiv 2208.02646. There is no official code; the listing in
        the paper adds -1e12 to the logits, which half precision cannot hold.

    Example:
        >>> import torch
        >>> weights = torch.rand(2, 3, 36, 36).softmax(-1)
        >>> DropKey(p=0.1)(weights).sum(-1).allclose(torch.ones(2, 3, 36))
        True
    """

    default_places = ("attention",)
    place_kinds = ("attention",)
    spatial_dims = (2,)
    hides_keys = True
    unit = "key, for one query of one head"
    paper = "Li et al., CVPR 2023"
    needs = "an attention"

    def __init__(self, p: float = 0.1, prefix_tokens: int = 0, faithful: bool = False) -> None:
        super().__init__(p)
        self.prefix_tokens = check_tokens(prefix_tokens, type(self).__name__)
        self.faithful = bool(faithful)

    def regularize(self, x: Tensor) -> Tensor:
        """Applies `drop_key`."""
        return drop_key(x, self.p, self.prefix_tokens, faithful=self.faithful)

    def measured_rate(self, x: Tensor, y: Tensor) -> float:
        """The share of keys that were hidden, among those that may be."""
        return super().measured_rate(x[..., self.prefix_tokens :], y[..., self.prefix_tokens :])

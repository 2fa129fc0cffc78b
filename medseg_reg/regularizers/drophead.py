"""DropHead: whole heads of an attention are left out, each sample its own."""

from __future__ import annotations

import torch
from torch import Tensor

from medseg_reg.regularizers.base import Regularizer, check_map, check_rate, register
from medseg_reg.regularizers.coins import keep_some

__all__ = ["DropHead", "drop_head"]


def drop_head(
    x: Tensor, p: float = 0.1, training: bool = True, *, faithful: bool = False
) -> Tensor:
    """Zeroes whole heads and scales the others up by their number; see `DropHead`.

    Example:
        >>> import torch
        >>> y = drop_head(torch.ones(1, 4, 9, 8), p=0.5)
        >>> float(y.mean())  # heads that are left are scaled by 4 / number
        1.0
    """
    p = check_rate(p, "drop_head")
    if not training or p == 0.0:
        return x
    check_map(x, "drop_head")
    if x.numel() == 0:
        return x
    with torch.no_grad():
        heads = x.shape[1]
        draws = torch.rand(x.shape[0], heads, device=x.device)
        if faithful:
            keep = draws >= p
            keep = keep | ~keep.any(1, keepdim=True)
        else:
            keep = keep_some(draws, p)
        scale = keep * (heads / keep.sum(1, keepdim=True))
        scale = scale.view(*scale.shape, *[1] * (x.dim() - 2)).to(x.dtype)
    return x * scale


@register("drop_head")
class DropHead(Regularizer):
    """Leaves whole heads of an attention out, and scales the others up by their number.

    y[b, h] = x[b, h] * m[b, h] * H / sum_h m[b, h], with m ~ Bernoulli(1 - p) for each of the H
    heads of a sample, before they are projected. No head may dominate; every token keeps its
    output. In an attention of windows a sample drops the same heads in all of its windows.

    At least one head, that of the best draw, is kept, and the coins are adjusted so that the share
    dropped is p, or (H - 1) / H where p is larger: a single head is never dropped. Scheduled
    DropHead is this layer with the schedule `v_shape`, whose `turn` is the share of the training
    that warms the learning rate up: p falls to 0 until then and rises again afterwards.

    Args:
        p: share of the heads to drop, in [0, 1). The first stages of a Swin transformer have 3
            heads: use 0.1 or less there, 0.1 to 0.2 for six heads and more.
        faithful: the published coins: where all heads of a sample fall, all are kept, so that the
            rate is p - p^H.

    Shapes:
        (B, heads, *tokens), with one to three axes for tokens and what they hold; the output is
        alike.

    Raises:
        ValueError: ``p`` outside [0, 1), or an input of another shape or kind.

    Paper:
        W. Zhou, T. Ge, F. Wei, M. Zhou, K. Xu, "Scheduled DropHead: A Regularization Method for
        Transformer Models", Findings of EMNLP 2020, pp. 1971-1980, arXiv 2004.13342. No official
        code was found. What the paper does where all heads fall is not known; other people's
        code divides by zero there, or keeps all.

    Example:
        >>> import torch
        >>> heads = torch.ones(2, 6, 36, 32)
        >>> sorted(set(DropHead(p=0.5)(heads)[0, :, 0, 0].tolist()))[0] in (0.0, 1.0)
        True
    """

    default_places = ("attention_head",)
    place_kinds = ("attention_head",)
    unit = "head of an attention"
    paper = "Zhou et al., Findings of EMNLP 2020"
    needs = "an attention of several heads"

    def __init__(self, p: float = 0.1, faithful: bool = False) -> None:
        super().__init__(p)
        self.faithful = bool(faithful)

    def regularize(self, x: Tensor) -> Tensor:
        """Applies `drop_head`."""
        return drop_head(x, self.p, faithful=self.faithful)

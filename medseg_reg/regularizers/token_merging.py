"""Token merging for dense prediction: blocks run on groups of tokens that are alike."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from medseg_reg.regularizers.attention_weights import check_tokens
from medseg_reg.regularizers.base import Regularizer, check_map, check_rate, register

__all__ = [
    "TokenGroups",
    "TokenMerging",
    "match_tokens",
    "merge_tokens",
    "token_merging",
    "unmerge_tokens",
    "weigh_keys",
]

_ROUNDING = 1e-9


class TokenGroups(NamedTuple):
    """Which tokens are merged with which.

    Attributes:
        group: the number of the group of each token, (B, N).
        sizes: how many tokens each group has, (B, groups), float32.
    """

    group: Tensor
    sizes: Tensor


def match_tokens(
    x: Tensor, count: int, prefix_tokens: int = 0, shuffle: bool = False
) -> TokenGroups:
    """Merges the tokens that are most alike, by bipartite soft matching.

    The patches are split into two sets, A and B. Each token of A finds the one of B whose cosine
    with it is greatest, and the r pairs of the greatest cosines are merged; several tokens of A may
    go to one of B. A round merges half of the patches at most; where ``count`` is more, further
    rounds match the means of what there is.

    Args:
        x: tokens (B, N, C).
        count: r, how many to merge away, fewer than there are patches.
        prefix_tokens: tokens in front that are no patches; each stays a group of its own, in front.
        shuffle: split at random, each sample for itself, in place of every second patch.

    Returns:
        N - count groups. No gradient passes through the choice.

    Example:
        >>> import torch
        >>> x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [-1.0, 0.0]]])
        >>> groups = match_tokens(x, 1)
        >>> groups.group.tolist(), groups.sizes.tolist()
        ([[0, 1, 1, 2]], [[1.0, 2.0, 1.0]])
    """
    batch, tokens, _ = x.shape
    if not 0 <= count < max(1, tokens - prefix_tokens):
        raise ValueError(
            f"match_tokens: of {tokens - prefix_tokens} patches at most one less can be merged "
            f"away, got {count}"
        )
    with torch.no_grad():
        group = torch.arange(tokens, device=x.device).expand(batch, -1)
        sizes = torch.ones(batch, tokens, device=x.device)
        while count > 0:
            means = merge_tokens(x.detach(), TokenGroups(group, sizes))
            patches = means.shape[1] - prefix_tokens
            now = min(count, patches // 2)
            step = _round(means[:, prefix_tokens:], now, shuffle) + prefix_tokens
            front = torch.arange(prefix_tokens, device=x.device).expand(batch, -1)
            group = torch.cat([front, step], 1).gather(1, group)
            sizes = torch.zeros_like(sizes[:, : means.shape[1] - now])
            sizes.scatter_add_(1, group, torch.ones(batch, tokens, device=x.device))
            count -= now
    return TokenGroups(group, sizes)


def _round(x: Tensor, count: int, shuffle: bool) -> Tensor:
    """Returns the group (B, n) of each of n tokens after one round; groups stay in order."""
    batch, n, _ = x.shape
    if shuffle:
        order = torch.rand(batch, n, device=x.device).argsort(1)
    else:
        numbers = torch.arange(n, device=x.device)
        order = torch.cat([numbers[::2], numbers[1::2]]).expand(batch, -1)
    unit = x.float().nan_to_num(0.0, 0.0, 0.0)
    # Squares of large or small values do not fit into float32.
    unit = unit / unit.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    unit = F.normalize(unit, dim=-1).gather(1, order[..., None].expand(-1, -1, x.shape[-1]))
    firsts = n - n // 2
    likeness, partner = (unit[:, :firsts] @ unit[:, firsts:].transpose(1, 2)).max(-1)
    going = likeness.topk(count, 1).indices
    target = torch.arange(n, device=x.device).expand(batch, -1).clone()
    partner = order[:, firsts:].gather(1, partner.gather(1, going))
    target.scatter_(1, order.gather(1, going), partner)
    stays = torch.ones(batch, n, dtype=torch.int64, device=x.device)
    stays.scatter_(1, order.gather(1, going), 0)
    return (stays.cumsum(1) - 1).gather(1, target)


def merge_tokens(x: Tensor, groups: TokenGroups) -> Tensor:
    """Returns the mean of each group of tokens: (B, N, C) becomes (B, groups, C).

    Example:
        >>> import torch
        >>> groups = TokenGroups(torch.tensor([[0, 1, 0]]), torch.tensor([[2.0, 1.0]]))
        >>> merge_tokens(torch.tensor([[[1.0], [5.0], [3.0]]]), groups).tolist()
        [[[2.0], [5.0]]]
    """
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    sums = wide.new_zeros(x.shape[0], groups.sizes.shape[1], x.shape[2])
    sums = sums.scatter_add(1, groups.group[..., None].expand_as(x), wide)
    return (sums / groups.sizes[..., None].to(wide.dtype)).to(x.dtype)


def unmerge_tokens(x: Tensor, groups: TokenGroups) -> Tensor:
    """Copies what a group has to each of its tokens: (B, groups, C) becomes (B, N, C).

    Example:
        >>> import torch
        >>> groups = TokenGroups(torch.tensor([[0, 1, 0]]), torch.tensor([[2.0, 1.0]]))
        >>> unmerge_tokens(torch.tensor([[[2.0], [5.0]]]), groups).tolist()
        [[[2.0], [5.0], [2.0]]]
    """
    return x.gather(1, groups.group[..., None].expand(-1, -1, x.shape[-1]))


def weigh_keys(weights: Tensor, sizes: Tensor) -> Tensor:
    """Lets a key of an attention count as often as its size says.

    softmax(z + log s) = softmax(z) s / sum(softmax(z) s): of weights behind a softmax, scaling and
    dividing by the sum gives the attention over all tokens, were those of a group equal.

    Args:
        weights: (B, heads, queries, keys), rows of sum 1.
        sizes: (B, keys); 0 hides a key.

    Example:
        >>> import torch
        >>> weigh_keys(torch.tensor([[[[0.5, 0.5]]]]), torch.tensor([[3.0, 1.0]])).tolist()
        [[[[0.75, 0.25]]]]
    """
    half = weights.dtype in (torch.float16, torch.bfloat16)
    rows = (weights.float() if half else weights) * sizes[:, None, None, :].to(
        torch.float32 if half else weights.dtype
    )
    total = rows.sum(-1, keepdim=True)
    # A row whose weights are all for keys that count nothing stays as it is.
    found = torch.where(total > 0, rows / torch.where(total > 0, total, 1.0), weights)
    return found.to(weights.dtype)


def token_merging(
    x: Tensor,
    p: float = 0.25,
    prefix_tokens: int = 0,
    training: bool = True,
    *,
    shuffle: bool = True,
) -> Tensor:
    """Replaces positions of a map by the mean of those they are merged with; see `TokenMerging`.

    Args:
        x: a map, or tokens, (B, C, *positions).
        p: share of the positions to merge away.
        prefix_tokens: positions in front that are never merged.
        training: False returns the very same tensor.
        shuffle: see `match_tokens`.

    Example:
        >>> import torch
        >>> y = token_merging(torch.rand(1, 3, 8, 8), p=0.25)
        >>> len(y.flatten(2)[0].T.unique(dim=0))
        48
    """
    p = check_rate(p, "token_merging")
    if not training or p == 0.0:
        return x
    check_map(x, "token_merging")
    groups = _groups(x, p, prefix_tokens, shuffle)
    return x if groups is None else _replaced(x, groups)


def _groups(x: Tensor, p: float, prefix_tokens: int, shuffle: bool) -> TokenGroups | None:
    """Returns the groups of a map's positions; None where nothing is to be merged."""
    patches = math.prod(x.shape[2:]) - prefix_tokens
    count = math.floor(p * patches + _ROUNDING)
    if count < 1 or x.numel() == 0:
        return None
    return match_tokens(x.flatten(2).transpose(1, 2), count, prefix_tokens, shuffle)


def _replaced(x: Tensor, groups: TokenGroups) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    y = unmerge_tokens(merge_tokens(tokens, groups), groups).transpose(1, 2).reshape(x.shape)
    return y if y.stride() == x.stride() else torch.empty_like(x).copy_(y)


@register("token_merging")
class TokenMerging(Regularizer):
    """Runs the blocks of a transformer on groups of tokens that are alike, and gives all back.

    Before each block r = floor(p N) of the N patches are merged into others, see `match_tokens`:
    every token of a half finds the one of the other half with the greatest cosine, and the r best
    pairs become one token, the mean m_g of all that met in group g. The block runs on N - r tokens.
    Behind it each token has its place again, and what the block made of its group beside its own
    features:

        y_i = B(m)_g(i) + (x_i - m_g(i))

    so of a block B(m) = m + F(m) a token gets the update F of its group, and a token that was alone
    gets what it would have got. Every reader outside finds the complete map. Each block matches
    anew, so no two tokens are one for good.

    A group counts in the attention as many tokens as it has (proportional attention): its logits
    get log s, s its size.

    `insert` arranges this. Called alone, the layer replaces positions of a map by the mean of their
    group.

    Args:
        p: share of the patches to merge away in each block, in [0, 1). Above 0.5 in several rounds.
        shuffle: while training, split the patches at random, which makes the layer a regularizer;
            False takes every second patch, as published and as in evaluation.
        proportional: whether groups count by their size. It needs weights that a hook can reach, or
            an attention that takes a mask.
        in_evaluation: whether tokens are merged in ``eval()`` too, which saves time there and
            changes the result. By default evaluation is that of the network without the layer.
        prefix_tokens: how many tokens in front are no patches, as a class token; they are never
            merged. `insert` sets what the network has.

    Attributes:
        groups: the groups of the last pass; None where it merged nothing.

    Shapes:
        (B, C, *positions) with one to three axes; the output is alike.

    Raises:
        ValueError: a bad parameter, or an input of another shape or kind.

    Paper:
        D. Bolya, C.-Y. Fu, X. Dai, P. Zhang, C. Feichtenhofer, J. Hoffman, "Token Merging: Your ViT
        But Faster", ICLR 2023, arXiv 2210.09461, for classification: merged between attention and
        MLP by the keys of the attention, and never taken apart. Here the tokens themselves are
        compared, before the block, as in D. Bolya, J. Hoffman, "Token Merging for Fast Stable
        Diffusion", CVPR Workshops 2023, arXiv 2303.17604, which takes them apart again: keys are no
        tensor of their own in most networks, so that none can be read without their code.

    Example:
        >>> import torch
        >>> layer = TokenMerging(p=0.5)
        >>> y = layer(torch.rand(1, 3, 4, 4))
        >>> layer.groups.sizes.shape, int(layer.groups.sizes.sum())
        (torch.Size([1, 8]), 16)
    """

    default_places = ("tokens",)
    place_kinds = ("tokens",)
    unit = "patch, merged into one that is like it"
    paper = "Bolya et al., ICLR 2023"
    needs = "a transformer of one sequence of tokens"

    def __init__(
        self,
        p: float = 0.25,
        shuffle: bool = True,
        proportional: bool = True,
        in_evaluation: bool = False,
        prefix_tokens: int = 0,
    ) -> None:
        super().__init__(p)
        self.shuffle, self.proportional = bool(shuffle), bool(proportional)
        self.in_evaluation = bool(in_evaluation)
        self.prefix_tokens = check_tokens(prefix_tokens, type(self).__name__)
        self.groups: TokenGroups | None = None
        self._rest: Tensor | None = None
        self._matched = False  # whether `groups` are for a block that comes now

    @property
    def acting(self) -> bool:
        """Whether it merges in this mode."""
        return self.p > 0.0 and (self.training or self.in_evaluation)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer, in ``eval()`` too if it is to."""
        self.groups, self._matched = None, True
        if not self.acting:
            return x
        check_map(x, type(self).__name__)
        return self.regularize(x)

    def regularize(self, x: Tensor) -> Tensor:
        """Applies `token_merging`, and keeps the groups."""
        self.groups = _groups(x, self.p, self.prefix_tokens, self.shuffle and self.training)
        return x if self.groups is None else _replaced(x, self.groups)

    def enter(self, x: Tensor) -> Tensor:
        """Returns what a block is to run on in place of tokens (B, N, C): their groups.

        The very same tensor where nothing is merged. The first block's groups are those that the
        layer made when it was called with the same tokens.
        """
        if not self.acting:
            return x
        if not self._matched:
            shuffle = self.shuffle and self.training
            self.groups = _groups(x.transpose(1, 2), self.p, self.prefix_tokens, shuffle)
        self._matched = False
        if self.groups is None:
            return x
        merged = merge_tokens(x, self.groups)
        self._rest = x - unmerge_tokens(merged, self.groups)
        return merged

    def leave(self, x: Tensor) -> Tensor:
        """Returns all tokens (B, N, C) behind a block, from what it made of their groups."""
        # First, for a pass that is computed again for its gradient may end in the next line.
        groups, rest = self.groups, self._rest
        self.groups = self._rest = None
        if groups is None or rest is None:
            return x
        y = unmerge_tokens(x, groups)
        return y + rest.to(y.dtype)

    def key_weights(self) -> Tensor | None:
        """How many tokens each key stands for while a block runs, (B, groups); None for one."""
        return None if self.groups is None else self.groups.sizes

    def measured_rate(self, x: Tensor, y: Tensor) -> float:
        """The share of patches that were merged away in the last pass."""
        patches = math.prod(x.shape[2:]) - self.prefix_tokens
        if self.groups is None or patches < 1:
            return 0.0
        return 1.0 - (self.groups.sizes.shape[1] - self.prefix_tokens) / patches

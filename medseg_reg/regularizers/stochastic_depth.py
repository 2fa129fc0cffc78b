"""Stochastic Depth and DropPath: skip the residual branch, for a whole batch or for one sample.

Put the layer at the end of the branch, before the addition: y = x + layer(branch(x)).
"""

from __future__ import annotations

import torch
from torch import Tensor

from medseg_reg.regularizers.base import Regularizer, check_map, check_rate, register

__all__ = ["DropPath", "StochasticDepth", "drop_path", "stochastic_depth"]


def _toss(x: Tensor, p: float, coins: int) -> Tensor:
    """One keep-or-drop coin for the batch, or one a sample: 0.0 or 1.0, shaped to multiply x."""
    keep = torch.rand(coins, *[1] * (x.dim() - 1), device=x.device) >= p
    return keep.to(x.dtype)


def drop_path(x: Tensor, p: float = 0.1, training: bool = True) -> Tensor:
    """Zeroes whole samples of a residual branch and rescales the others; see `DropPath`.

    Example:
        >>> import torch
        >>> y = drop_path(torch.ones(8, 3, 4, 4), p=0.5)
        >>> y.flatten(1).std(1).max().item()  # every sample is constant: all 0 or all 2
        0.0
    """
    p = check_rate(p, "drop_path")
    if not training or p == 0.0:
        return x
    check_map(x, "drop_path")
    return x * (_toss(x, p, x.shape[0]) / (1.0 - p))


@register("drop_path")
class DropPath(Regularizer):
    """Zeroes the residual branch of single samples and rescales that of the others.

    y[b] = x[b] * m[b] / (1 - p), with one m ~ Bernoulli(1 - p) for each sample. Zeroing whole
    samples is the purpose: the identity beside the branch carries them on. At a place without
    such a shortcut the layer would blank the sample for all that follows.

    Args:
        p: probability that a sample skips the branch, in [0, 1). Usually it grows linearly with
            the depth of the block.

    Shapes:
        (B, C, *spatial) with one to three spatial axes, or tokens (B, N, C); the output is alike.

    Raises:
        ValueError: ``p`` outside [0, 1), or an input of another shape or kind.

    Paper:
        G. Larsson, M. Maire, G. Shakhnarovich, "FractalNet: Ultra-Deep Neural Networks without
        Residuals", ICLR 2017, arXiv 1605.07648, has the name, for branches that are joined. The
        layer that vision libraries call by it, and this one, is `StochasticDepth` with a coin
        for each sample and rescaling while training.

    Example:
        >>> import torch
        >>> branch = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, padding=1), DropPath(p=0.2))
        >>> x = torch.rand(2, 8, 6, 6)
        >>> (x + branch(x)).shape
        torch.Size([2, 8, 6, 6])
    """

    default_places = ("residual",)
    unit = "residual branch of a sample"
    paper = "Larsson et al., ICLR 2017; Huang et al., ECCV 2016"

    def __init__(self, p: float = 0.1) -> None:
        super().__init__(p)

    def regularize(self, x: Tensor) -> Tensor:
        """Applies `drop_path`."""
        return drop_path(x, self.p)


def stochastic_depth(
    x: Tensor, p: float = 0.5, training: bool = True, *, faithful: bool = False
) -> Tensor:
    """Zeroes a residual branch for the whole batch, or for none of it; see `StochasticDepth`.

    Example:
        >>> import torch
        >>> stochastic_depth(torch.ones(1, 1, 3), p=0.25, training=False, faithful=True)
        tensor([[[0.7500, 0.7500, 0.7500]]])
    """
    p = check_rate(p, "stochastic_depth")
    if p == 0.0 or not (training or faithful):
        return x
    check_map(x, "stochastic_depth")
    if not training:
        return x * (1.0 - p)
    keep = _toss(x, p, coins=1)
    return x * keep if faithful else x * (keep / (1.0 - p))


@register("stochastic_depth")
class StochasticDepth(Regularizer):
    """Zeroes the residual branch for a whole mini-batch, on one toss of a coin.

    y = x * m / (1 - p), with a single m ~ Bernoulli(1 - p) for the batch: the block is there or
    it is not, and all samples see the same depth. `DropPath` tosses a coin for each sample.

    Args:
        p: probability that the batch skips the branch, in [0, 1). The paper's rates grow with
            the depth, p_l = p * l / L for block l of L, with p = 0.5 for the last; its p_l is
            the probability to survive, this one to be dropped.
        faithful: the published scaling: none while training, y = x * m, and in ``eval()``
            y = (1 - p) * x, once for good rather than in each step. The branch is then smaller
            in evaluation than the same weights make it without the layer, so the layer has to
            stay in a network that is used or exported, with the p it was trained with. It is
            the one regularizer whose ``eval()`` may return another tensor than its input.

    Shapes:
        (B, C, *spatial) with one to three spatial axes, or tokens (B, N, C); the output is alike.

    Raises:
        ValueError: ``p`` outside [0, 1), or an input of another shape or kind.

    Paper:
        G. Huang, Y. Sun, Z. Liu, D. Sedra, K. Weinberger, "Deep Networks with Stochastic Depth",
        ECCV 2016, arXiv 1603.09382. A dropped branch is computed here and multiplied by 0; the
        published code saves the time by not computing it.

    Example:
        >>> import torch
        >>> y = StochasticDepth(p=0.5)(torch.ones(4, 2, 3, 3))
        >>> y.unique().tolist() in ([0.0], [2.0])
        True
    """

    default_places = ("residual",)
    unit = "residual branch of a batch"
    paper = "Huang et al., ECCV 2016"

    def __init__(self, p: float = 0.5, faithful: bool = False) -> None:
        super().__init__(p)
        self.faithful = bool(faithful)

    def forward(self, x: Tensor) -> Tensor:
        """Applies `stochastic_depth`; unlike other layers it also scales in ``eval()``."""
        if self.faithful and not self.training and self.p > 0.0:
            return stochastic_depth(x, self.p, training=False, faithful=True)
        return super().forward(x)

    def regularize(self, x: Tensor) -> Tensor:
        """Applies `stochastic_depth`."""
        return stochastic_depth(x, self.p, faithful=self.faithful)

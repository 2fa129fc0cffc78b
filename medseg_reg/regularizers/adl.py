"""ADL: hide the most active region, or weight the map by its own activity."""

from __future__ import annotations

import torch
from torch import Tensor

from medseg_reg.regularizers.base import (
    Regularizer,
    check_map,
    check_number,
    check_rate,
    register,
)

__all__ = ["ADL", "adl"]


def adl(
    x: Tensor,
    p: float = 0.75,
    gamma: float = 0.9,
    training: bool = True,
    *,
    faithful: bool = False,
) -> Tensor:
    """Hides the most active region, or multiplies by the sigmoid of the activity; see `ADL`.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> adl(torch.tensor([[[1.0, 2, 9, 10]]]), p=0.75)  # 9 reaches .9 * 10
        tensor([[[1., 2., 0., 0.]]])
    """
    p = check_rate(p, "adl")
    gamma = _check_gamma(gamma, "adl")
    if not training or p == 0.0:
        return x
    check_map(x, "adl")
    # not under no_grad: as published, the gradient also flows through the importance map
    exact = torch.promote_types(x.dtype, torch.float32)
    attention = x.mean(1, keepdim=True, dtype=exact).nan_to_num(0.0, 0.0, 0.0)
    shape = (-1, *[1] * (x.dim() - 1))
    with torch.no_grad():
        hidden = _hidden(attention.detach(), gamma)
        coins = torch.rand(1 if faithful else x.shape[0], device=x.device).view(shape)
    # one factor for both cases: two products would keep the map twice for the gradient
    factor = torch.where(coins < p, (~hidden).to(exact), attention.sigmoid())
    return x * factor.to(x.dtype)


def _hidden(attention: Tensor, gamma: float) -> Tensor:
    """Which positions reach gamma * max; none where that would be all, or the maximum <= 0."""
    peak = attention.flatten(1).amax(1).view(-1, *[1] * (attention.dim() - 1))
    hidden = (attention >= gamma * peak) & (peak > 0)
    every = hidden.flatten(1).all(1).view_as(peak)
    return hidden & ~every


@register("adl")
class ADL(Regularizer):
    """Attention-based Dropout Layer: hides where a map is most active, or stresses it.

    A = mean of x over the channels. For each sample one coin: with probability p,
    y = x * [A < gamma * max A], which hides the most active region from all channels; otherwise
    y = x * sigmoid(A), the importance map. Nothing is rescaled. It hides what `FocusedDropout`
    keeps.

    Here p is **not** the share of dropped units but the probability of the drop mask. The share
    of positions that a mask hides depends on the map: those within 1 - gamma of the maximum, for
    peaked maps a few of them. `measured_rate` counts these alone; the importance map zeroes
    nothing. p = 0 switches the layer off, importance map included, as in every regularizer here.

    A mask that would hide every position, as of a constant or a one-pixel map, hides none, and
    so does one where max A is not positive. Positions with NaN or infinity count as A = 0.

    Args:
        p: probability of the drop mask, in [0, 1); the paper's drop_rate.
        gamma: share of the maximum from which on a position is hidden, in (0, 1]. Published
            code has .8 or .9.
        faithful: one coin for the whole batch, as published. The default tosses one for each
            sample, so that what happens to a sample does not depend on how batches are cut, and
            a step sees both cases.

    Shapes:
        (B, C, *spatial) with one to three spatial axes; the output is alike.

    Raises:
        ValueError: ``p`` outside [0, 1), ``gamma`` outside (0, 1], or an input of another shape
            or kind.

    Paper:
        J. Choe, H. Shim, "Attention-based Dropout Layer for Weakly Supervised Object
        Localization", CVPR 2019, arXiv 1908.10028. It stands at several of the higher layers.
        The published code zeroes a map that is 0 or the same positive number everywhere; neither
        mode does here. As there, the gradient flows through the importance map, not through the
        mask.

    Example:
        >>> import torch
        >>> ADL(p=0.5)(torch.rand(2, 8, 16, 16)).shape
        torch.Size([2, 8, 16, 16])
    """

    default_places = ("bottleneck",)
    unit = "most active region"
    paper = "Choe and Shim, CVPR 2019"

    def __init__(self, p: float = 0.75, gamma: float = 0.9, faithful: bool = False) -> None:
        super().__init__(p)
        self.gamma = _check_gamma(gamma, type(self).__name__)
        self.faithful = bool(faithful)

    def regularize(self, x: Tensor) -> Tensor:
        """Applies `adl`."""
        return adl(x, self.p, self.gamma, faithful=self.faithful)


def _check_gamma(gamma: object, owner: str) -> float:
    """Returns ``gamma`` as a float, or raises a ValueError that says what is expected."""
    value = check_number(gamma, "gamma", owner, 0.0, strict=True)
    if value > 1.0:
        raise ValueError(f"{owner}: gamma is a share of the maximum, at most 1; got {gamma!r}")
    return value

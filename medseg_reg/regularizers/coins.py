"""Coins that know of each other: of n units never all are dropped, or always the same number."""

from __future__ import annotations

import torch
from torch import Tensor

from medseg_reg.regularizers.drop_rates import running_sum

__all__ = ["coin_rate", "drop_exactly", "keep_some"]

_STEPS = 40  # bisections: beyond float32
_WHOLE = 1e-6  # a number of units so near to a whole one is that one


def coin_rate(p: float, n: int) -> float:
    """The rate of coins at which a share p of n units is dropped though one is always kept.

    The unit of the best draw is kept whatever its coin says. It alone matters where all coins
    fall badly, so the share dropped at rate q is q - q^n / n; this solves for q. More than
    1 - 1/n cannot be dropped: then q is 1.

    Example:
        >>> round(coin_rate(0.2, 3), 4)
        0.2028
        >>> coin_rate(0.6, 2)
        1.0
    """
    if p**n < 1e-7 * n:
        return p
    low, high = p, 1.0
    if p >= 1.0 - 1.0 / n:
        return high
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if middle - middle**n / n < p:
            low = middle
        else:
            high = middle
    return high


def keep_some(draws: Tensor, p: float) -> Tensor:
    """Which units along the last axis are kept, a share 1 - p of them but at least one.

    Args:
        draws: uniform in [0, 1), one for each unit.
        p: the share to drop, in [0, 1).
    """
    best = draws == draws.amax(-1, keepdim=True)
    return (draws >= coin_rate(p, draws.shape[-1])) | best


def drop_exactly(rates: Tensor, p: float) -> Tensor:
    """Which units are dropped: each with its own rate, and together always as many.

    Of n units with a rate, p n are dropped in every row; where that is no whole number it is
    rounded up or down at random, with mean p n. The units are laid end to end in random order,
    each as long as its rate, and those are dropped on which a comb of teeth at distance 1 falls
    that was shifted at random ("systematic sampling"). So a unit's probability is its rate. That
    of the k largest of log-rates plus Gumbel noise, another way to a fixed number, is not: it has
    no closed form, knows no highest rate, and could not be divided by.

    Args:
        rates: the rates (B, n), each below 1, their mean p in every row but for units of rate 0.
        p: that mean.

    Shapes:
        rates (B, n); the result alike, bool.

    Source:
        W. G. Madow, "On the theory of systematic sampling, II", Annals of Mathematical Statistics
        20(3), 1949, DOI 10.1214/aoms/1177729988.

    Example:
        >>> import torch
        >>> drop_exactly(torch.tensor([[0.9, 0.1, 0.5, 0.5]]).expand(3, -1), 0.5).sum(1)
        tensor([2, 2, 2])
    """
    if rates.shape[1] == 0:
        return rates.bool()
    # float32 could not tell where a tooth falls among thousands of units
    exact = torch.float32 if rates.device.type == "mps" else torch.float64
    order = torch.rand(rates.shape, device=rates.device).argsort(1)
    ends = running_sum(rates.gather(1, order).to(exact))
    whole = ends[:, -1:]
    number = (whole / p).round() * p  # rates are solved for in float32; their sum is known better
    number = torch.where((number - number.round()).abs() < _WHOLE, number.round(), number)
    ends = ends * (number / whole)
    ends[:, -1:] = number
    teeth = (ends + torch.rand(len(rates), 1, device=rates.device).to(exact)).floor()
    starts = torch.cat([torch.zeros_like(whole), teeth[:, :-1]], 1)
    return (teeth > starts).gather(1, order.argsort(1))

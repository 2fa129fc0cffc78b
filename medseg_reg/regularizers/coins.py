"""Coins of which one always falls well: some of n units are dropped, but never all."""

from __future__ import annotations

from torch import Tensor

__all__ = ["coin_rate", "keep_some"]

_STEPS = 40  # bisections: beyond float32


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

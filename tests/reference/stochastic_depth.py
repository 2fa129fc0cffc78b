"""Stochastic Depth and DropPath in plain float64 NumPy, for given coins."""

import numpy as np


def drop_path(x: np.ndarray, coins: np.ndarray, p: float) -> np.ndarray:
    """Sample b is kept, and divided by 1 - p, where its uniform coin is at least p."""
    out = np.zeros(x.shape)
    for b, coin in enumerate(coins):
        if coin >= p:
            out[b] = x[b] / (1 - p)
    return out


def residual_block(
    x: np.ndarray, branch: np.ndarray, p: float, coin: float | None, faithful: bool
) -> np.ndarray:
    """x + b f(x); without a coin the test rule, x + (1 - p) f(x) as published."""
    if coin is None:
        return x + ((1 - p) if faithful else 1.0) * branch
    kept = float(coin >= p)
    return x + (kept if faithful else kept / (1 - p)) * branch

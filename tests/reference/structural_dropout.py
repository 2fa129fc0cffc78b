"""Structural Dropout in plain float64 NumPy, written from the paper's rule."""

import numpy as np


def widths(channels: int, lower_bound: int, step: int) -> list[int]:
    """The numbers of channels that a cut pass may keep."""
    return [c for c in range(lower_bound, channels) if (c - lower_bound) % step == 0]


def cut(x: np.ndarray, kept: int) -> np.ndarray:
    """Keeps the first channels of (B, C, ...), times n/c."""
    y = np.zeros(x.shape)
    y[:, :kept] = x[:, :kept].astype(np.float64) * x.shape[1] / kept
    return y


def expected_share(p: float, channels: int, lower_bound: int, step: int) -> float:
    """The mean share of dropped channels, p the probability of a cut."""
    kept = widths(channels, lower_bound, step)
    return p * (1 - np.mean(kept) / channels) if kept else 0.0


def published_probability(p: float) -> float:
    """The probability that the published code cuts: a uniform number below arccos(1 - 2p)."""
    return float(np.clip(np.arccos(1 - 2 * p), 0, 1))

"""Heuristic Dropout in plain float64 NumPy, written from the paper's two algorithms."""

import itertools

import numpy as np


def entropy(channel: np.ndarray, bins: int = 10, signed: bool = False) -> float:
    """Entropy of the levels round(bins * tanh(a)); levels below 0 are not counted."""
    levels = np.round(np.tanh(channel.astype(np.float64)) * bins).ravel()
    lowest = -bins if signed else 0
    counts = np.array([(levels == level).sum() for level in range(lowest, bins + 1)])
    if counts.sum() == 0:
        return 0.0
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def score(channel: np.ndarray, k: float = 2.0, bins: int = 10, signed: bool = False) -> float:
    """entropy + k / (unbiased variance + 1e-7); one pixel counts as variance 0."""
    variance = channel.astype(np.float64).var(ddof=1) if channel.size > 1 else 0.0
    return entropy(channel, bins, signed) + k / (variance + 1e-7)


def laplacian(channel: np.ndarray) -> np.ndarray:
    """Correlation with the 3^n kernel (3^n - 1 in the centre, -1 around), zeros outside."""
    padded = np.pad(channel.astype(np.float64), 1)
    out = 3**channel.ndim * channel.astype(np.float64)
    for start in itertools.product(range(3), repeat=channel.ndim):
        window = tuple(slice(s, s + n) for s, n in zip(start, channel.shape, strict=True))
        out -= padded[window]
    return out


def heuristic_dropout(x: np.ndarray, p: float, k: float = 2.0, bins: int = 10) -> np.ndarray:
    """The published rule: in every sample the round(p * C) highest scores are filtered."""
    out = x.astype(np.float64).copy()
    for sample in out:
        scores = [score(channel, k, bins) for channel in sample]
        for c in np.argsort(scores)[::-1][: round(p * len(scores))]:
            sample[c] = laplacian(sample[c])
    return out

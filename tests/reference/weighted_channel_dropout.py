"""Weighted Channel Dropout in plain float64 NumPy, written from the paper's steps."""

import itertools

import numpy as np


def scores(x: np.ndarray) -> np.ndarray:
    """The mean of each channel of a sample (C, *spatial), at least 1e-4 of the greatest."""
    mean = x.reshape(len(x), -1).astype(np.float64).mean(1)
    return np.maximum(mean, 1e-4 * mean.max()) if mean.max() > 0 else np.ones(len(mean))


def selections(score: np.ndarray, kept: int) -> dict[frozenset[int], float]:
    """The probability of every set of ``kept`` channels: drawn one by one, by weight."""
    found: dict[frozenset[int], float] = {}
    for order in itertools.permutations(range(len(score)), kept):
        chance, rest = 1.0, score.sum()
        for c in order:
            chance *= score[c] / rest
            rest -= score[c]
        found[frozenset(order)] = found.get(frozenset(order), 0.0) + chance
    return found


def alpha(score: np.ndarray, selected: frozenset[int]) -> float:
    """Sum of all scores / sum of the selected ones."""
    return float(score.sum() / score[sorted(selected)].sum())


def inclusion(score: np.ndarray, kept: int) -> np.ndarray:
    """The probability of each channel to be selected."""
    out = np.zeros(len(score))
    for selected, chance in selections(score, kept).items():
        out[sorted(selected)] += chance
    return out


def mean_factor(score: np.ndarray, kept: int) -> np.ndarray:
    """The expected factor of each channel, alpha where selected and 0 elsewhere."""
    out = np.zeros(len(score))
    for selected, chance in selections(score, kept).items():
        out[sorted(selected)] += chance * alpha(score, selected)
    return out

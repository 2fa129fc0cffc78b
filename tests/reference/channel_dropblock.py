"""Channel DropBlock in plain float64 NumPy, written from the paper's algorithm."""

import itertools
import math

import numpy as np


def cosine(x: np.ndarray) -> np.ndarray:
    """The C x C matrix N(X) N(X)^T of one sample (C, *spatial); zero rows give 0."""
    rows = x.reshape(len(x), -1).astype(np.float64)
    norm = np.sqrt((rows**2).sum(1))
    out = np.zeros((len(x), len(x)))
    for i, j in itertools.product(range(len(x)), repeat=2):
        if norm[i] and norm[j]:
            out[i, j] = (rows[i] * rows[j]).sum() / norm[i] / norm[j]
    return out


def peak(channel: np.ndarray, published: bool) -> np.ndarray:
    """Where the mean over the 3^n neighbourhood is greatest.

    Published: the sum is divided by 3^n at the border too. Else: by the number of real
    neighbours, and an axis of one or two pixels is not averaged.
    """
    best, where = -math.inf, np.zeros(channel.ndim)
    for place in np.ndindex(*channel.shape):
        window = tuple(
            slice(max(i - 1, 0), i + 2) if published or n > 2 else slice(i, i + 1)
            for i, n in zip(place, channel.shape, strict=True)
        )
        values = channel[window].astype(np.float64)
        mean = values.sum() / (3**channel.ndim if published else values.size)
        if mean > best + 1e-9:
            best, where = mean, np.array(place, dtype=np.float64)
    return where


def nearness(x: np.ndarray, published: bool = False) -> np.ndarray:
    """The C x C matrix of minus the distances between the channels' peaks."""
    peaks = np.stack([peak(channel, published) for channel in x])
    return -np.sqrt(((peaks[:, None] - peaks[None]) ** 2).sum(-1))


def published_group(row: np.ndarray, p: float) -> np.ndarray:
    """Which channels reach the int(p * C)-th largest similarity of the picked channel's row."""
    threshold = np.sort(row)[::-1][int(len(row) * p) - 1]
    return row >= threshold


def share_in_top(row: np.ndarray, itself: int, count: int) -> np.ndarray:
    """The chance of each channel to be among the ``count`` most similar, ties at random."""
    row = row.copy()
    row[itself] = row.max() + 1
    chance = np.zeros(len(row))
    for c, value in enumerate(row):
        above, equal = (row > value + 1e-9).sum(), (np.abs(row - value) <= 1e-9).sum()
        chance[c] = min(max(count - above, 0) / equal, 1.0)
    return chance


def drop_rates(matrix: np.ndarray, p: float) -> np.ndarray:
    """The chance of each of C live channels to be dropped: over the pick and the rounding."""
    channels = len(matrix)
    low = math.floor(p * channels)
    up = p * channels - low
    rates = np.zeros(channels)
    for picked in range(channels):
        for count, weight in ((low, 1 - up), (low + 1, up)):
            rates += weight * share_in_top(matrix[picked], picked, count) / channels
    return rates

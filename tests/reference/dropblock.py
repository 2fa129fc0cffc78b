"""DropBlock in plain float64 NumPy: blocks painted one by one, rates by counting and bisection."""

import itertools

import numpy as np


def cover_counts(sizes: tuple[int, ...], block_size: int) -> np.ndarray:
    """How many centres, anywhere on the map, have a block that covers each pixel."""
    counts = np.zeros(sizes)
    for centre in itertools.product(*map(range, sizes)):
        counts[block(centre, sizes, block_size)] += 1
    return counts


def block(centre: tuple[int, ...], sizes: tuple[int, ...], block_size: int) -> tuple[slice, ...]:
    """The pixels of one block: the longer half of an even one lies after its centre."""
    first = [c - (block_size - 1) // 2 for c in centre]
    return tuple(
        slice(max(f, 0), min(f + block_size, n)) for f, n in zip(first, sizes, strict=True)
    )


def painted(seeds: np.ndarray, block_size: int) -> np.ndarray:
    """The union of the blocks around the seeds of one plane."""
    mask = np.zeros(seeds.shape, dtype=bool)
    for centre in np.argwhere(seeds):
        mask[block(tuple(centre), seeds.shape, block_size)] = True
    return mask


def gamma(sizes: tuple[int, ...], block_size: int, p: float) -> float:
    """The rate of centres for which the mean of 1 - (1 - gamma)^n is p, by bisection."""
    counts = cover_counts(sizes, block_size)
    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        share = (1 - (1 - middle) ** counts).mean()
        low, high = (middle, high) if share < p else (low, middle)
    return high


def published_gamma(sizes: tuple[int, ...], block_size: int, p: float) -> float:
    """p / k^2 * feat^2 / (feat - k + 1)^2, for each axis by itself."""
    value = p
    for n in sizes:
        k = min(block_size, n)
        value *= n / k / (n - k + 1)
    return value


def published_mask(corners: np.ndarray, sizes: tuple[int, ...], block_size: int) -> np.ndarray:
    """The dropped pixels of one plane, from the first corners of the blocks that fit."""
    mask = np.zeros(sizes, dtype=bool)
    for corner in np.argwhere(corners):
        mask[tuple(slice(c, c + min(block_size, n)) for c, n in zip(corner, sizes))] = True  # noqa: B905
    return mask

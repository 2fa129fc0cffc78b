"""ProbDropBlock in plain float64 NumPy: window sums by counting, alpha by bisection."""

import itertools

import numpy as np

from tests.reference.dropblock import block, painted


def window_sum(plane: np.ndarray, block_size: int) -> np.ndarray:
    """For each pixel the sum of |a| over all centres whose block covers it."""
    total = np.zeros(plane.shape)
    for centre in itertools.product(*map(range, plane.shape)):
        total[block(centre, plane.shape, block_size)] += abs(float(plane[centre]))
    return total


def drop_rates(sample: np.ndarray, p: float, block_size: int) -> np.ndarray:
    """1 - exp(-alpha W) for each element of a sample (C, *spatial), with mean p where a != 0."""
    window = np.stack([window_sum(plane, block_size) for plane in sample.astype(np.float64)])
    live = window[sample != 0]
    low, high = 0.0, -np.log1p(-p) / live.min()
    for _ in range(200):
        middle = (low + high) / 2
        share = -np.expm1(-middle * live).mean()
        low, high = (middle, high) if share < p else (low, middle)
    return -np.expm1(-high * window)


def gamma(plane: np.ndarray) -> np.ndarray:
    """The paper's ||A||_0 |A| / ||A||_1."""
    size = np.abs(plane.astype(np.float64))
    return np.count_nonzero(plane) * size / size.sum()


def published(plane: np.ndarray, draws: np.ndarray, alpha: float, block_size: int) -> np.ndarray:
    """The published rule for one plane with given uniform draws, rescaled by count / sum."""
    seeds = draws < np.minimum(alpha * gamma(plane), 1)
    keep = ~painted(seeds, block_size)
    return plane * keep * (keep.size / max(keep.sum(), 1))

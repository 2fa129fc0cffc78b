"""CorrDrop in plain float64 NumPy, written from the paper's equations."""

import itertools

import numpy as np


def row_correlation(rows: np.ndarray, eps: float = 1e-8) -> np.ndarray:
    """Equations 1 to 3: mean over j of |A_hat A_hat^T - I|."""
    rows = rows.astype(np.float64)
    unit = rows / np.sqrt((rows**2).sum(1, keepdims=True) + eps)
    return np.abs(unit @ unit.T - np.eye(len(rows))).mean(1)


def published_rates(correlation: np.ndarray) -> np.ndarray:
    """Equation 4: gamma = 1 - softmax(F)."""
    e = np.exp(correlation)
    return 1 - e / e.sum()


def second_rate(keep: np.ndarray, p: float) -> float:
    """Equation 6: p_hat = p * count / (count - ones)."""
    return p * keep.size / (keep.size - keep.sum())


def drop_probability(
    correlation: np.ndarray, p: float, temperature: float, area: np.ndarray
) -> np.ndarray:
    """min(1, lambda w) with area-weighted mean p, lambda by bisection."""
    spread = correlation.std() + 1e-6
    w = np.exp(-(correlation - correlation.mean()) / spread / temperature)
    low, high = 0.0, 1.0 / w.min()
    for _ in range(200):
        middle = (low + high) / 2
        mean = (area * np.minimum(1, middle * w)).sum() / area.sum()
        low, high = (middle, high) if mean < p else (low, middle)
    return np.minimum(1, high * w)


def cells(sizes: tuple[int, ...], block_size: int) -> list[tuple[slice, ...]]:
    """The blocks of the centred grid, cut off at the border, in row-major order."""
    per_axis = []
    for size in sizes:
        k = min(block_size, -(-size // 2))
        n = -(-size // k)
        start = -((n * k - size) // 2)
        per_axis.append(
            [slice(max(start + i * k, 0), min(start + (i + 1) * k, size)) for i in range(n)]
        )
    return list(itertools.product(*per_axis))


def spatial_rates(sample: np.ndarray, p: float, block_size: int, temperature: float) -> np.ndarray:
    """The drop probability of every pixel of one sample (C, *spatial), spread from its cell."""
    blocks = cells(sample.shape[1:], block_size)
    rows = np.stack([sample[(slice(None), *b)].reshape(len(sample), -1).mean(1) for b in blocks])
    area = np.array([np.prod([s.stop - s.start for s in b]) for b in blocks], dtype=np.float64)
    q = drop_probability(row_correlation(rows), p, temperature, area)
    out = np.zeros(sample.shape[1:])
    for block, value in zip(blocks, q, strict=True):
        out[block] = value
    return out

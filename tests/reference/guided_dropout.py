"""Attention-guided dropout in plain float64 NumPy."""

import numpy as np


def received_attention(weights: np.ndarray) -> np.ndarray:
    """u_j = M / (H N) sum_h sum_i A_ij, for each sample."""
    rows, heads, queries, keys = weights.shape
    out = np.zeros((rows, keys))
    for b in range(rows):
        for h in range(heads):
            for i in range(queries):
                out[b] += weights[b, h, i] * keys / (heads * queries)
    return out


def guided_rates(u: np.ndarray, p: float, beta: float, p_max: float) -> np.ndarray:
    """p_j = min(p_max, c u_j^beta) of one sample, c by bisection."""
    low, high = 0.0, 1e12
    for _ in range(300):
        c = (low + high) / 2
        low, high = (c, high) if np.minimum(p_max, c * u**beta).mean() < p else (low, c)
    return np.minimum(p_max, c * u**beta)


def hidden_keys(weights: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """A_ij G_ij / sum_k A_ik G_ik with G_ii = 1, G_ij = keep_j, for one head."""
    out = np.zeros(weights.shape)
    for i, row in enumerate(weights):
        g = keep.astype(float)
        if weights.shape[0] == weights.shape[1]:
            g[i] = 1.0
        out[i] = row * g / (row * g).sum()
    return out


def skipped_block(x: np.ndarray, added: np.ndarray, keep: np.ndarray, rates: np.ndarray):
    """x_j + m_j / (1 - p_j) F(x)_j, of tokens (N, C)."""
    return x + (keep / (1 - rates))[:, None] * added

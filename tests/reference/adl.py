"""The Attention-based Dropout Layer in plain float64 NumPy, written from the paper's steps."""

import numpy as np


def attention(x: np.ndarray) -> np.ndarray:
    """The mean over the channels of a sample (C, *spatial)."""
    return x.astype(np.float64).mean(0)


def importance(x: np.ndarray) -> np.ndarray:
    """The sigmoid of the attention."""
    return 1 / (1 + np.exp(-attention(x)))


def drop_mask(x: np.ndarray, gamma: float) -> np.ndarray:
    """1 where the attention is below gamma * max, 0 in the most active region."""
    a = attention(x)
    return (a < gamma * a.max()).astype(np.float64)

"""FocusedDropout in plain float64 NumPy, written from the paper's algorithm."""

import numpy as np


def focus(x: np.ndarray, gamma: float) -> np.ndarray:
    """The mask of one sample (C, *spatial): where its strongest channel exceeds gamma * max."""
    x = x.astype(np.float64)
    means = [channel.mean() for channel in x]
    reference = x[int(np.argmax(means))]
    if reference.max() <= 0:
        return np.ones(x.shape[1:])
    return (reference > gamma * reference.max()).astype(np.float64)

"""The reconstruction of ADCM in plain float64 NumPy, written from its docstring."""

import numpy as np

from tests.reference.corrdrop import drop_probability


def stochastic_pool(channel: np.ndarray) -> np.ndarray:
    """The probability of each position to be pooled: its share of the positive values."""
    positive = np.maximum(channel.astype(np.float64), 0)
    return positive / positive.sum()


def standard(values: np.ndarray) -> np.ndarray:
    """(v - mean) / standard deviation."""
    return (values - values.mean()) / values.std()


def channel_attention(x: np.ndarray, pooled: np.ndarray) -> np.ndarray:
    """Of one sample (C, *spatial), with the stochastically pooled values given."""
    flat = x.reshape(len(x), -1).astype(np.float64)
    return (standard(flat.max(1)) + standard(flat.mean(1)) + standard(pooled)) / 3


def position_attention(x: np.ndarray) -> np.ndarray:
    """Of one sample (C, *spatial): maximum and mean over the channels, then local means.

    Over the neighbours along every axis of three pixels and more.
    """
    x = x.astype(np.float64)
    both = (standard(x.max(0)) + standard(x.mean(0))) / 2
    out = np.zeros(both.shape)
    for place in np.ndindex(*both.shape):
        window = tuple(
            slice(max(i - 1, 0), i + 2) if n > 2 else slice(i, i + 1)
            for i, n in zip(place, both.shape, strict=True)
        )
        out[place] = both[window].mean()
    return out


def rates(attention: np.ndarray, r: float, temperature: float) -> np.ndarray:
    """The drop probability of each unit, with mean r."""
    flat = attention.ravel()
    return drop_probability(flat, r, temperature, np.ones(flat.size)).reshape(attention.shape)

"""Regularized attention in plain float64 NumPy, for given masks."""

import numpy as np


def masked_softmax(logits: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Softmax over the keys that are kept alone: DropKey before the softmax."""
    out = np.zeros(logits.shape)
    for index in np.ndindex(*logits.shape[:-1]):
        kept = keep[index]
        row = np.exp(logits[index][kept] - logits[index][kept].max())
        out[index][kept] = row / row.sum()
    return out


def drop_head(x: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """[m_1 SA_1; ...; m_H SA_H] * H / sum m, sample by sample."""
    out = np.zeros(x.shape)
    for b in range(len(x)):
        for h in np.flatnonzero(keep[b]):
            out[b, h] = x[b, h] * keep.shape[1] / keep[b].sum()
    return out

"""Token labels and mixed tokens by loops over pixels and patches, in float64 NumPy."""

from __future__ import annotations

import math

import numpy as np


def occupancy(labels, classes, patch, multiple=1):
    """Return (B, classes, *grid): count, in each patch, the pixels of each class."""
    whole = [math.lcm(multiple, side) for side in patch]
    size = [-(-n // m) * m for n, m in zip(labels.shape[1:], whole, strict=True)]
    grid = [n // side for n, side in zip(size, patch, strict=True)]
    found = np.zeros((len(labels), classes, *grid))
    for index in np.ndindex(len(labels), *size):
        # What lies outside of an image repeats its last pixel.
        at = [min(i, n - 1) for i, n in zip(index[1:], labels.shape[1:], strict=True)]
        where = tuple(i // side for i, side in zip(index[1:], patch, strict=True))
        label = int(labels[(index[0], *at)])
        if label < classes:
            found[(index[0], label, *where)] += 1
    return found / math.prod(patch)


def loss(logits, shares, foreground=1.0):
    """Return the weighted mean of cross-entropies; both (B, classes, patches)."""
    total = norm = 0.0
    for sample, patch in np.ndindex(logits.shape[0], logits.shape[2]):
        z, y = logits[sample, :, patch], shares[sample, :, patch]
        known = y.sum()
        if known == 0:
            continue
        y = y / known
        weight = known * (1 + (foreground - 1) * (1 - y[0]))
        total -= weight * (y * (z - np.log(np.exp(z).sum()))).sum()
        norm += weight
    return total / norm


def mixed(x, box, patch):
    """Return a batch (B, ..., H, W) in which each entry has a box of its partner."""
    (top, bottom), (left, right) = box
    found = x.copy()
    for sample, row, column in np.ndindex(len(x), *x.shape[-2:]):
        inside = top <= row // patch[0] < bottom and left <= column // patch[1] < right
        if inside:
            found[sample, ..., row, column] = x[len(x) - 1 - sample, ..., row, column]
    return found

"""The target, the loss and the positions of a masked autoencoder, in plain loops and float64."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def cut(image: Array, p: int, q: int) -> Array:
    """Cut an image (C, H, W) into patches (N, p q C): row, column, channel of each pixel."""
    patches = []
    for top in range(0, image.shape[1], p):
        for left in range(0, image.shape[2], q):
            values = [
                image[c, top + i, left + j]
                for i in range(p)
                for j in range(q)
                for c in range(len(image))
            ]
            patches.append(values)
    return np.array(patches, dtype=np.float64)


def loss(prediction: Array, images: Array, hidden: Array, p: int, q: int, normalize: bool) -> float:
    """Mean over the hidden patches of all images of the mean squared error over their values."""
    errors = []
    for y, image, m in zip(prediction, images, hidden, strict=True):
        for patch, t, is_hidden in zip(y, cut(image, p, q), m, strict=True):
            if not is_hidden:
                continue
            if normalize:
                mean = t.sum() / len(t)
                variance = ((t - mean) ** 2).sum() / (len(t) - 1)
                t = (t - mean) / (variance + 1e-6) ** 0.5
            errors.append(((patch.astype(np.float64) - t) ** 2).sum() / len(t))
    return float(np.sum(errors) / len(errors))


def positions(rows: int, columns: int, width: int) -> Array:
    """Sines and cosines: the first half of the features tells the column, the second the row."""
    table = np.zeros((rows * columns, width))
    half, quarter = width // 2, width // 4
    for row in range(rows):
        for column in range(columns):
            for axis, x in enumerate((column, row)):
                for i in range(quarter):
                    angle = x / 10000 ** (i / quarter)
                    table[row * columns + column, axis * half + i] = np.sin(angle)
                    table[row * columns + column, axis * half + quarter + i] = np.cos(angle)
    return table

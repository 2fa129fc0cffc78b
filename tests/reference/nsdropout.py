"""NSDropout in plain NumPy, float64, written from the published algorithm: units and samples."""

import numpy as np


def nearest(labels: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """Labels (B, ...) at another size: the label at the centre of each pixel."""
    for axis, size in enumerate(sizes, start=1):
        centres = (np.arange(size) + 0.5) * labels.shape[axis] / size
        labels = np.take(labels, np.floor(centres).astype(int), axis)
    return labels


def examples(x: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows (examples, C) of a map (B, C, ...) with a label of every pixel or sample."""
    if labels.ndim == 1:
        return x.astype(np.float64).reshape(*x.shape[:2], -1).mean(2), labels
    labels = nearest(labels, x.shape[2:])
    return np.moveaxis(x, 1, -1).reshape(-1, x.shape[1]).astype(np.float64), labels.reshape(-1)


def published_masks(
    rows: np.ndarray, y: np.ndarray, rows_val: np.ndarray, y_val: np.ndarray, rate: float
) -> dict[int, np.ndarray]:
    """Step 2 and 3: 0 for the round(rate * n) units of largest signed difference, per class."""
    masks = {}
    for c in sorted(set(y.tolist()) & set(y_val.tolist())):
        difference = rows[y == c].mean(0) - rows_val[y_val == c].mean(0)
        mask = np.ones(rows.shape[1])
        largest = np.argsort(-difference, kind="stable")[: round(rate * rows.shape[1])]
        mask[largest] = 0
        masks[c] = mask
    return masks


def published_output(
    rows: np.ndarray, y: np.ndarray, masks: dict[int, np.ndarray], rate: float
) -> np.ndarray:
    """Step 4: every example gets the mask of its class, and 1 / (1 - rate)."""
    return np.stack([row * masks[c] / (1 - rate) for row, c in zip(rows, y.tolist(), strict=True)])

"""AutoDropout's pattern in plain float64 NumPy: rectangle by rectangle, in map coordinates."""

import numpy as np


def matrix(rotate: float, shear_x: float, shear_y: float) -> np.ndarray:
    """(row, column) of the map from (row, column) of the tiling, a product of three steps."""
    by_columns = np.array([[1.0, 0.0], [shear_x, 1.0]])
    by_rows = np.array([[1.0, shear_y], [0.0, 1.0]])
    angle = np.deg2rad(rotate)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return turn @ by_rows @ by_columns


def hits(
    shape: tuple[int, int],
    size: tuple[int, int],
    stride: tuple[int, int],
    tiles: range,
    transform: np.ndarray,
    origin: tuple[float, float],
) -> np.ndarray:
    """The pixels inside one of the rectangles, each a parallelogram with two edge vectors."""
    pixels = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).astype(np.float64)
    mask = np.zeros(shape, dtype=bool)
    down, right = transform[:, 0] * size[0], transform[:, 1] * size[1]
    for i in tiles:
        for j in tiles:
            corner = transform @ [i * (size[0] + stride[0]), j * (size[1] + stride[1])] + origin
            # shares of the two edges, by Cramer's rule
            offset = pixels - corner
            area = down[0] * right[1] - down[1] * right[0]
            s = (offset[..., 0] * right[1] - offset[..., 1] * right[0]) / area
            t = (down[0] * offset[..., 1] - down[1] * offset[..., 0]) / area
            mask |= (s >= 0) & (s < 1) & (t >= 0) & (t < 1)
    return mask


def coverage(
    shape: tuple[int, int], size: tuple[int, int], stride: tuple[int, int], repeat: int
) -> float:
    """The mean share over all whole offsets at which an upright pattern may touch the map."""
    length = [repeat * (k + g) - g for k, g in zip(size, stride, strict=True)]
    origins = [range(1 - n, m) for n, m in zip(length, shape, strict=True)]
    upright = np.eye(2)
    shares = [
        hits(shape, size, stride, range(repeat), upright, (y, x)).mean()
        for y in origins[0]
        for x in origins[1]
    ]
    return float(np.mean(shares))

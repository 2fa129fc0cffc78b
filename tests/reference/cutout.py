"""Cutout in plain float64 NumPy: every possible hole is painted and counted."""

import itertools

import numpy as np


def sides(level: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The sides of a hole: proportional to the map's reach 2 n - 1, rounded, at least 1."""
    if level == 0:
        return (0,) * len(sizes)
    last = 2 * max(sizes) - 1
    return tuple(max(1, int(np.floor(level * (2 * n - 1) / last + 0.5))) for n in sizes)


def box(centre: tuple[int, ...], sizes: tuple[int, ...], side: tuple[int, ...]) -> np.ndarray:
    """One hole; an even side has its longer half after the centre."""
    mask = np.zeros(sizes, dtype=bool)
    first = [c - (k - 1) // 2 for c, k in zip(centre, side, strict=True)]
    mask[tuple(slice(max(f, 0), max(f + k, 0)) for f, k in zip(first, side, strict=True))] = True
    return mask


def share(level: int, sizes: tuple[int, ...], holes: int) -> float:
    """The mean share of zeroed pixels over all choices of centres."""
    side = sides(level, sizes)
    boxes = [box(c, sizes, side) for c in itertools.product(*map(range, sizes))]
    unions = [np.any(chosen, axis=0) for chosen in itertools.product(boxes, repeat=holes)]
    return float(np.mean(unions))


def published_hole(centre: tuple[int, ...], sizes: tuple[int, ...], length: int) -> np.ndarray:
    """y1 = clip(y - L // 2, 0, H), y2 = clip(y + L // 2, 0, H), and so on."""
    mask = np.zeros(sizes, dtype=bool)
    reach = length // 2
    mask[tuple(slice(max(c - reach, 0), min(c + reach, n)) for c, n in zip(centre, sizes))] = True  # noqa: B905
    return mask

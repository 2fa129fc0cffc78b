"""The anatomy of the phantom: an upper abdomen with a pancreas-like organ, from formulas alone.

Coordinates: x from -1 (the patient's right) to 1, y from -1 (front) to 1 (back), z from 0 (feet)
to 1 (head). The right and left, front and back, top and bottom all differ, so that a mask laid on
in any wrong way shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.ndimage import zoom

Array = np.ndarray[Any, np.dtype[Any]]

AIR = -1000
PADDING = -1024
FAT = -100
CURVE_POINTS = 40
LOOPS = 14


@dataclass(frozen=True)
class Organ:
    """An ellipsoid: centre and radii along (x, y, z), and how its HU vary over cases."""

    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    hu: tuple[float, float]


# Painted in this order; what comes later lies in front. HU as after contrast.
_BEHIND_PANCREAS = (
    Organ((-0.42, -0.02, 0.75), (0.34, 0.40, 0.42), (100, 125)),  # liver
    Organ((-0.08, -0.26, 0.86), (0.26, 0.18, 0.20), (100, 125)),  # its left lobe
    Organ((0.56, 0.22, 0.78), (0.17, 0.24, 0.20), (105, 130)),  # spleen
    Organ((-0.36, 0.32, 0.38), (0.13, 0.12, 0.22), (150, 190)),  # right kidney
    Organ((0.38, 0.30, 0.46), (0.13, 0.12, 0.22), (150, 190)),  # left kidney
    Organ((0.30, -0.22, 0.74), (0.24, 0.17, 0.18), (20, 50)),  # stomach
    Organ((0.34, -0.34, 0.76), (0.10, 0.05, 0.08), (-950, -850)),  # gas in it
    Organ((-0.20, -0.36, 0.24), (0.16, 0.11, 0.20), (40, 90)),  # bowel
    Organ((0.18, -0.38, 0.30), (0.17, 0.11, 0.18), (40, 90)),  # bowel
    Organ((0.46, -0.14, 0.26), (0.11, 0.13, 0.22), (40, 90)),  # bowel
    Organ((-0.46, -0.16, 0.18), (0.10, 0.12, 0.18), (-700, -400)),  # gas in the colon
)
_BESIDE_PANCREAS = (
    Organ((-0.34, -0.02, 0.40), (0.075, 0.09, 0.16), (65, 110)),  # duodenum
    Organ((0.02, 0.16, 0.50), (0.045, 0.045, 0.60), (180, 230)),  # aorta
    Organ((-0.10, 0.17, 0.50), (0.055, 0.045, 0.60), (120, 160)),  # vena cava
)


def phantom_volume(seed: int, case: int, size: int = 96, slices: int = 24) -> tuple[Array, Array]:
    """Return the scan of a case in HU and its true mask, both in the stored order (S, H, W).

    Equal arguments give equal arrays. Size, place, course and HU of the organs, the noise and the
    patient's build differ from case to case.

    Args:
        seed: of the whole data set.
        case: the number of the case.
        size: rows and columns.
        slices: number of slices.
    """
    rng = np.random.default_rng([seed, case])
    grid = _Grid(slices, size)
    build = rng.uniform(0.92, 1.08, 2)
    hu = _body(grid, rng, build)
    for organ in _BEHIND_PANCREAS:
        _paint(hu, grid, organ, rng, build)
    mask = np.zeros(hu.shape, bool)
    level = rng.uniform(85, 125)
    _bowel_loops(hu, grid, rng, build)
    course = _pancreas_course(rng, build)
    for centre, radii in course:
        vein = (centre[0], centre[1] + radii[1] * 0.9, centre[2] + 0.01)
        grid.fill(hu, vein, (0.03, 0.03, 0.03), 145.0)
    for organ in _BESIDE_PANCREAS:
        _paint(hu, grid, organ, rng, build)
    for centre, radii in course:
        grid.fill(mask, centre, radii, True)
    hu[mask] = level
    _spine(hu, mask, grid, rng)
    hu += _texture(rng, hu.shape) * np.where(mask, 14.0, 6.0).astype(np.float32)
    hu += rng.standard_normal(hu.shape, np.float32) * np.float32(rng.uniform(10, 22))
    volume = np.clip(np.rint(hu), PADDING + 1, 3071).astype(np.int16)
    volume[:, grid.outside] = PADDING
    return volume, mask.astype(np.uint8)


class _Grid:
    """The coordinates of the voxels' centres."""

    def __init__(self, slices: int, size: int) -> None:
        self.axes = (
            ((np.arange(slices) + 0.5) / slices).astype(np.float32),
            ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32),
            ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32),
        )
        self.shape = (slices, size, size)
        y, x = self.axes[1][:, None], self.axes[2][None]
        self.outside = x * x + y * y > 1

    def fill(
        self,
        array: Array,
        centre: Sequence[float],
        radii: Sequence[float],
        value: float | bool,
    ) -> None:
        """Set the voxels of an ellipsoid, given as (x, y, z), to a value."""
        squares, places = [], []
        for axis, c, r in zip(self.axes, reversed(centre), reversed(radii), strict=True):
            low, high = np.searchsorted(axis, (c - r, c + r))
            places.append(slice(int(low), int(high)))
            squares.append(((axis[low:high] - c) / r) ** 2)
        inside = squares[0][:, None, None] + squares[1][:, None] + squares[2] <= 1
        array[tuple(places)][inside] = value


def _body(grid: _Grid, rng: np.random.Generator, build: Array) -> Array:
    """Return air around a body of fat with a wall of muscle."""
    hu = np.full(grid.shape, AIR, np.float32)
    y, x = grid.axes[1][:, None], grid.axes[2][None]
    skin = rng.uniform(0.03, 0.09)
    for rim, value in ((0.0, FAT), (skin, 55.0), (skin + 0.06, FAT)):
        ellipse = (x / (0.86 * build[0] - rim)) ** 2 + (y / (0.66 * build[1] - rim)) ** 2
        hu[:, ellipse <= 1] = value
    return hu


def _paint(hu: Array, grid: _Grid, organ: Organ, rng: np.random.Generator, build: Array) -> None:
    shift = rng.normal(0, 0.02, 3)
    scale = rng.uniform(0.9, 1.1, 3)
    stretch = (build[0], build[1], 1.0)
    centre = tuple(c * s + d for c, s, d in zip(organ.centre, stretch, shift, strict=True))
    radii = tuple(r * s * k for r, s, k in zip(organ.radii, stretch, scale, strict=True))
    grid.fill(hu, centre, radii, float(rng.uniform(*organ.hu)))


def _bowel_loops(hu: Array, grid: _Grid, rng: np.random.Generator, build: Array) -> None:
    """Scatter loops of bowel, as bright as a pancreas, in front of it and on the left."""
    for _ in range(LOOPS):
        centre = (
            float(rng.uniform(-0.15, 0.6) * build[0]),
            float(rng.uniform(-0.42, 0.02) * build[1]),
            float(rng.uniform(0.05, 0.75)),
        )
        radii = tuple(float(r) for r in rng.uniform((0.05, 0.04, 0.04), (0.12, 0.07, 0.12)))
        grid.fill(hu, centre, radii, float(rng.uniform(60, 125)))


def _pancreas_course(
    rng: np.random.Generator, build: Array
) -> list[tuple[tuple[float, float, float], tuple[float, float, float]]]:
    """Return ellipsoids along the organ, from its thick head on the right to the tail."""
    shift, bend, thick = rng.normal(0, 0.025, 3), rng.uniform(0.7, 1.3), rng.uniform(0.8, 1.2)
    rise, wave = rng.uniform(0.10, 0.26), rng.uniform(-0.02, 0.02)
    course = []
    for t in np.linspace(0, 1, CURVE_POINTS):
        x = -0.22 + 0.66 * t
        y = 0.02 - 0.17 * bend * np.sin(np.pi * t) + 0.16 * t**2
        z = 0.44 + rise * t**0.7 + wave * np.sin(3 * np.pi * t)
        r = thick * (0.085 - 0.045 * t + 0.015 * np.cos(5 * t))
        centre = (
            float(x * build[0] + shift[0]),
            float(y * build[1] + shift[1]),
            float(z + shift[2]),
        )
        depth = thick * (0.11 * (1 - t) ** 2 + 0.06)
        course.append((centre, (float(r), float(r), float(depth))))
    return course


def _spine(hu: Array, mask: Array, grid: _Grid, rng: np.random.Generator) -> None:
    """Paint vertebrae with discs between them, and ribs on the patient's left, lower ones."""
    bone = float(rng.uniform(250, 450))
    phase = float(rng.uniform(0, 0.1))
    for level in np.arange(-0.1 + phase, 1.1, 0.2):
        for centre, radii in (
            ((0.0, 0.36, level), (0.13, 0.11, 0.085)),
            ((0.0, 0.52, level), (0.04, 0.10, 0.06)),
        ):
            grid.fill(hu, centre, radii, bone)
        grid.fill(hu, (0.0, 0.36, level + 0.1), (0.12, 0.10, 0.02), 90.0)
    for height in (0.3, 0.6, 0.9):
        grid.fill(hu, (0.72, 0.10, height), (0.03, 0.10, 0.05), bone)
        grid.fill(hu, (-0.70, 0.20, height + 0.08), (0.03, 0.12, 0.05), bone)
    mask[hu == bone] = False


def _texture(rng: np.random.Generator, shape: tuple[int, int, int]) -> Array:
    """Return smooth noise of standard deviation about 1."""
    coarse = tuple(max(2, min(n, 24)) for n in shape)
    noise = rng.standard_normal(coarse, np.float32)
    factors = [n / c for n, c in zip(shape, coarse, strict=True)]
    smooth: Array = zoom(noise, factors, order=1, grid_mode=True, mode="nearest")
    return smooth

"""Where the voxels of a stored case lie in the patient, and the way back to the source grid.

Order in memory, for every modality and every source. A volume is (S, H, W):

    plane      slices run        rows run           columns run
    axial      feet to head      front to back      right to left of the patient
    coronal    front to back     head to feet       right to left
    sagittal   right to left     head to feet       front to back

which is how a radiologist looks at them: the patient's right is on the left of the picture.
Only axes are exchanged and flipped, never resampled, so the way back is exact.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

Array = np.ndarray[Any, np.dtype[Any]]
Plane = Literal["axial", "coronal", "sagittal"]

# Direction of the slices, rows and columns of each plane, as (axis, sign) in RAS millimetres.
_PLANES: dict[str, tuple[tuple[int, int], ...]] = {
    "axial": ((2, +1), (1, -1), (0, -1)),
    "coronal": ((1, -1), (2, -1), (0, -1)),
    "sagittal": ((0, -1), (2, -1), (1, -1)),
}


class Geometry(BaseModel):
    """The grid of a stored case and of its source.

    Attributes:
        spacing: distance of slices, rows and columns of the stored array, in millimetres.
        axes: for each axis of the stored array (S, H, W), the axis of the source array.
        flips: for each axis of the stored array, whether it runs against the source axis.
        source_shape: shape of the source array.
        source_affine: 4x4 matrix from indices of the source array to RAS+ millimetres
            (the convention of NIfTI).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    spacing: tuple[float, float, float]
    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    source_shape: tuple[int, int, int]
    source_affine: tuple[tuple[float, float, float, float], ...]

    def from_source(self, volume: Array) -> Array:
        """Return a view of a volume on the source grid in the stored order (S, H, W).

        A fourth axis, of channels, stays the last.
        """
        if volume.shape[:3] != self.source_shape:
            raise ValueError(f"volume is {volume.shape}, the source grid is {self.source_shape}")
        return np.transpose(volume, (*self.axes, *range(3, volume.ndim)))[self._flip()]

    def to_source(self, volume: Array) -> Array:
        """Return a view of a volume in the stored order (S, H, W) on the source grid."""
        return np.transpose(volume[self._flip()], np.argsort(self.axes))

    def _flip(self) -> tuple[slice, ...]:
        return tuple(slice(None, None, -1 if flip else 1) for flip in self.flips)


def geometry_of(affine: Array, shape: tuple[int, int, int], plane: Plane = "axial") -> Geometry:
    """Find the axes and flips that bring a source grid nearest to the order of a plane.

    Args:
        affine: 4x4 matrix from indices to RAS+ millimetres.
        shape: shape of the source array.
        plane: the plane that a slice of the stored array shows.

    Raises:
        ValueError: the matrix is not finite, or two axes of the source point the same way.
    """
    matrix = np.asarray(affine, dtype=np.float64)
    lengths = np.linalg.norm(matrix[:3, :3], axis=0)
    if not np.isfinite(matrix).all() or (lengths == 0).any():
        raise ValueError("the affine matrix is not finite or has an axis of length zero")
    cosines = matrix[:3, :3] / lengths
    world_of_axis = _assign(np.abs(cosines))
    axes, flips = [], []
    for world, sign in _PLANES[plane]:
        axis = world_of_axis.index(world)
        axes.append(axis)
        flips.append(bool(np.sign(cosines[world, axis]) != sign))
    return Geometry(
        spacing=tuple(round(float(lengths[axis]), 6) for axis in axes),
        axes=tuple(axes),
        flips=tuple(flips),
        source_shape=tuple(int(n) for n in shape),
        source_affine=tuple(tuple(float(v) for v in row) for row in matrix),
    )


def nearest_plane(affine: Array, stack_axis: int) -> Plane:
    """Name the plane of the slices when `stack_axis` of the source array runs through them."""
    column = np.abs(np.asarray(affine, dtype=np.float64)[:3, stack_axis])
    names: tuple[Plane, ...] = ("sagittal", "coronal", "axial")
    return names[int(np.argmax(column))]


def _assign(cosines: Array) -> list[int]:
    """Give each source axis its own world axis, the strongest match first."""
    remaining = cosines.copy()
    result = [-1, -1, -1]
    for _ in range(3):
        world, axis = np.unravel_index(int(np.argmax(remaining)), (3, 3))
        if remaining[world, axis] <= 0:
            raise ValueError("two axes of the affine matrix point the same way")
        result[int(axis)] = int(world)
        remaining[world, :] = -1
        remaining[:, axis] = -1
    return result

"""Reading one volume and its labels onto one grid, for all converters of volumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from medseg_reg.data.store_writer import CaseArrays, CaseSource
from medseg_reg.errors import MedsegError
from medseg_reg.io.dicom import DicomVolume, read_series
from medseg_reg.io.filters import prepared
from medseg_reg.io.geometry import Geometry, Plane, geometry_of
from medseg_reg.io.nifti import NiftiVolume, read_nifti
from medseg_reg.io.pixels import as_labels
from medseg_reg.io.rtstruct import read_rtstruct
from medseg_reg.io.threads import in_threads

Array = np.ndarray[Any, np.dtype[Any]]

GRID_TOLERANCE = 0.1


def read_nifti_case(
    source: CaseSource,
    plane: Plane,
    erosion: int | None = None,
    canny: tuple[float, float] | None = None,
    labels: tuple[int, ...] | None = None,
    ignored: int | None = None,
) -> CaseArrays:
    """Read the channels and the label of a case; the label is the last of its files.

    Raises:
        MedsegError: channels or label that do not lie on the grid of the first channel.
    """
    *paths, label_path = source.files
    declared = source.details.get("channels", 0)
    *volumes, label = in_threads(
        lambda path: read_nifti(path, channels=declared > 1 and path != label_path), source.files
    )
    first = volumes[0]
    for path, volume in (*zip(paths[1:], volumes[1:], strict=True), (label_path, label)):
        _require_same_grid(paths[0], first, path, volume)
    geometry = geometry_of(first.affine, first.array.shape[:3], plane)
    channels = [
        geometry.from_source(volume.array[..., index] if volume.array.ndim == 4 else volume.array)
        for volume in volumes
        for index in range(volume.array.shape[3] if volume.array.ndim == 4 else 1)
    ]
    if declared and len(channels) != declared:
        raise MedsegError(
            f"{paths[0]}: case {source.name} has {len(channels)} channel"
            f"{'s' * (len(channels) > 1)}, dataset.json declares {declared}. Complete the case, or "
            "repair dataset.json."
        )
    image = channels[0] if len(channels) == 1 else np.stack(channels, axis=-1)
    mask = geometry.from_source(chosen_labels(as_labels(label_path, label.array), labels, ignored))
    is_hu = source.details.get("unit") == "HU"
    image = prepared(image, erosion, canny, is_hu)
    notes = tuple(dict.fromkeys(note for volume in (*volumes, label) for note in volume.notes))
    if image.dtype == np.float32 and first.array.dtype.itemsize > 4:
        notes += ("pixels of 64 bits were rounded to float32",)
    return CaseArrays(image, mask, geometry, notes=notes)


def read_dicom_case(
    source: CaseSource,
    plane: Plane | None,
    rois: tuple[str, ...] = (),
    erosion: int | None = None,
    canny: tuple[float, float] | None = None,
    labels: tuple[int, ...] | None = None,
    ignored: int | None = None,
) -> CaseArrays:
    """Read a DICOM series and its label, the last of the files: NIfTI, or RTSTRUCT with `rois`."""
    *files, label_path = source.files
    volume = read_series(files, where=source.details["folder"], series=source.details.get("series"))
    geometry = volume.geometry(plane)
    if rois:
        mask = geometry.from_source(_regions(label_path, volume, rois))
    else:
        mask = _laid_by_affine(label_path, geometry, plane or volume.plane)
        mask = chosen_labels(mask, labels, ignored)
    image = prepared(
        geometry.from_source(volume.array), erosion, canny, is_hu=volume.modality == "CT"
    )
    return CaseArrays(image, mask, geometry, notes=volume.notes)


def chosen_labels(mask: Array, labels: tuple[int, ...] | None, ignored: int | None = None) -> Array:
    """Number the chosen label values 1, 2, ... in order; all others become background.

    The ignored label, if there is one, stays as it is.

    >>> chosen_labels(np.array([0, 7, 5, 255], np.uint8), (7,), ignored=255).tolist()
    [0, 1, 0, 255]
    """
    if labels is None:
        return mask
    table = np.zeros(256, np.uint8)
    table[list(labels)] = range(1, len(labels) + 1)
    if ignored is not None:
        table[ignored] = ignored
    return table[mask]


def _regions(path: Path, volume: DicomVolume, rois: tuple[str, ...]) -> Array:
    mask = np.zeros(volume.array.shape, np.uint8)
    for value, roi in enumerate(rois, start=1):
        region = read_rtstruct(path, volume, roi) > 0
        both = int(np.count_nonzero(mask[region]))
        if both:
            raise MedsegError(
                f"{path}: '{roi}' shares {both} voxels with a region named before it. Choose "
                "regions that do not overlap."
            )
        mask[region] = value
    return mask


def _laid_by_affine(path: Path, geometry: Geometry, plane: Plane) -> Array:
    """Return a label in the stored order of an image, exchanging and flipping axes alone."""
    label = read_nifti(path)
    own = geometry_of(label.affine, label.array.shape[:3], plane)
    wanted, found = stored_affine(geometry), stored_affine(own)
    shape = tuple(geometry.source_shape[axis] for axis in geometry.axes)
    own_shape = tuple(own.source_shape[axis] for axis in own.axes)
    if shape != own_shape or not _close(wanted, found, shape):
        raise MedsegError(
            f"{path}: does not lie on the grid of the series: {_grid_text(own_shape, found)}, "
            f"the series {_grid_text(shape, wanted)}. Resample the label to the series."
        )
    return own.from_source(as_labels(path, label.array))


def stored_affine(geometry: Geometry) -> Array:
    """Return the 4x4 matrix from indices of the stored array to RAS+ millimetres."""
    source = np.array(geometry.source_affine)
    affine = np.eye(4)
    affine[:3, 3] = source[:3, 3]
    for axis, (origin, flip) in enumerate(zip(geometry.axes, geometry.flips, strict=True)):
        column = source[:3, origin]
        affine[:3, axis] = -column if flip else column
        if flip:
            affine[:3, 3] += column * (geometry.source_shape[origin] - 1)
    return affine


def _require_same_grid(path: Path, first: NiftiVolume, other: Path, volume: NiftiVolume) -> None:
    shape, found = first.array.shape[:3], volume.array.shape[:3]
    if shape != found or not _close(first.affine, volume.affine, shape):
        raise MedsegError(
            f"{other}: does not lie on the grid of {path.name}: it is "
            f"{_grid_text(found, volume.affine)}, the image {_grid_text(shape, first.affine)}. "
            "Resample it, or repair its header."
        )


def _close(one: Array, other: Array, shape: tuple[int, ...]) -> bool:
    """Whether two grids agree at all corners within a tenth of the smallest voxel side."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape], indexing="ij")).reshape(3, -1)
    apart = (one - other)[:3, :3] @ corners + (one - other)[:3, 3:]
    side = np.linalg.norm(one[:3, :3], axis=0).min()
    return bool(np.linalg.norm(apart, axis=0).max() <= GRID_TOLERANCE * side)


def _grid_text(shape: tuple[int, ...], affine: Array) -> str:
    rows = ", ".join("[" + " ".join(f"{v:.3f}" for v in row) + "]" for row in affine[:3])
    return f"{'x'.join(map(str, shape))}, affine {rows}"

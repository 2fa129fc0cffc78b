"""Contours of a DICOM RTSTRUCT as a mask on the grid of its image series."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from matplotlib.path import Path as Polygon
from pydicom.dataelem import RawDataElement

from medseg_reg.errors import MedsegError, nearest
from medseg_reg.io.dicom import DicomVolume

Array = np.ndarray[Any, np.dtype[Any]]

OFF_SLICE = 0.2
UNDEFINED = 0xFFFFFFFF


def read_rtstruct(path: Path, volume: DicomVolume, roi: str) -> Array:
    """Return the voxels of a region of interest, (columns, rows, slices) uint8 0 or 1.

    A voxel belongs to the region if its centre lies inside an odd number of the contours of
    its slice; so a contour inside another one is a hole.

    Raises:
        MedsegError: no RTSTRUCT, no such region (the message lists those there are), another
            frame of reference, contours that are damaged or do not lie on the slices.
    """
    content = path.read_bytes()
    with _told_as_damage(path):
        contours = _contours(path, _parsed(path, content), volume, roi)
    inverse = np.linalg.inv(volume.affine) @ np.diag([-1.0, -1.0, 1.0, 1.0])
    columns, rows, slices = volume.array.shape
    mask = np.zeros((slices, rows, columns), bool)
    for number, points in enumerate(contours):
        indices = points @ inverse[:3, :3].T + inverse[:3, 3]
        height = float(np.median(indices[:, 2]))
        index = round(height)
        if np.abs(indices[:, 2] - index).max() > OFF_SLICE or not 0 <= index < slices:
            raise MedsegError(
                f"{path}: contour {number + 1} of '{roi}' lies at slice {height:.2f} of "
                f"0 to {slices - 1}, not on a slice of the series. Use the series that the "
                "contours were drawn on."
            )
        _toggle_inside(mask[index], indices[:, :2])
    if not mask.any():
        raise MedsegError(f"{path}: the contours of '{roi}' hold no voxel of the series.")
    return mask.transpose(2, 1, 0).astype(np.uint8)


def roi_names(path: Path) -> list[str]:
    """Return the names of the regions of interest of an RTSTRUCT."""
    content = path.read_bytes()
    with _told_as_damage(path):
        sequence = _parsed(path, content).StructureSetROISequence
        return [str(item.get("ROIName", "")) for item in sequence]


@contextmanager
def _told_as_damage(path: Path) -> Iterator[None]:
    """Turn what goes wrong in the tags, which pydicom decodes only when asked, into our error."""
    try:
        yield
    except MedsegError:
        raise
    except Exception as error:
        raise MedsegError(
            f"{path}: is not a whole DICOM file ({type(error).__name__}: {error}). Copy or "
            "download it again."
        ) from None


def _parsed(path: Path, content: bytes) -> pydicom.FileDataset:
    dataset = pydicom.dcmread(io.BytesIO(content))
    kind = dataset.get("Modality")
    if kind != "RTSTRUCT" or "StructureSetROISequence" not in dataset:
        raise MedsegError(f"{path}: is not an RTSTRUCT (modality {kind}).")
    return dataset


def _contours(
    path: Path, dataset: pydicom.FileDataset, volume: DicomVolume, roi: str
) -> list[Array]:
    """Return the closed contours of a region as (points, 3) in LPS millimetres."""
    entries = [e for e in dataset.StructureSetROISequence if str(e.get("ROIName", "")) == roi]
    names = [str(entry.get("ROIName", "")) for entry in dataset.StructureSetROISequence]
    if len(entries) != 1:
        found = f"{len(entries)} regions named" if entries else "no region"
        raise MedsegError(
            f"{path}: has {found} '{roi}'.{nearest(roi, names)} The regions are {', '.join(names)}."
        )
    frame = str(entries[0].get("ReferencedFrameOfReferenceUID", ""))
    if frame and volume.frame_of_reference and frame != volume.frame_of_reference:
        raise MedsegError(
            f"{path}: belongs to the frame of reference {frame}, the series to "
            f"{volume.frame_of_reference}. Use the series that the contours were drawn on."
        )
    number = entries[0].ROINumber
    items = [
        contour
        for one in dataset.get("ROIContourSequence", [])
        if one.get("ReferencedROINumber") == number
        for contour in one.get("ContourSequence", [])
        if str(contour.get("ContourGeometricType", "")).startswith(("CLOSED_PLANAR", "CLOSEDPL"))
    ]
    if not items:
        raise MedsegError(f"{path}: region '{roi}' has no closed contour.")
    return [_points(path, roi, index, item) for index, item in enumerate(items)]


def _points(path: Path, roi: str, index: int, item: pydicom.Dataset) -> Array:
    raw = item.get_item("ContourData")
    value = raw.value if raw is not None else b""
    text = value.decode("latin-1") if isinstance(value, bytes) else "\\".join(map(str, value))
    try:
        points = np.array([float(part) for part in text.strip(" \0").split("\\")])
    except ValueError:
        points = np.array([np.nan])
    promised = 3 * int(item.get("NumberOfContourPoints") or points.size / 3)
    # pydicom accepts a value that ends before its length; its last number would be a wrong one.
    whole = not isinstance(raw, RawDataElement) or raw.length in (len(value), UNDEFINED)
    sound = points.size == promised >= 9 and np.isfinite(points).all()
    if not (whole and sound):
        raise MedsegError(
            f"{path}: contour {index + 1} of '{roi}' is damaged: {points.size} numbers, expected "
            f"{max(promised, 9)} finite ones, three a point."
        )
    return points.reshape(-1, 3)


def _toggle_inside(picture: Array, polygon: Array) -> None:
    """Invert the pixels of (rows, columns) whose centres lie inside a polygon of (x, y)."""
    limits = np.array(picture.shape[::-1]) - 1
    low = np.clip(np.floor(polygon.min(axis=0)), 0, limits).astype(int)
    high = np.clip(np.ceil(polygon.max(axis=0)), 0, limits).astype(int)
    grid = np.mgrid[low[1] : high[1] + 1, low[0] : high[0] + 1]
    centres = np.stack([grid[1].ravel(), grid[0].ravel()], axis=1)
    inside = Polygon(polygon).contains_points(centres)
    picture[low[1] : high[1] + 1, low[0] : high[0] + 1] ^= inside.reshape(grid.shape[1:])

"""A DICOM series of CT or MR slices as one volume.

Files are known by their content, never by their names, and are ordered by their positions in
the patient. A series that is not one regular grid is refused: resampling it silently would
move the labels.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medseg_reg.errors import MedsegError
from medseg_reg.io.dicom_file import DicomSlice, read_slice
from medseg_reg.io.geometry import Geometry, Plane, geometry_of, nearest_plane
from medseg_reg.io.pixels import narrowed

Array = np.ndarray[Any, np.dtype[Any]]

GAP_TOLERANCE = 0.01
ROUNDING_MM = 0.011
DRIFT_PIXELS = 0.25
MIN_SLICES = 2


@dataclass(frozen=True)
class DicomVolume:
    """A series on its own grid.

    Attributes:
        array: (columns, rows, slices), the index order of NIfTI; int16 HU or float32.
        affine: 4x4 matrix from indices of the array to RAS+ millimetres.
        plane: the plane in which the slices were taken.
        modality: CT or MR.
        series: SeriesInstanceUID.
        patient: PatientID.
        frame_of_reference: FrameOfReferenceUID.
        files: the files of the slices, in their order.
        notes: what a person should know of the series.
    """

    array: Array
    affine: Array
    plane: Plane
    modality: str
    series: str
    patient: str
    frame_of_reference: str
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()

    def geometry(self, plane: Plane | None = None) -> Geometry:
        """Return the way to the stored order of a plane, by default that of the slices."""
        return geometry_of(self.affine, self.array.shape, plane or self.plane)


def list_files(folder: Path) -> tuple[Path, ...]:
    """Return all files below a folder, sorted; links to folders and hidden files are left out."""
    if not folder.is_dir():
        raise MedsegError(f"{folder}: is not a folder.")
    found = [
        Path(where) / name
        for where, _, names in os.walk(folder)
        for name in names
        if not name.startswith(".")
    ]
    return tuple(sorted(found))


def read_series(
    files: Iterable[Path], *, where: Path | str, series: str | None = None
) -> DicomVolume:
    """Read the one series of slices among some files; its pixels are held once.

    Args:
        files: candidates; what is no slice of CT or MR is left out and noted.
        where: the folder, or whatever names the files together in errors.
        series: SeriesInstanceUID of the one to read, where there are several.

    Raises:
        MedsegError: no series or several; slices that are missing, doubled, damaged, or do not
            make one regular grid. The message names the file or the series and the numbers.
    """
    slices, left_out = [], Counter[str]()
    for path in files:
        one = read_slice(path)
        if isinstance(one, str):
            left_out[one] += 1
        else:
            slices.append(one)
    chosen = _chosen(slices, where, series, left_out)
    normal = np.cross(*chosen[0].directions)
    _check_alike(chosen)
    chosen.sort(key=lambda one: float(one.position @ normal))
    gap = _checked_gap(chosen, normal, where)
    affine = _affine(chosen[0], normal * gap)
    plane = nearest_plane(affine, 2)
    first = chosen[0]
    return DicomVolume(
        array=_stacked(chosen, affine, plane),
        affine=affine,
        plane=plane,
        modality=first.modality,
        series=first.series,
        patient=first.patient,
        frame_of_reference=first.frame_of_reference,
        files=tuple(one.path for one in chosen),
        notes=tuple(f"left out: {count} x {what}" for what, count in sorted(left_out.items())),
    )


def _chosen(
    slices: Sequence[DicomSlice], where: Path | str, wanted: str | None, left_out: Counter[str]
) -> list[DicomSlice]:
    groups: dict[str, list[DicomSlice]] = {}
    for one in slices:
        groups.setdefault(one.series, []).append(one)
    if wanted is not None:
        if wanted not in groups:
            raise MedsegError(f"{where}: has no series {wanted}. It has {_named(groups)}.")
        groups = {wanted: groups[wanted]}
    whole = {uid: group for uid, group in groups.items() if len(group) >= MIN_SLICES}
    if not whole:
        seen = ", ".join(f"{count} x {what}" for what, count in sorted(left_out.items()))
        raise MedsegError(
            f"{where}: holds no series of CT or MR slices ({len(slices)} slices"
            f"{', ' + seen if seen else ''})."
        )
    if len(whole) > 1:
        raise MedsegError(
            f"{where}: holds {len(whole)} series: {_named(whole)}.\nName the one to use "
            "(--series UID), or move the others elsewhere."
        )
    for uid in groups.keys() - whole.keys():
        left_out[f"series {uid} of {len(groups[uid])} slice"] += 1
    return next(iter(whole.values()))


def _named(groups: dict[str, list[DicomSlice]]) -> str:
    shown = [
        f"{uid} ({len(group)} slices {group[0].description!r})" for uid, group in groups.items()
    ]
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")


def _check_alike(slices: Sequence[DicomSlice]) -> None:
    first = slices[0]
    for one in slices[1:]:
        for what, here, there, tolerance in (
            ("size", first.shape, one.shape, 0.0),
            ("orientation", first.orientation, one.orientation, 1e-4),
            ("PixelSpacing", first.spacing, one.spacing, 1e-3 * first.spacing[0]),
        ):
            if max(abs(a - b) for a, b in zip(here, there, strict=True)) > tolerance:
                raise MedsegError(
                    f"{one.path}: its {what} is {there}, that of {first.path.name} is {here}, in "
                    "the same series. Remove what does not belong to the volume."
                )
        if first.modality != one.modality:
            raise MedsegError(f"{one.path}: is {one.modality}, {first.path.name} {first.modality}.")


def _checked_gap(slices: Sequence[DicomSlice], normal: Array, where: Path | str) -> float:
    """Return the distance of the slices, proved constant and along the normal."""
    positions = np.stack([one.position for one in slices])
    heights = positions @ normal
    gaps = np.diff(heights)
    usual = float(np.median(gaps))
    for index, gap in enumerate(gaps):
        pair = f"{slices[index].path} and {slices[index + 1].path.name}"
        if gap < max(GAP_TOLERANCE * usual, 1e-4):
            raise MedsegError(
                f"{pair}: are two slices at one position ({heights[index]:.3f} mm). Remove the "
                "copy, or separate the phases."
            )
        if abs(gap - usual) <= max(GAP_TOLERANCE * usual, ROUNDING_MM):
            continue
        missing = round(gap / usual) - 1
        if missing >= 1 and abs(gap - (missing + 1) * usual) <= 2 * GAP_TOLERANCE * gap:
            raise MedsegError(
                f"{pair}: {missing} slice{'s are' if missing > 1 else ' is'} missing between "
                f"them (gap {gap:.3f} mm, elsewhere {usual:.3f} mm). Download the series again."
            )
        raise MedsegError(
            f"{pair}: the slice gap changes: {gap:.3f} mm, elsewhere {usual:.3f} mm. Resample "
            "the series to one gap first."
        )
    gap = float((heights[-1] - heights[0]) / (len(slices) - 1))
    _check_straight(slices, positions, normal * gap, where)
    return gap


def _check_straight(
    slices: Sequence[DicomSlice], positions: Array, step: Array, where: Path | str
) -> None:
    """Refuse a stack whose slices slide sideways, as those of a tilted gantry do."""
    drift = positions - positions[0] - np.arange(len(slices))[:, None] * step
    sideways = np.linalg.norm(drift - np.outer(drift @ step, step) / (step @ step), axis=1)
    worst = int(np.argmax(sideways))
    if sideways[worst] > DRIFT_PIXELS * min(slices[0].spacing):
        angle = math.degrees(math.atan2(sideways[worst], worst * float(np.linalg.norm(step))))
        raise MedsegError(
            f"{where}: the slices slide sideways by {sideways[worst]:.2f} mm at "
            f"{slices[worst].path.name} (gantry tilt of {angle:.1f} degrees?). Correct the tilt "
            "first, for example with dcm2niix."
        )


def _stacked(slices: Sequence[DicomSlice], affine: Array, plane: Plane) -> Array:
    """Return the values of all slices, (columns, rows, slices), int16 if every slice is.

    In memory they lie in the stored order of the plane of the slices, so that the usual way from
    here into a store copies nothing.
    """
    rows, columns = slices[0].shape
    geometry = geometry_of(affine, (columns, rows, len(slices)), plane)
    stored: Array = np.empty([geometry.source_shape[axis] for axis in geometry.axes], np.int16)
    volume = geometry.to_source(stored)
    for index, one in enumerate(slices):
        place = volume[..., index].T
        values = one.values(place if volume.dtype == np.int16 else None)
        if values.dtype == np.float32 and volume.dtype != np.float32:
            stored = stored.astype(np.float32)
            volume = geometry.to_source(stored)
        if values is not place:
            volume[..., index] = values.T
    return geometry.to_source(narrowed(stored))


def _affine(first: DicomSlice, step: Array) -> Array:
    """Return the matrix from (column, row, slice) to RAS+; DICOM itself counts in LPS+."""
    affine = np.eye(4)
    affine[:3, 0] = first.directions[0] * first.spacing[1]
    affine[:3, 1] = first.directions[1] * first.spacing[0]
    affine[:3, 2] = step
    affine[:3, 3] = first.position
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine

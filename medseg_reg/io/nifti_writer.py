"""NIfTI files written a plane or some slices at a time, without a second volume in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import nibabel
import numpy as np
from isal import igzip

from medseg_reg.files import replacing, require_space
from medseg_reg.io.geometry import Geometry

Array = np.ndarray[Any, np.dtype[Any]]

# Takes the number of a first slice and values (n, H, W).
WriteSlices = Callable[[int, Array], None]

DATA_OFFSET = 352
TURNED_BYTES = 1 << 27


def write_nifti(path: Path, labels: Array, geometry: Geometry) -> None:
    """Write labels in the stored order (S, H, W) as a .nii or .nii.gz on their source grid.

    The file appears whole or not at all, and equal labels give equal bytes.
    """
    volume = geometry.to_source(labels)
    with replacing(path) as temporary, temporary.open("wb") as raw:
        packed = path.name.lower().endswith(".gz")
        # The name and the time of a gzip header would make equal labels differ.
        file = igzip.IGzipFile("", "wb", fileobj=raw, mtime=0) if packed else raw
        file.write(header_bytes(geometry, volume.dtype))
        for plane in range(volume.shape[2]):
            file.write(np.asfortranarray(volume[:, :, plane]).tobytes("F"))
        if packed:
            file.close()


@contextmanager
def map_on_disk(path: Path, geometry: Geometry) -> Iterator[WriteSlices]:
    """Open a new float32 volume on the grid of a source; the file appears when the block succeeds.

    Its voxels go to the disk and not into memory, uncompressed, so its name must end in .nii.

    Yields:
        A function that takes the number of a first slice and values (n, H, W) from there on, in
        the stored order. All slices must be written.

    Raises:
        MedsegError: the disk has no room for it.
    """
    if path.suffix.lower() != ".nii":
        raise ValueError(f"{path}: a map is written uncompressed, so its name ends in .nii")
    voxels = int(np.prod(geometry.source_shape))
    in_order = geometry.axes[0] == 2
    require_space(path.parent, 4 * voxels * (1 if in_order else 2) + DATA_OFFSET)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(header_bytes(geometry, np.dtype(np.float32)))
        if in_order:
            yield partial(_write_planes, file, geometry)
            return
        # The slices cross the planes of the file, so they wait until all are there.
        with tempfile.TemporaryFile(dir=path.parent) as waiting:
            yield partial(_write_slices, waiting, geometry)
            waiting.flush()
            _turn(waiting, file, geometry)


def _write_planes(file: BinaryIO, geometry: Geometry, start: int, values: Array) -> None:
    """Write slices that are planes of the file, which may run the other way."""
    for number, one in enumerate(values.astype("<f4", copy=False), start):
        plane = geometry.to_source(one[np.newaxis])[:, :, 0]
        index = geometry.source_shape[2] - 1 - number if geometry.flips[0] else number
        file.seek(DATA_OFFSET + index * plane.nbytes)
        file.write(plane.tobytes("F"))


def _write_slices(file: BinaryIO, geometry: Geometry, start: int, values: Array) -> None:
    """Write slices one after the other."""
    content = np.ascontiguousarray(values, "<f4")
    file.seek(start * content[0].nbytes)
    file.write(content.tobytes())


def _turn(waiting: BinaryIO, file: BinaryIO, geometry: Geometry) -> None:
    """Write slices that lie one after the other in a file as the planes of another one."""
    slices, *size = (geometry.source_shape[axis] for axis in geometry.axes)
    planes, across = geometry.source_shape[2], geometry.axes.index(2)
    step = max(1, TURNED_BYTES * planes // (4 * slices * size[0] * size[1]))
    for start in range(0, planes, step):
        stop = min(start + step, planes)
        run = slice(planes - stop, planes - start) if geometry.flips[across] else slice(start, stop)
        place = (run, slice(None)) if across == 1 else (slice(None), run)
        # All slices are read anew for each block. Mapped into memory, they would be counted as it.
        waiting.seek(0)
        block = np.empty((slices, *np.broadcast_to(0, size)[place].shape), "<f4")
        for number in range(slices):
            one = np.frombuffer(waiting.read(4 * size[0] * size[1]), "<f4").reshape(size)
            block[number] = one[place]
        turned = geometry.to_source(block)
        for plane in range(turned.shape[2]):
            file.write(turned[:, :, plane].tobytes("F"))


def header_bytes(geometry: Geometry, dtype: np.dtype[Any]) -> bytes:
    """Return the header of a one-file NIfTI on a source grid, up to the first voxel."""
    affine = np.array(geometry.source_affine)
    # One number for all voxels, so that the header costs no volume.
    voxels = np.broadcast_to(np.zeros((), dtype), geometry.source_shape)
    image = nibabel.Nifti1Image(cast(Any, voxels), affine)
    image.header.set_xyzt_units("mm")
    if _is_orthonormal(affine):
        # Without this code ITK ignores the quaternion and warns; a sheared grid has none.
        image.set_qform(affine, code="aligned")
    header = image.header.copy()
    header["vox_offset"] = DATA_OFFSET
    header.set_slope_inter(1, 0)
    return bytes(header.binaryblock) + bytes(DATA_OFFSET - len(header.binaryblock))


def _is_orthonormal(affine: Array) -> bool:
    cosines = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.allclose(cosines.T @ cosines, np.eye(3), atol=1e-5))

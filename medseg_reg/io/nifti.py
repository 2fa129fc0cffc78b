"""NIfTI files: read in any orientation, without resampling."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from isal import isal_zlib
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from medseg_reg.errors import MedsegError

Array = np.ndarray[Any, np.dtype[Any]]

GZIP_MAGIC = b"\x1f\x8b"
MAX_VOLUME_BYTES = 1 << 34
HEADER_BYTES = 1 << 12
PACKED_HEADER_BYTES = 1 << 16
UNSCALED = (1.0, 0.0)
_HEADERS: dict[int, Any] = {348: nibabel.Nifti1Header, 540: nibabel.Nifti2Header}
_BAD_HEADER = (
    HeaderDataError,
    ImageFileError,
    WrapStructError,
    ValueError,
    TypeError,
    KeyError,
    OverflowError,
    np.linalg.LinAlgError,
)


@dataclass(frozen=True)
class NiftiVolume:
    """A volume as it lies in its file.

    Attributes:
        array: (X, Y, Z), or (X, Y, Z, C) where channels were asked for; the stored type if the
            file declares no scaling, else float64.
        affine: 4x4 matrix from indices to RAS+ millimetres.
        notes: what a person should know of the file.
        scaling: slope and intercept that are still to be applied.
    """

    array: Array
    affine: Array
    notes: tuple[str, ...] = ()
    scaling: tuple[float, float] = UNSCALED


def read_nifti(
    path: Path | str, *, content: bytes | None = None, channels: bool = False
) -> NiftiVolume:
    """Read a .nii or .nii.gz file; compression is known by the content, not by the name.

    Args:
        path: the file; it names the file in errors also when `content` is given.
        content: the bytes of the file, where they come from elsewhere (a zip archive).
        channels: keep a fourth axis of more than one entry, as channels.

    Raises:
        MedsegError: the file is no NIfTI, is truncated or damaged, has more than one frame, an
            affine matrix that is not finite or singular, or pixels that are NaN or infinite.
    """
    volume = _stored(path, Path(path).read_bytes() if content is None else content, channels)
    return replace(volume, array=_scaled(path, volume), scaling=UNSCALED)


def open_nifti(path: Path, *, channels: bool = False) -> NiftiVolume:
    """Read a file as `read_nifti` does, but leave scaling and a look at each pixel to the caller.

    An uncompressed file is mapped into memory, so that of a large one only what is used is read; it
    must not change meanwhile.

    Raises:
        MedsegError: as of `read_nifti`, but for pixels that are NaN or infinite.
    """
    if path.stat().st_size == 0:
        return _stored(path, b"", channels)
    with path.open("rb") as file:
        return _stored(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), channels)


def _stored(path: Path | str, content: bytes | mmap.mmap, channels: bool) -> NiftiVolume:
    """Return a volume as it is stored, and its scaling."""
    packed = content if content[:2] == GZIP_MAGIC else None
    start = content[:HEADER_BYTES]
    if packed is not None:
        # Of a piece of the file: what is left over of the rest would be copied.
        start = _inflate(path, packed[:PACKED_HEADER_BYTES], HEADER_BYTES)[0]
    header = _parse_header(path, start)
    offset, size = _data_place(path, header)
    if packed is not None:
        content, whole = _inflate(path, packed, offset + size)
        if not whole and len(content) < offset + size:
            raise MedsegError(
                f"{path}: the compressed file is truncated: {len(content)} of {offset + size} "
                "bytes could be unpacked. Copy or download it again."
            )
    if len(content) < offset + size:
        raise MedsegError(
            f"{path}: is truncated: {len(content)} bytes, but its header promises "
            f"{offset + size}. Copy or download it again."
        )
    shape = _checked_shape(path, header, channels)
    stored = np.frombuffer(content, header.get_data_dtype(), int(np.prod(shape)), offset)
    affine, notes = _checked_affine(path, header)
    scaling = _checked_scaling(path, header)
    return NiftiVolume(stored.reshape(shape, order="F"), affine, notes, scaling)


def is_nifti_name(name: str) -> bool:
    """Whether a file name is that of a NIfTI volume; the `._` twins that macOS makes are not."""
    return name.lower().endswith((".nii", ".nii.gz")) and not name.startswith(".")


def _inflate(path: Path | str, content: bytes | mmap.mmap, size: int) -> tuple[bytes, bool]:
    """Unpack gzip members up to `size` bytes; also tell whether the last one ended well."""
    parts: list[bytes] = []
    length, whole = 0, False
    while content and length < size:
        unpacker = isal_zlib.decompressobj(31)
        try:
            while content and not unpacker.eof and length < size:
                # One byte more than wanted lets the unpacker reach and check the trailer.
                parts.append(unpacker.decompress(content, size - length + 1))
                length += len(parts[-1])
                content = unpacker.unconsumed_tail
        # Its stub takes the class for an instance.
        except isal_zlib.error as error:  # type: ignore[misc]
            if whole and content[: len(GZIP_MAGIC)] != GZIP_MAGIC:
                break  # padding after the last member
            raise MedsegError(
                f"{path}: the compressed file is damaged ({error}). Copy or download it again."
            ) from None
        whole, content = unpacker.eof, unpacker.unused_data
        if not whole:
            break
    return parts[0] if len(parts) == 1 else b"".join(parts), whole


def _parse_header(path: Path | str, start: bytes) -> nibabel.Nifti1Header:
    sizes = {order: int.from_bytes(start[:4], order) for order in ("little", "big")}
    kind = next((_HEADERS[size] for size in sizes.values() if size in _HEADERS), None)
    if kind is None or len(start) < kind.template_dtype.itemsize:
        raise MedsegError(f"{path}: is not a NIfTI file (no NIfTI header at its start).")
    try:
        header: nibabel.Nifti1Header = kind(start[: kind.template_dtype.itemsize], check=False)
        if header["magic"].item()[:3] not in (b"n+1", b"n+2"):
            raise MedsegError(
                f"{path}: is not a one-file NIfTI (magic {header['magic'].item()!r}). "
                "Save header and image as one .nii or .nii.gz."
            )
        header.get_data_dtype()
        return header
    except _BAD_HEADER as error:
        raise MedsegError(f"{path}: the NIfTI header is damaged ({error}).") from None


def _data_place(path: Path | str, header: nibabel.Nifti1Header) -> tuple[int, int]:
    """Return the first byte and the number of bytes of the pixels, as the header promises."""
    dtype = header.get_data_dtype()
    if dtype.kind not in "uif":
        raise MedsegError(f"{path}: pixels are {dtype}, expected whole or real numbers.")
    try:
        shape = tuple(int(n) for n in header.get_data_shape())
        offset = int(header.get_data_offset())
    except _BAD_HEADER as error:
        raise MedsegError(f"{path}: the NIfTI header is damaged ({error}).") from None
    size = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) <= 0 or size > MAX_VOLUME_BYTES or offset < header.sizeof_hdr:
        raise MedsegError(
            f"{path}: the NIfTI header is damaged: shape {shape}, pixels from byte {offset}."
        )
    return offset, size


def _checked_shape(
    path: Path | str, header: nibabel.Nifti1Header, channels: bool
) -> tuple[int, ...]:
    shape = tuple(int(n) for n in header.get_data_shape())
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) == 3 or (channels and len(shape) == 4):
        return shape
    raise MedsegError(
        f"{path}: has the shape {shape}, expected one volume (X, Y, Z). Split the frames into "
        "files of their own."
    )


def _checked_scaling(path: Path | str, header: nibabel.Nifti1Header) -> tuple[float, float]:
    try:
        slope, intercept = header.get_slope_inter()
    except _BAD_HEADER as error:
        raise MedsegError(f"{path}: scl_slope or scl_inter is not usable ({error}).") from None
    return UNSCALED if slope is None else (float(slope), float(intercept or 0))


def _scaled(path: Path | str, volume: NiftiVolume) -> Array:
    array = volume.array
    if volume.scaling != UNSCALED:
        array = array * volume.scaling[0] + volume.scaling[1]
    if array.dtype.kind == "f":
        bad = array.size - int(np.count_nonzero(np.isfinite(array)))
        if bad:
            raise MedsegError(
                f"{path}: {bad} of {array.size} pixels are NaN or infinite. Repair the file, or "
                "leave the case out with --skip."
            )
    return array


def _checked_affine(
    path: Path | str, header: nibabel.Nifti1Header
) -> tuple[Array, tuple[str, ...]]:
    """Return the affine matrix, and a note where the file does not know its orientation."""
    try:
        with np.errstate(all="ignore"):
            affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    except _BAD_HEADER as error:
        raise MedsegError(f"{path}: the affine matrix is damaged ({error}).") from None
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        rows = np.array2string(affine[:3], precision=4, separator=", ").replace("\n", "")
        raise MedsegError(f"{path}: the affine matrix is not finite or is singular: {rows}.")
    known = int(header["sform_code"]) > 0 or int(header["qform_code"]) > 0
    return affine, () if known else ("the file does not state its orientation; assumed, unproved",)

"""One slice of a DICOM series: its numbers, checked, and its pixels as real values."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom

from medseg_reg.errors import MedsegError
from medseg_reg.io.dicom_tags import NATIVE, WANTED, Tags
from medseg_reg.io.pixels import narrowed

Array = np.ndarray[Any, np.dtype[Any]]

SLICE_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.2": "CT",
    "1.2.840.10008.5.1.4.1.1.4": "MR",
}
MULTI_FRAME_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.2.1",
    "1.2.840.10008.5.1.4.1.1.2.2",
    "1.2.840.10008.5.1.4.1.1.4.1",
    "1.2.840.10008.5.1.4.1.1.4.4",
}
_WITHOUT_MODALITY = {"1.2.840.10008.1.3.10": "DICOMDIR"}
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
AIR_HU = -1024


@dataclass
class DicomSlice:
    """One image of a series.

    Attributes:
        path: its file.
        series: SeriesInstanceUID; empty in some anonymised files, which then make one series.
        instance: SOPInstanceUID.
        modality: CT or MR.
        description: SeriesDescription, or an empty string.
        patient: PatientID, or an empty string.
        frame_of_reference: FrameOfReferenceUID, or an empty string.
        position: centre of the first pixel in LPS millimetres, (3,).
        orientation: directions along a row and along a column in LPS, six numbers.
        spacing: distance of rows and of columns, in millimetres.
        shape: rows and columns.
    """

    path: Path
    series: str
    instance: str
    modality: str
    description: str
    patient: str
    frame_of_reference: str
    position: Array
    orientation: tuple[float, ...]
    spacing: tuple[float, float]
    shape: tuple[int, int]
    _tags: Tags

    @property
    def directions(self) -> Array:
        """Directions along a row and along a column in LPS, (2, 3)."""
        return np.array(self.orientation).reshape(2, 3)

    def values(self, place: Array | None = None) -> Array:
        """Return the pixels as real values, (rows, columns): int16 where whole, else float32.

        Slope and intercept are this slice's own. In CT, padding and everything below -1024 HU
        become -1024 HU; in MR, padding becomes 0. They are read from the file anew.

        Args:
            place: an int16 array (rows, columns) that may be filled and returned, which saves a
                copy; its content is undefined where another array is returned.

        Raises:
            MedsegError: pixels are truncated, or their encoding is not supported.
        """
        return _rescaled(self._tags, self.modality, self.shape, place)


def read_slice(path: Path, content: bytes | None = None) -> DicomSlice | str:
    """Read a file; return the slice, or in a few words why it is not one.

    Its pixels are not kept, because with those of all slices of a series a volume would be held
    twice; `DicomSlice.values` reads them when there is a place for them.

    Args:
        path: the file.
        content: its bytes, if they do not lie in the file; they are kept.

    Raises:
        MedsegError: the file is an image of CT or MR but damaged, or lacks a needed tag.
    """
    held, content = content is not None, path.read_bytes() if content is None else content
    if content[128:132] != b"DICM" and not _looks_like_dicom(content):
        if path.suffix.lower() in DICOM_SUFFIXES:
            # Left out silently, a damaged slice at the end of a series would shorten the volume.
            raise MedsegError(
                f"{path}: {'is empty' if not content else 'holds no DICOM'}, though its name says "
                "DICOM. Download it again, or remove it."
            )
        return "not DICOM"
    try:
        with warnings.catch_warnings():
            # pydicom warns of a compressed image that is cut off, and then finds no tag at all.
            warnings.filterwarnings("error", message="End of (file|input) reached")
            dataset = pydicom.dcmread(io.BytesIO(content), specific_tags=WANTED, force=True)
    except Exception as error:
        raise MedsegError(
            f"{path}: the DICOM file is damaged ({type(error).__name__}: {error}). Download it "
            "again, or remove it."
        ) from None
    tags = Tags(path, dataset, held)
    kind = tags.kind()
    if kind in MULTI_FRAME_CLASSES:
        raise MedsegError(
            f"{path}: is a multi-frame (Enhanced) DICOM image, which is not supported. Convert it "
            "to NIfTI with dcm2niix."
        )
    if kind not in SLICE_CLASSES:
        modality = tags.text("Modality") or _WITHOUT_MODALITY.get(kind)
        if modality is None:
            # Else a file cut off in its header would pass for something that is no slice.
            raise MedsegError(
                f"{path}: the DICOM file is damaged (it tells neither its class nor its "
                "modality). Download it again, or remove it."
            )
        return f"{modality} object"
    if "LOCALIZER" in tags.text("ImageType"):
        return "localizer"
    return _slice_of(path, SLICE_CLASSES[kind], tags)


def _slice_of(path: Path, modality: str, tags: Tags) -> DicomSlice:
    orientation = tuple(tags.numbers("ImageOrientationPatient", 6))
    along, down = orientation[:3], orientation[3:]
    products = (_dot(along, along) - 1, _dot(down, down) - 1, _dot(along, down))
    if max(map(abs, products)) > 1e-3:
        raise MedsegError(
            f"{path}: ImageOrientationPatient {orientation} is not two unit vectors at right "
            "angles."
        )
    spacing = tags.numbers("PixelSpacing", 2)
    if min(spacing) <= 0:
        raise MedsegError(f"{path}: PixelSpacing is {spacing}, expected lengths above 0.")
    shape = (tags.integer("Rows"), tags.integer("Columns"))
    if min(shape) == 0:
        raise MedsegError(f"{path}: has {shape[0]} Rows and {shape[1]} Columns, so no pixels.")
    return DicomSlice(
        path=path,
        series=tags.text("SeriesInstanceUID"),
        instance=tags.text("SOPInstanceUID"),
        modality=modality,
        description=tags.text("SeriesDescription"),
        patient=tags.text("PatientID"),
        frame_of_reference=tags.text("FrameOfReferenceUID"),
        position=np.array(tags.numbers("ImagePositionPatient", 3)),
        orientation=orientation,
        spacing=(spacing[0], spacing[1]),
        shape=shape,
        _tags=tags,
    )


def _dot(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def _looks_like_dicom(content: bytes) -> bool:
    """Whether a file without the DICM mark begins with a data element of group 2 or 8."""
    group = int.from_bytes(content[:2], "little")
    return group in (0x0002, 0x0008) and len(content) > 8 and content[3] == 0


def _rescaled(
    tags: Tags, modality: str, shape: tuple[int, int], place: Array | None = None
) -> Array:
    required = None if modality == "CT" else 1.0
    slope = tags.numbers("RescaleSlope", 1, required)[0]
    intercept = tags.numbers("RescaleIntercept", 1, None if modality == "CT" else 0.0)[0]
    if slope == 0:
        raise MedsegError(f"{tags.path}: RescaleSlope is 0, so every pixel would be equal.")
    if tags.syntax in NATIVE:
        stored = _native_pixels(tags, shape)
        values = _scale(stored, slope, intercept, place)
    else:
        values = _decoded_pixels(tags, shape)
    padding = _padding(tags, slope, intercept, modality)
    if padding is not None and not (modality == "CT" and padding[1] < AIR_HU):
        values[(values >= padding[0]) & (values <= padding[1])] = _background(modality)
    if modality == "CT":
        np.maximum(values, AIR_HU, out=values)
    return narrowed(values)


def _background(modality: str) -> int:
    return AIR_HU if modality == "CT" else 0


def _native_pixels(tags: Tags, shape: tuple[int, int]) -> Array:
    """Return the stored numbers of an image that is not compressed; bits outside are cut off."""
    allocated, signed = tags.integer("BitsAllocated"), tags.integer("PixelRepresentation") == 1
    stored = tags.integer("BitsStored")
    _check_layout(tags, allocated, stored)
    dtype = np.dtype(f"{NATIVE[tags.syntax]}{'i' if signed else 'u'}{allocated // 8}")
    expected = shape[0] * shape[1] * dtype.itemsize
    data = tags.pixels()
    if len(data) < expected:
        raise MedsegError(
            f"{tags.path}: pixel data are truncated: {len(data)} bytes, expected {expected}. "
            "Download the file again."
        )
    pixels = np.frombuffer(data, dtype, shape[0] * shape[1]).reshape(shape)
    if stored < allocated:
        unused = allocated - stored
        pixels = (pixels << unused) >> unused
    return pixels


def _check_layout(tags: Tags, allocated: int, stored: int) -> None:
    layout = {
        "BitsAllocated": (allocated, allocated in (8, 16, 32)),
        "BitsStored": (stored, 0 < stored <= allocated),
        "HighBit": (tags.integer("HighBit"), tags.integer("HighBit") == stored - 1),
        "SamplesPerPixel": (tags.integer("SamplesPerPixel", 1), None),
        "NumberOfFrames": (tags.text("NumberOfFrames") or "1", None),
    }
    for word, (value, fits) in layout.items():
        if not (str(value) == "1" if fits is None else fits):
            raise MedsegError(f"{tags.path}: {word} is {value}, which is not supported.")


def _scale(stored: Array, slope: float, intercept: float, place: Array | None = None) -> Array:
    """Return stored * slope + intercept, in 16-bit whole numbers where that is exact."""
    whole = slope == 1 and intercept == int(intercept) and abs(intercept) < 32768
    if whole and stored.dtype.itemsize <= 2:
        # The type alone often says that the sum fits, which saves two passes over the pixels.
        low, high = np.iinfo(stored.dtype).min, np.iinfo(stored.dtype).max
        if low + intercept < -32768 or high + intercept > 32767:
            low, high = int(stored.min()), int(stored.max())
        low, high = low + int(intercept), high + int(intercept)
        if low >= -32768 and high <= 32767:
            if stored.dtype.itemsize == 2 and stored.dtype.isnative:
                # The sum fits, so adding modulo 2**16 gives it for unsigned numbers too.
                return np.add(stored.view(np.int16), np.int16(intercept), out=place)
            return (stored.astype(np.int32) + int(intercept)).astype(np.int16)
    return stored * slope + intercept


def _padding(
    tags: Tags, slope: float, intercept: float, modality: str
) -> tuple[float, float] | None:
    """Return the real values between which pixels are padding, if the file declares padding."""
    if not tags.raw["PixelPaddingValue"]:
        return None
    signed = tags.integer("PixelRepresentation") == 1
    first = tags.integer("PixelPaddingValue", signed=signed)
    last = tags.integer("PixelPaddingRangeLimit", first, signed=signed)
    low, high = sorted((first * slope + intercept, last * slope + intercept))
    # Some writers declare 0 in signed images, where it is water: padding is never tissue.
    if modality == "CT" and high > -900 and low < 3071:
        return None
    return low, high


def _decoded_pixels(tags: Tags, shape: tuple[int, int]) -> Array:
    """Decode a compressed image by SimpleITK, which applies slope and intercept itself."""
    import SimpleITK as sitk  # half a second to import, and most series are not compressed

    if not tags.pixels():
        raise MedsegError(f"{tags.path}: has no pixel data; is the file whole?")
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(tags.path))
    quiet = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        values = np.squeeze(sitk.GetArrayFromImage(reader.Execute()))
    except RuntimeError as error:
        line = str(error).strip().splitlines()[-1][:120]
        raise MedsegError(
            f"{tags.path}: pixels of the transfer syntax {tags.syntax} could not be decoded "
            f"({line}). Download the file again, or decompress it with gdcmconv --raw."
        ) from None
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(quiet)
    if values.shape != shape:
        raise MedsegError(f"{tags.path}: decodes to {values.shape}, its header says {shape}.")
    return values

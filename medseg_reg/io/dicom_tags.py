"""The tags of a DICOM slice, raw, and where its pixels lie in the file.

Numbers are parsed from the raw bytes of their tags, because text that is no number must be an
error that names file and tag, never a NaN in a matrix.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pydicom
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from medseg_reg.errors import MedsegError

# The transfer syntaxes that are not compressed, and their order of bytes.
NATIVE: dict[str, str] = {
    ImplicitVRLittleEndian: "<",
    ExplicitVRLittleEndian: "<",
    DeflatedExplicitVRLittleEndian: "<",
    ExplicitVRBigEndian: ">",
}
_KEYWORDS = [
    "SOPClassUID",
    "SOPInstanceUID",
    "Modality",
    "SeriesInstanceUID",
    "SeriesDescription",
    "PatientID",
    "ImageType",
    "FrameOfReferenceUID",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "SamplesPerPixel",
    "NumberOfFrames",
    "RescaleSlope",
    "RescaleIntercept",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
]
_PIXELS = Tag("PixelData")
_TAGS = {word: Tag(word) for word in _KEYWORDS}
WANTED = [*_TAGS.values(), _PIXELS]


class Tags:
    """The raw values of the tags of one file, parsed strictly.

    Args:
        path: the file.
        dataset: what pydicom read of it.
        held: whether its bytes came from elsewhere, so that the pixels have to be kept.
    """

    def __init__(self, path: Path, dataset: pydicom.FileDataset, held: bool) -> None:
        self.path = path
        meta = dataset.file_meta
        self.syntax = _uid(meta, "TransferSyntaxUID") or ImplicitVRLittleEndian
        self.declared = _uid(meta, "MediaStorageSOPClassUID")
        self.little_endian = bool(dataset.original_encoding[1])
        found = {element.tag: element for element in dataset.values()}
        self.raw = {word: _raw(found.get(tag)) for word, tag in _TAGS.items()}
        pixels = found.get(_PIXELS)
        self._pixels = _raw(pixels)
        self._place: tuple[int, int] | None = None
        # What is inflated has another place in the file.
        native = self.syntax in NATIVE and self.syntax != DeflatedExplicitVRLittleEndian
        if not held and native and isinstance(pixels, RawDataElement) and pixels.value:
            self._place, self._pixels = (pixels.value_tell, len(pixels.value)), None
        elif not held and self.syntax not in NATIVE:
            self._pixels = (self._pixels or b"")[:1]  # the decoder reads the file itself

    def pixels(self) -> bytes:
        """Return the pixels as they are encoded; of a compressed image, whether there are any."""
        if self._place is None:
            return self._pixels or b""
        with self.path.open("rb") as file:
            file.seek(self._place[0])
            return file.read(self._place[1])

    def kind(self) -> str:
        """Return the SOP class, by the file's header where the file is cut off before its own."""
        kind = self.text("SOPClassUID")
        return self.declared if self.declared.startswith(kind) else kind

    def text(self, word: str) -> str:
        """Return the value of a tag as text; empty where it is missing."""
        value = self.raw[word]
        return (value or b"").decode("latin-1").strip(" \0")

    def integer(self, word: str, default: int | None = None, signed: bool = False) -> int:
        """Return a 16-bit number; only one with a default may be missing."""
        value = self.raw[word]
        if not value and default is not None:
            return default
        if not value or len(value) < 2:
            raise MedsegError(f"{self.path}: {word} is missing; is the file whole?")
        return int.from_bytes(value[:2], "little" if self.little_endian else "big", signed=signed)

    def numbers(self, word: str, count: int, default: float | None = None) -> list[float]:
        """Return decimal numbers; missing, malformed and infinite ones are an error."""
        text = self.text(word)
        if not text and default is not None:
            return [default] * count
        try:
            values = [float(part) for part in text.split("\\")] if "_" not in text else []
        except ValueError:
            values = []
        if len(values) != count or not all(math.isfinite(value) for value in values):
            tag = _TAGS[word]
            raise MedsegError(
                f"{self.path}: {word} ({tag >> 16:04X},{tag & 0xFFFF:04X}) is "
                f"{text[:60]!r}, expected {count} finite number{'s' * (count > 1)}. The series "
                "cannot be placed or scaled without it."
            )
        return values


def _uid(meta: Any, word: str) -> str:
    value = _raw(meta.get_item(Tag(word))) if Tag(word) in meta else None
    return (value or b"").decode("latin-1").strip(" \0")


def _raw(element: Any) -> bytes | None:
    if element is None:
        return None
    if isinstance(element, RawDataElement):
        return element.value
    # pydicom has decoded this one already; what is asked for here is bytes.
    return str(element.value).encode("latin-1", "replace") if element.value else None

"""Labels of a DICOM series as a DICOM Segmentation object (SEG), written by highdicom.

One segment a class, one frame a slice on which the class is found; each frame refers to the
instance of the series that it lies on.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pydicom
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid
from pydicom.valuerep import DA, DS, TM

from medseg_reg import __version__
from medseg_reg.errors import MedsegError
from medseg_reg.files import replacing
from medseg_reg.io.dicom import DicomVolume
from medseg_reg.io.segment_codes import SegmentCode, segment_code

Array = np.ndarray[Any, np.dtype[Any]]

LONGEST = 64  # characters of a DICOM "long string"
SERIES_NUMBER = 1000

# Tags that may be empty, but have to be there in what is written.
_MAY_BE_EMPTY = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
)
_DATES = ("PatientBirthDate", "StudyDate", "StudyTime")
_UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")


@dataclass(frozen=True)
class Algorithm:
    """What made the labels, as it stands in the object.

    Attributes:
        name: such as the name of the run.
        version: such as the first digits of the hash of its weights.
    """

    name: str
    version: str


UNKNOWN = Algorithm("medseg_reg", "unknown")


@dataclass(frozen=True)
class SegWriter:
    """Writes labels of one series.

    Attributes:
        files: the files of the series, in the order of its slices.
        gap: distance of the slices, in millimetres.
        classes: the names of the classes; the first is the background.
        algorithm: what made the labels.
    """

    files: tuple[Path, ...]
    gap: float
    classes: tuple[str, ...]
    algorithm: Algorithm

    @classmethod
    def of(
        cls, volume: DicomVolume, classes: Sequence[str], algorithm: Algorithm
    ) -> tuple[SegWriter, list[str]]:
        """Prepare to write labels of a series, and find out now whether that will work.

        Returns:
            The writer, and what a person should know of the series.

        Raises:
            MedsegError: highdicom is missing, or the series lacks what a SEG refers to.
        """
        gap = float(np.linalg.norm(volume.affine[:3, 2]))
        writer = cls(volume.files, gap, tuple(classes), algorithm)
        headers, notes = writer._headers()
        rows, columns = volume.array.shape[1], volume.array.shape[0]
        # With one slice, which has every tag that the whole needs.
        writer._segmentation(headers[:1], np.ones((1, rows, columns), np.uint8))
        return writer, notes

    def write(self, path: Path, labels: Array) -> None:
        """Write labels (slices, rows, columns), in the order of the files; whole or not at all.

        Raises:
            MedsegError: the files of the series have changed since.
        """
        headers, _ = self._headers()
        found = self._segmentation(headers, labels)
        with replacing(path) as temporary, _told(self.files[0]):
            found.save_as(temporary)

    def _headers(self) -> tuple[list[pydicom.Dataset], list[str]]:
        """Return the tags of all slices without pixels, completed, and notes on them."""
        headers: list[pydicom.Dataset] = []
        for path in self.files:
            with _told(path):
                headers.append(pydicom.dcmread(path, stop_before_pixels=True, force=True))
                _complete(headers[-1], path)
                # A thickness is often missing, and the gap of the tags often wrong.
                gap = DS(self.gap, auto_format=True)
                headers[-1].SliceThickness = headers[-1].get("SliceThickness") or gap
                headers[-1].SpacingBetweenSlices = gap
        first, notes = headers[0], []
        for word in _DATES:
            if not _is_date(first, word):
                notes.append(f"{word} is {first[word].value!r}, which is none; it stays empty")
                for one in headers:
                    setattr(one, word, "")
        lacking = [word for word in _UIDS if not first.get(word)]
        # Made of the instances, so that a series gets the same ones each time.
        instances = [str(one.SOPInstanceUID) for one in headers]
        for word in lacking:
            uid = generate_uid(entropy_srcs=[word, *instances])
            for one in headers:
                setattr(one, word, uid)
        if lacking:
            notes.append(
                f"the series states no {' and no '.join(lacking)} (was it anonymised?); made-up "
                "ones stand in the SEG, so a viewer may not show the two together"
            )
        return headers, notes

    def _segmentation(self, headers: list[pydicom.Dataset], labels: Array) -> Any:
        highdicom = require_highdicom()
        first = headers[0]
        with _told(self.files[0]):
            return highdicom.seg.Segmentation(
                source_images=headers,
                pixel_array=labels,
                segmentation_type="BINARY",
                segment_descriptions=self._descriptions(highdicom),
                series_instance_uid=highdicom.UID(),
                series_number=SERIES_NUMBER + int(first.get("SeriesNumber") or 0),
                sop_instance_uid=highdicom.UID(),
                instance_number=1,
                manufacturer="medseg_reg",
                manufacturer_model_name=self.algorithm.name[:LONGEST],
                software_versions=f"medseg_reg {__version__}",
                device_serial_number=self.algorithm.version[:LONGEST],
                content_label="SEGMENTATION",
                content_description=f"Labels by {self.algorithm.name}"[:LONGEST],
                series_description=f"Labels by {self.algorithm.name}"[:LONGEST],
                # It cannot leave out all frames, and says so.
                omit_empty_frames=bool(labels.any()),
            )

    def _descriptions(self, highdicom: ModuleType) -> list[Any]:
        identification = highdicom.AlgorithmIdentificationSequence(
            name=self.algorithm.name[:LONGEST],
            family=codes.DCM.ArtificialIntelligence,
            version=self.algorithm.version[:LONGEST],
        )
        found = []
        for number, name in enumerate(self.classes[1:], start=1):
            code = segment_code(name)
            found.append(
                highdicom.seg.SegmentDescription(
                    segment_number=number,
                    segment_label=name[:LONGEST],
                    segmented_property_category=getattr(codes.SCT, code.category),
                    segmented_property_type=getattr(codes.SCT, code.kind),
                    algorithm_type="AUTOMATIC",
                    algorithm_identification=identification,
                )
            )
            _add_side(highdicom, found[-1], code)
        return found


def require_highdicom() -> ModuleType:
    """Import highdicom.

    Raises:
        MedsegError: it is not installed; says how to install it.
    """
    try:
        import highdicom
    except ImportError:
        raise MedsegError(
            "DICOM SEG is written by highdicom, which is not installed: "
            "pip install 'medseg-reg[dicom-seg]', or write NIfTI."
        ) from None
    return highdicom


def _complete(header: pydicom.Dataset, path: Path) -> None:
    """Add what some anonymisers take away and what can be known without it.

    Raises:
        MedsegError: the file does not say which instance it is.
    """
    meta = header.file_meta
    for word in ("SOPClassUID", "SOPInstanceUID"):
        if not header.get(word):
            uid = meta.get(f"MediaStorage{word}")
            if not uid:
                raise MedsegError(
                    f"{path}: has no {word}, so a SEG cannot refer to it. Write NIfTI instead "
                    "(--format nifti)."
                )
            setattr(header, word, uid)
    for word in _MAY_BE_EMPTY:
        if word not in header:
            setattr(header, word, "")


def _is_date(header: pydicom.Dataset, word: str) -> bool:
    """Whether a date or time is empty or one that can be read."""
    value, kind = str(header[word].value or ""), header[word].VR
    try:
        (DA if kind == "DA" else TM)(value)
    except ValueError:
        return False
    return True


def _add_side(highdicom: ModuleType, description: Any, code: SegmentCode) -> None:
    if code.side:
        side = highdicom.sr.CodedConcept.from_code(getattr(codes.SCT, code.side))
        kind = description.SegmentedPropertyTypeCodeSequence[0]
        kind.SegmentedPropertyTypeModifierCodeSequence = pydicom.Sequence([side])


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn what highdicom and pydicom make of odd tags into our error; their warnings are hidden.

    Tags of the source that are only unusual, such as names of one part, are none of our business.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (MedsegError, OSError, MemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise MedsegError(
            f"{path}: no DICOM SEG can be made for its series ({type(error).__name__}: {text}). "
            "Repair the tags, or write NIfTI instead (--format nifti)."
        ) from None

"""Small DICOM series, whole and broken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

SHAPE = (6, 10, 12)


@pytest.fixture
def ramp() -> np.ndarray:
    """A volume whose every voxel is different: (slices, rows, columns)."""
    return np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE) - 300


def slice_dataset(pixels: np.ndarray, index: int, **tags: Any) -> Dataset:
    """One CT slice; tags given as text are written as they are, None removes a tag."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = generate_uid(entropy_srcs=["image", str(index), str(tags)])
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.Modality, dataset.SeriesDescription = "CT", "test"
    dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = "1.2.3", "1.2.4"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.ImagePositionPatient = [-10, -20, 5 + 2.5 * index]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing = [0.8, 0.7]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.BitsAllocated = pixels.dtype.itemsize * 8
    dataset.BitsStored = dataset.BitsAllocated
    dataset.HighBit = dataset.BitsAllocated - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, 0
    dataset.add_new("PixelData", "OW", pixels.tobytes())
    for word, value in tags.items():
        if value is None:
            delattr(dataset, word)
        elif word == "PixelPaddingValue":
            dataset.add_new(word, "SS" if pixels.dtype.kind == "i" else "US", value)
        elif word == "TransferSyntaxUID":
            dataset.file_meta.TransferSyntaxUID = value
        else:
            setattr(dataset, word, value)
    return dataset


@pytest.fixture
def write_series(tmp_path: Path, ramp: np.ndarray) -> Callable[..., Path]:
    """Write a series of slices; `each(index)` gives the tags in which a slice differs."""

    def write(
        volume: np.ndarray = ramp,
        each: Callable[[int], dict[str, Any]] = lambda index: {},
        name: Callable[[int], str] = lambda index: f"{index:03d}.dcm",
        folder: str = "series",
        **tags: Any,
    ) -> Path:
        root = tmp_path / folder
        root.mkdir(exist_ok=True)
        for index, pixels in enumerate(volume):
            dataset = slice_dataset(pixels, index, **{**tags, **each(index)})
            dataset.save_as(root / name(index), enforce_file_format=True)
        return root

    return write


def patch_text(path: Path, before: bytes, after: bytes) -> None:
    """Replace bytes of a file by as many others: text that pydicom refuses to write."""
    content = path.read_bytes()
    assert content.count(before) >= 1
    assert len(before) == len(after)
    path.write_bytes(content.replace(before, after, 1))


@pytest.fixture
def patch() -> Callable[[Path, bytes, bytes], None]:
    return patch_text

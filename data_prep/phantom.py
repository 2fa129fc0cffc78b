"""Make a phantom data set in the exact layout of Pancreas-CT, to try everything without data.

    python -m data_prep.phantom --out phantom --cases 12 --size 96 --slices 24 --seed 0

Scans are DICOM series, labels a zip of NIfTI files; `python -m data_prep.pancreas_ct --images
phantom --labels phantom --out store` converts them. What makes the originals hard is in here too:
label axes that run against the scan's, label headers that are wrong, pixels that are padding,
numbers 25 and 70 that are copies of scan 2.
"""

from __future__ import annotations

import argparse
import shutil
import uuid
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from isal import igzip
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, generate_uid

from data_prep.convert import convert
from data_prep.labels_archive import find_labels
from data_prep.pancreas_ct import DUPLICATES, LABEL, PLANE, find_scans, pair, read_case
from data_prep.phantom_anatomy import PADDING, phantom_volume
from medseg_reg.data.store import Description
from medseg_reg.data.store_writer import StoreWriter, difference
from medseg_reg.errors import MedsegError, run_main
from medseg_reg.files import read_json, require_writable, write_json

Array = np.ndarray[Any, np.dtype[Any]]

LAYOUTS = ("manifest", "doi", "uuid")
LABEL_FOLDER = "TCIA_pancreas_labels-02-05-2017"
STORED_PADDING = -2048
FIELD_OF_VIEW_MM = 400.0
HEIGHT_MM = 240.0

DESCRIPTION = Description(
    name="Pancreas-CT phantom",
    source="python -m data_prep.phantom",
    licence="CC0 1.0",
    citation="Computed from formulas; no patient.",
    modality="CT",
    unit="HU",
    classes=("background", "pancreas"),
)

__all__ = ["make_demo", "make_phantom", "phantom_volume"]


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.phantom",
        description="Make a phantom data set in the layout of Pancreas-CT.",
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--cases", type=int, default=12, help="number of scans (default: 12)")
    parser.add_argument("--size", type=int, default=96, help="rows and columns (default: 96)")
    parser.add_argument("--slices", type=int, default=24, help="of a scan (default: 24)")
    parser.add_argument(
        "--seed", type=int, default=0, help="equal seeds give equal files (default: 0)"
    )
    parser.add_argument(
        "--layout", choices=LAYOUTS, default="manifest", help="of folders and names of the files"
    )
    parser.add_argument(
        "--shuffle", action="store_true", help="file names that do not follow the slices"
    )
    parser.add_argument(
        "--duplicates",
        choices=("none", "empty", "full"),
        default="none",
        help="scans 25 and 70: absent, as empty folders with labels, or with files",
    )
    parser.add_argument(
        "--labels", choices=("zip", "gz", "nii"), default="zip", help="how the labels are packed"
    )
    options = vars(parser.parse_args(arguments))
    make_phantom(options.pop("out"), **options)


def make_demo(
    store: Path,
    cases: int = 12,
    size: int = 96,
    slices: int = 24,
    seed: int = 0,
    workers: int = 1,
    tell: Callable[[str], None] = print,
) -> Path:
    """Make a phantom data set in `source` beside a slice store, and convert it to the store.

    A store of the same numbers is kept as it is, whether its source is still there or not. `tell`
    gets the summary of a new one.

    Returns:
        The path of the slice store.

    Raises:
        MedsegError: what is there was made with other numbers, or is something else.
    """
    settings = {
        "converter": "phantom", "plane": PLANE,
        "cases": cases, "size": size, "slices": slices, "seed": seed,
    }  # fmt: skip
    if StoreWriter(store, DESCRIPTION, settings).finished(any_selection=True) is not None:
        return store
    source = store.with_name("source")
    make_phantom(source, cases=cases, size=size, slices=slices, seed=seed)
    sources = pair(find_scans(source), find_labels(source, LABEL), duplicates=False)
    options = argparse.Namespace(out=store, workers=workers, skip=[])
    convert(sources, partial(read_case), DESCRIPTION, options, settings, tell)
    return store


def make_phantom(
    out: Path,
    *,
    cases: int = 12,
    size: int = 96,
    slices: int = 24,
    seed: int = 0,
    layout: str = "manifest",
    shuffle: bool = False,
    duplicates: str = "none",
    labels: str = "zip",
) -> None:
    """Write a phantom data set; equal arguments give equal files. See the command's help.

    Raises:
        MedsegError: the folder holds something else, or the numbers are out of range.
    """
    if not (1 <= cases <= 9000 and 32 <= size <= 1024 and 8 <= slices <= 1024):
        raise MedsegError(
            f"--cases {cases} --size {size} --slices {slices}: expected at least 1 case, 32 to "
            "1024 rows and 8 to 1024 slices."
        )
    settings = {
        "cases": cases, "size": size, "slices": slices, "seed": seed, "layout": layout,
        "shuffle": shuffle, "duplicates": duplicates, "labels": labels,
    }  # fmt: skip
    if out.exists() and any(out.iterdir()):
        made = out / "phantom.json"
        found = read_json(made) if made.exists() else None
        if found != settings:
            told = f" ({difference(found, settings)})" if isinstance(found, dict) else ""
            raise MedsegError(
                f"{out}: holds something else than this phantom{told}. Choose another folder, or "
                "delete it first."
            )
        return
    require_writable(out.parent)
    partial_out = out.parent / f".{out.name}.partial"
    shutil.rmtree(partial_out, ignore_errors=True)
    numbers = [n for n in range(1, cases + len(DUPLICATES) + 1) if n not in DUPLICATES][:cases]
    packed: dict[str, bytes] = {}
    for number in numbers:
        case = _Case(seed, number, number, size, slices)
        _write_scan(partial_out, case, layout, shuffle)
        packed[f"label{number:04d}.nii"] = case.label()
    for number, twin in DUPLICATES.items():
        if duplicates != "none":
            case = _Case(seed, number, twin, size, slices)
            packed[f"label{number:04d}.nii"] = case.label()
            _scan_folder(partial_out, number, layout).mkdir(parents=True)
            if duplicates == "full":
                _write_scan(partial_out, case, layout, shuffle)
    _write_labels(partial_out / LABEL_FOLDER, packed, labels)
    (_scan_folder(partial_out, 1, layout).parent / "LICENSE").write_text("CC0 1.0: no patient.\n")
    write_json(partial_out / "phantom.json", settings)
    if out.exists():
        out.rmdir()
    partial_out.rename(out)


class _Case:
    """One scan as it is stored: rows from the front or the back, numbered from head or feet."""

    def __init__(self, seed: int, number: int, twin: int, size: int, slices: int) -> None:
        self.number, self.seed = number, seed
        hu, mask = phantom_volume(seed, twin, size, slices)
        if number != twin:
            cut = slices // 8  # the copies of scan 2 are cropped a little differently
            hu, mask = hu[cut:], mask[cut:]
        rng = np.random.default_rng([seed, twin, 1])
        self.spacing = round(FIELD_OF_VIEW_MM / size * float(rng.uniform(0.9, 1.1)), 6)
        self.gap = round(HEIGHT_MM / slices * float(rng.uniform(0.9, 1.1)), 2)
        self.bottom = round(float(rng.uniform(-400, 0)), 2)
        self.rows_from_back = bool(number % 2)
        self.numbered_from_head = bool(number // 2 % 2)
        rows = slice(None, None, -1 if self.rows_from_back else 1)
        order = slice(None, None, -1 if self.numbered_from_head else 1)
        self.heights = (self.bottom + self.gap * np.arange(len(hu)))[order]
        self.stored = np.where(hu == PADDING, np.int16(STORED_PADDING), hu)[order, rows]
        self.mask = mask[order, rows]

    def label(self) -> bytes:
        """Return the label as NIfTI: axes (column, row, slice by number), a header that lies."""
        affine = np.diag([self.spacing, self.spacing, self.gap, 1.0])
        if self.number % 3 == 0:
            affine[0, 0], affine[1, 1] = -self.spacing, -self.spacing
        image = nibabel.Nifti1Image(np.ascontiguousarray(self.mask.transpose(2, 1, 0)), affine)
        return image.to_bytes()

    def uid(self, *parts: object) -> UID:
        return generate_uid(
            entropy_srcs=["phantom", str(self.seed), str(self.number), *map(str, parts)]
        )


def _scan_folder(out: Path, number: int, layout: str) -> Path:
    root = {
        "manifest": out / "manifest-1599750808610" / "Pancreas-CT",
        "doi": out / "DOI",
        "uuid": out / "pancreas_ct",
    }[layout]
    return root / f"PANCREAS_{number:04d}"


def _write_scan(out: Path, case: _Case, layout: str, shuffle: bool) -> None:
    study, series = case.uid("study"), case.uid("series")
    folder = _scan_folder(out, case.number, layout)
    if layout == "manifest":
        folder /= f"11-24-2015-PANCREAS{case.number:04d}-Pancreas-{study[-5:]}"
        folder /= f"Pancreas-{series[-5:]}"
    else:
        folder = folder / study / series
    folder.mkdir(parents=True)
    rng = np.random.default_rng([case.seed, case.number, 2])
    order = rng.permutation(len(case.stored)) if shuffle else np.arange(len(case.stored))
    for index, place in enumerate(order):
        name = {
            "manifest": f"1-{place + 1:03d}.dcm",
            "doi": f"{place:06d}.dcm",
            "uuid": f"{uuid.UUID(bytes=rng.bytes(16), version=4)}.dcm",
        }[layout]
        _slice_dataset(case, index, study, series).save_as(folder / name, enforce_file_format=True)


def _slice_dataset(case: _Case, index: int, study: str, series: str) -> Dataset:
    pixels = case.stored[index]
    first_row = case.spacing * (pixels.shape[0] - 1) / 2
    up = -1 if case.rows_from_back else 1
    corner = (-first_row, -up * first_row, case.heights[index])
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = case.uid("image", index)
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = case.uid("image", index)
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.StudyDate, dataset.StudyTime = "20151124", "000000"
    dataset.Modality, dataset.Manufacturer = "CT", "medseg_reg phantom"
    dataset.StudyDescription = dataset.SeriesDescription = "Pancreas"
    dataset.PatientID = dataset.PatientName = f"PANCREAS_{case.number:04d}"
    dataset.PatientBirthDate = dataset.PatientSex = ""
    dataset.AccessionNumber = dataset.ReferringPhysicianName = dataset.StudyID = ""
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study, series
    dataset.FrameOfReferenceUID, dataset.PositionReferenceIndicator = case.uid("frame"), ""
    dataset.SeriesNumber, dataset.InstanceNumber = 1, index + 1
    dataset.PatientPosition = "FFS"
    dataset.ImagePositionPatient = [f"{value:.6f}" for value in corner]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, up, 0]
    dataset.PixelSpacing = [f"{case.spacing:.6f}"] * 2
    dataset.SliceThickness, dataset.KVP = f"{case.gap:.2f}", "120"
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation = 1
    dataset.add_new("PixelPaddingValue", "SS", STORED_PADDING)
    dataset.RescaleIntercept, dataset.RescaleSlope, dataset.RescaleType = "0", "1", "HU"
    dataset.PixelData = np.ascontiguousarray(pixels, "<i2").tobytes()
    return dataset


def _write_labels(folder: Path, labels: dict[str, bytes], how: str) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    if how == "nii":
        files = labels
    else:
        files = {f"{n}.gz": igzip.compress(data, mtime=0) for n, data in labels.items()}
    if how == "zip":
        with zipfile.ZipFile(folder.with_name(f"{folder.name}.zip"), "w") as archive:
            for name, data in files.items():
                info = zipfile.ZipInfo(f"{folder.name}/{name}", (2017, 2, 5, 0, 0, 0))
                archive.writestr(info, data)
        return
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)


if __name__ == "__main__":
    run_main(main)

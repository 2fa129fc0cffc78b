"""Convert NIH Pancreas-CT, as TCIA publishes it, into a slice store.

    python -m data_prep.pancreas_ct --images manifest-1599750808610 \
        --labels TCIA_pancreas_labels-02-05-2017.zip --out data/pancreas

The scans may lie in any of the published layouts: folders PANCREAS_0001 ... at any depth, file
names of any kind; the labels in a folder or still in their zip. Scans and labels are paired by
number. How a label lies on its scan is proved for every case, see `data_prep.orientation`.

Data: Roth et al., Data From Pancreas-CT, TCIA 2016, doi 10.7937/K9/TCIA.2016.tNB1kqBU, CC BY 3.0.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pydicom

from data_prep.convert import add_common_arguments, convert
from data_prep.labels_archive import LabelFile, find_labels
from data_prep.orientation import MARGIN, prove_orientation
from medseg_reg.data.store import Description
from medseg_reg.data.store_writer import CaseArrays, CaseSource
from medseg_reg.errors import MedsegError, run_main
from medseg_reg.io.dicom import list_files, read_series
from medseg_reg.io.dicom_file import SLICE_CLASSES, read_slice
from medseg_reg.io.geometry import Plane
from medseg_reg.io.nifti import read_nifti
from medseg_reg.io.pixels import as_labels

Array = np.ndarray[Any, np.dtype[Any]]

FOLDER = re.compile(r"PANCREAS_(\d{1,4})", re.IGNORECASE)
LABEL = re.compile(r"label(\d{1,4})\.nii(?:\.gz)?", re.IGNORECASE)
# How a slice without the DICM mark begins: with an element of group 2 or 8.
STARTS = (b"\x02\x00", b"\x08\x00")
HEADER = ["SOPClassUID", "ImageType", "PatientID", "Rows"]
# Scans 25 and 70 show patient 2 again, cropped slightly differently.
DUPLICATES = {25: 2, 70: 2}
PLANE: Plane = "axial"
PUBLISHED_SCANS = 80
PUBLISHED_LABELS = 82
PUBLISHED_FILES = 18942
PUBLISHED_SLICES = (181, 466)

DESCRIPTION = Description(
    name="Pancreas-CT",
    source="The Cancer Imaging Archive, https://doi.org/10.7937/K9/TCIA.2016.tNB1kqBU",
    licence="CC BY 3.0",
    citation=(
        "Roth H, Farag A, Turkbey EB, Lu L, Liu J, Summers RM. Data From Pancreas-CT. "
        "The Cancer Imaging Archive, 2016. doi:10.7937/K9/TCIA.2016.tNB1kqBU"
    ),
    modality="CT",
    unit="HU",
    classes=("background", "pancreas"),
)


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.pancreas_ct",
        description="Convert NIH Pancreas-CT, as TCIA publishes it, into a slice store.",
    )
    parser.add_argument("--images", type=Path, required=True, help="the folder of the scans")
    parser.add_argument(
        "--labels", type=Path, required=True, help="the folder or the zip of the labels"
    )
    parser.add_argument(
        "--include-duplicates",
        action="store_true",
        help="also convert scans 25 and 70, which are scan 2 again; they stay in its group",
    )
    parser.add_argument(
        "--margin",
        type=float,
        default=MARGIN,
        help="how clearly a label's orientation must be proved (default: %(default)s)",
    )
    add_common_arguments(parser)
    options = parser.parse_args(arguments)
    scans = find_scans(options.images)
    labels = find_labels(options.labels, LABEL)
    sources = pair(scans, labels, options.include_duplicates)
    print(report(scans, labels, options.include_duplicates))
    settings = {
        "converter": "pancreas_ct",
        "plane": PLANE,
        "include_duplicates": options.include_duplicates,
        "margin": options.margin,
    }
    convert(sources, partial(read_case, margin=options.margin), DESCRIPTION, options, settings)


def find_scans(folder: Path) -> dict[int, tuple[Path, ...]]:
    """Return the files of every scan by its number; a scan whose folder is empty has none.

    The number is that of the innermost folder PANCREAS_nnnn; where no such folder exists, that
    of PatientID in the files.

    Raises:
        MedsegError: no scan was found.
    """
    scans: dict[int, list[Path]] = {}
    files = list_files(folder)
    for path in (*folder.rglob("*"), folder):
        if path.is_dir() and (match := FOLDER.fullmatch(path.resolve().name)):
            scans.setdefault(int(match[1]), [])
    in_folders = bool(scans)
    for path in files:
        number = _number_of_folder(path, folder) if in_folders else _number_in_header(path)
        if number is not None:
            scans.setdefault(number, []).append(path)
    if not any(scans.values()):
        raise MedsegError(
            f"{folder}: holds no scan of Pancreas-CT: no folder like PANCREAS_0001 with files in "
            "it, and no DICOM file of such a PatientID. Give the folder that the download made."
        )
    return {number: tuple(sorted(scans[number])) for number in sorted(scans)}


def _number_of_folder(path: Path, root: Path) -> int | None:
    inside = path.relative_to(root).parts[:-1]
    for name in (*reversed(inside), root.resolve().name):
        if match := FOLDER.fullmatch(name):
            return int(match[1])
    return None


def _number_in_header(path: Path) -> int | None:
    """Return the number in PatientID of a slice, or None; pixels of slices are not read."""
    with path.open("rb") as file:
        start = file.read(132)
    marked = start[128:] == b"DICM"
    if not marked and start[:2] not in STARTS:
        return None
    patient = _patient_of_slice(path) if marked else None
    if patient is None:
        one = read_slice(path)  # no slice, or a damaged one, of which this says what is wrong
        patient = "" if isinstance(one, str) else one.patient
    match = FOLDER.fullmatch(patient)
    return int(match[1]) if match else None


def _patient_of_slice(path: Path) -> str | None:
    """Return PatientID of a slice whose header is whole, else None."""
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=HEADER)
        # Rows stands near the header's end: a file cut off before it lacks it.
        whole = header.get("SOPClassUID") in SLICE_CLASSES and "Rows" in header
        if not whole or "LOCALIZER" in (header.get("ImageType") or ()):
            return None
        return str(header.get("PatientID") or "").strip(" \0")
    except Exception:  # whatever pydicom raises on a damaged file
        return None


def pair(
    scans: dict[int, tuple[Path, ...]], labels: dict[int, LabelFile], duplicates: bool
) -> list[CaseSource]:
    """Return the cases that have both a scan and a label."""
    return [
        CaseSource(
            name=f"pancreas_{number:04d}",
            group=f"PANCREAS_{DUPLICATES.get(number, number):04d}",
            files=(*files, labels[number].path),
            details={"member": labels[number].member, "number": number},
        )
        for number, files in scans.items()
        if files and number in labels and (duplicates or number not in DUPLICATES)
    ]


def report(
    scans: dict[int, tuple[Path, ...]], labels: dict[int, LabelFile], duplicates: bool
) -> str:
    """Return what was found beside what was published, and all that is left out."""
    found = [number for number, files in scans.items() if files]
    files = sum(len(scans[number]) for number in found)
    few, many = PUBLISHED_SLICES
    odd = [number for number in found if not few <= len(scans[number]) <= many]
    lines = [
        f"scans   {len(found):6d} found, {PUBLISHED_SCANS:6d} published (82 in the first release)",
        f"files   {files:6d} found, {PUBLISHED_FILES:6d} published, {few} to {many} a scan",
        f"labels  {len(labels):6d} found, {PUBLISHED_LABELS:6d} published",
    ]
    left_out = {
        "scans without a label, left out": [n for n in found if n not in labels],
        "labels without a scan, left out": [
            n for n in labels if n not in found and n not in DUPLICATES
        ],
        "scans of an unusual number of files; is the download complete?": odd,
    }
    lines += [f"{what}: {_listed(numbers)}" for what, numbers in left_out.items() if numbers]
    copies = [n for n in DUPLICATES if n in labels or n in found]
    if copies and not duplicates:
        lines.append(
            f"left out as scan #2 again, cropped differently: {_listed(copies)} "
            "(--include-duplicates converts them)"
        )
    return "\n".join(lines)


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(f"#{number}" for number in numbers[:12])
    return shown + (f" and {len(numbers) - 12} more" if len(numbers) > 12 else "")


def read_case(source: CaseSource, margin: float = MARGIN) -> CaseArrays:
    """Read a scan and its label, and prove that the label lies on the scan."""
    *files, label_path = source.files
    folder = Path(*_common(files))
    volume = read_series(files, where=folder)
    claimed = FOLDER.fullmatch(volume.patient)
    if claimed and int(claimed[1]) != source.details["number"]:
        raise MedsegError(
            f"{folder}: lies in the folder of scan {source.details['number']}, but its files say "
            f"PatientID {volume.patient}. Put it where it belongs."
        )
    geometry = volume.geometry(PLANE)
    image = geometry.from_source(volume.array)
    _require_hu(folder, image)
    file = LabelFile(label_path, source.details["member"])
    label = as_labels(str(file), read_nifti(str(file), content=file.read()).array)
    proof = prove_orientation(source.name, image, label, geometry.spacing, margin)
    return CaseArrays(image, proof.lay(label), geometry, notes=(*volume.notes, proof.way))


def _common(files: Sequence[Path]) -> tuple[str, ...]:
    parts = [file.parent.parts for file in files]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return tuple(shared)


def _require_hu(folder: Path, image: Array) -> None:
    """Refuse a scan without air or without tissue: its numbers are no HU."""
    sample = image[:: max(1, len(image) // 16), ::4, ::4]
    low, high = float(sample.min()), float(sample.max())
    if low > -500 or high < 100 or image.dtype != np.int16:
        raise MedsegError(
            f"{folder}: pixels from {low:g} to {high:g} ({image.dtype}) are not HU of an abdomen; "
            "expected air near -1000 and tissue. Was the intercept lost?"
        )


if __name__ == "__main__":
    run_main(main)

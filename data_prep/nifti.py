"""Convert NIfTI volumes, or one DICOM series with its labels, into a slice store.

    python -m data_prep.nifti --source Task07_Pancreas --out data/pancreas
    python -m data_prep.nifti --source images --classes liver tumour --plane axial --out data/liver
    python -m data_prep.nifti --dicom series --label label.nii.gz --classes liver --out data/case
    python -m data_prep.nifti --dicom series --rtstruct RS.dcm --roi GTV --out data/case

A source has the layout of the Medical Segmentation Decathlon (imagesTr/x.nii.gz with
labelsTr/x.nii.gz) or of nnU-Net (imagesTr/x_0000.nii.gz, one file a channel), with or without
dataset.json.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.convert import (
    add_common_arguments,
    add_ignore_argument,
    check_ignore_label,
    convert,
    ignored_setting,
    with_background,
)
from data_prep.volumes import read_dicom_case, read_nifti_case
from medseg_reg.data.store import CASE_NAME, Description
from medseg_reg.data.store_writer import CaseSource
from medseg_reg.errors import MedsegError, run_main
from medseg_reg.files import read_json
from medseg_reg.io.dicom import list_files
from medseg_reg.io.dicom_file import read_slice
from medseg_reg.io.filters import check_settings
from medseg_reg.io.geometry import Plane, nearest_plane
from medseg_reg.io.nifti import is_nifti_name

CHANNEL = re.compile(r"(.+)_(\d{4})")
PLANES = ("axial", "coronal", "sagittal")


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    parser = _parser()
    options = parser.parse_args(arguments)
    check_settings(options.erosion, options.canny)
    if (options.rtstruct is not None) != bool(options.roi):
        parser.error("--rtstruct and --roi belong together")
    if options.source is not None and (options.label or options.rtstruct):
        options.dicom = options.source  # a folder that needs a label beside it is a series
    if options.dicom is not None:
        if (options.label is None) == (options.rtstruct is None):
            parser.error("--dicom needs either --label or --rtstruct with --roi")
        _convert_dicom(options)
        return
    if options.series:
        parser.error("--series goes with a DICOM series and its --label or --rtstruct")
    _convert_nifti(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.nifti",
        description="Convert NIfTI volumes, or one DICOM series, into a slice store.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--source", type=Path, help="imagesTr and labelsTr, or a series")
    source.add_argument("--dicom", type=Path, help="the folder of one DICOM series")
    parser.add_argument("--label", type=Path, help="label map of the series, NIfTI")
    parser.add_argument("--rtstruct", type=Path, help="contours of the series")
    parser.add_argument("--roi", nargs="+", metavar="NAME", help="regions of the contours")
    parser.add_argument("--series", metavar="UID", help="the series, where there are several")
    parser.add_argument("--name", help="name of the DICOM case (default: that of its folder)")
    parser.add_argument(
        "--plane", choices=PLANES, help="what a slice shows (default: axial; DICOM: as taken)"
    )
    parser.add_argument(
        "--classes", nargs="+", metavar="NAME", help="names of the labels 1, 2, ... in order"
    )
    parser.add_argument(
        "--labels",
        nargs="+",
        type=int,
        metavar="VALUE",
        help="values of the classes in the label maps, in order; others become background "
        "(default: 1 2 ...)",
    )
    add_ignore_argument(parser, "label maps")
    parser.add_argument("--modality", help="CT, MR, ... (default: that of dataset.json)")
    parser.add_argument("--erosion", type=int, metavar="N", help="erode by a square of N pixels")
    parser.add_argument(
        "--canny", nargs=2, type=float, metavar=("LOW", "HIGH"), help="burn in Canny edges"
    )
    add_common_arguments(parser)
    return parser


def _convert_nifti(options: argparse.Namespace) -> None:
    root = options.source
    file = root / "dataset.json"
    about = read_json(file) if file.exists() else {}
    if not isinstance(about, dict):
        raise MedsegError(f"{file}: expected an object of keys and values.")
    modalities = _mapping(about, "channel_names", "modality")
    modality = options.modality or ", ".join(map(str, modalities.values())) or "unknown"
    is_ct = modality.upper() == "CT"
    classes, ignored = _classes(options.classes, about, file)
    if options.ignore_label is None:
        options.ignore_label = ignored
    _check_labels(options, classes)
    sources = find_cases(root, channels=len(modalities), unit="HU" if is_ct else "")
    description = Description(
        name=str(about.get("name") or root.resolve().name),
        source=str(about.get("description") or root.resolve().name),
        licence=str(about.get("licence") or about.get("license") or "not stated by the source"),
        citation=str(about.get("reference") or "not stated by the source"),
        modality=modality,
        unit="HU" if is_ct else "as stored",
        classes=classes,
        ignore_label=options.ignore_label,
    )
    plane: Plane = options.plane or "axial"
    common = _common(options)
    settings = {"converter": "nifti", "plane": plane, "modality": modality, **_plain(common)}
    settings["classes"] = list(classes)
    read = partial(read_nifti_case, plane=plane, **common)
    convert(sources, read, description, options, settings)


def _convert_dicom(options: argparse.Namespace) -> None:
    files = list_files(options.dicom)
    label = options.label or options.rtstruct
    if not label.is_file():
        raise MedsegError(f"{label}: does not exist.")
    # The contours often lie in the same tree; they are no candidate for a slice.
    files = tuple(path for path in files if path.resolve() != label.resolve())
    rois = tuple(options.roi or ())
    names = options.classes or list(rois)
    if rois and len(names) != len(rois):
        raise MedsegError(f"--classes names {len(names)} labels, --roi {len(rois)} regions.")
    classes, _ = _classes(names, {}, label)
    _check_labels(options, classes)
    name = options.name or _case_name(options.dicom.resolve().name)
    source = CaseSource(
        name=name,
        group=name,
        files=(*files, label),
        details={"folder": str(options.dicom), "series": options.series},
    )
    modality, plane = _taken(files, options.series)
    modality, plane = options.modality or modality, options.plane or plane
    description = Description(
        name=name,
        source=f"DICOM series {name}",
        licence="not stated by the source",
        citation="not stated by the source",
        modality=modality,
        unit="HU" if modality == "CT" else "as stored",
        classes=classes,
        ignore_label=options.ignore_label,
    )
    settings = {
        "converter": "dicom", "plane": plane, "series": options.series,
        "roi": list(rois), "classes": list(classes), **_plain(_common(options)),
    }  # fmt: skip
    read = partial(read_dicom_case, plane=plane, rois=rois, **_common(options))
    convert([source], read, description, options, settings)


def _common(options: argparse.Namespace) -> dict[str, Any]:
    labels = tuple(options.labels) if options.labels else None
    ignored = options.ignore_label
    common = {"erosion": options.erosion, "canny": options.canny, "labels": labels}
    return {**common, "ignored": ignored}


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Return options in the types of JSON, in which a store keeps its settings."""
    plain: dict[str, Any] = {
        key: list(v) if isinstance(v, tuple) else v for key, v in options.items()
    }
    ignored = plain.pop("ignored")
    return {**plain, **ignored_setting(ignored)}


def _check_labels(options: argparse.Namespace, classes: Sequence[str]) -> None:
    values, ignored = options.labels, options.ignore_label
    check_ignore_label(ignored, classes)
    if ignored is not None and options.rtstruct:
        raise MedsegError(f"--ignore-label {ignored}: is for label maps; contours have no values.")
    if values is None:
        return
    if ignored in values:
        raise MedsegError(f"--ignore-label {ignored}: is also in --labels {values}. Take one out.")
    sound = len(set(values)) == len(values) == len(classes) - 1
    if options.rtstruct or not sound or not all(1 <= value <= 255 for value in values):
        raise MedsegError(
            f"--labels {values}: expected a value from 1 to 255 for each of the classes "
            f"{list(classes[1:])}, for label maps alone."
        )


def find_cases(root: Path, channels: int = 0, unit: str = "") -> list[CaseSource]:
    """Pair the volumes of imagesTr and labelsTr by their names.

    A label x.nii.gz belongs to x.nii.gz, or else to the channels x_0000.nii.gz, x_0001.nii.gz ...
    In the name of a case, what is no letter, digit, dot, dash or underscore becomes `_`.

    Args:
        root: holds imagesTr and labelsTr.
        channels: how many each case has as dataset.json says; 0 where it says nothing.
        unit: of the images.

    Raises:
        MedsegError: folders are missing, nothing pairs, channels are missing.
    """
    images, labels = (_volumes(root / folder) for folder in ("imagesTr", "labelsTr"))
    numbered: dict[str, dict[int, Path]] = {}
    for name, path in images.items():
        if match := CHANNEL.fullmatch(name):
            numbered.setdefault(match[1], {})[int(match[2])] = path
    sources: list[CaseSource] = []
    used: set[Path] = set()
    paired: set[str] = set()
    for name, label in labels.items():
        if name in images:
            files: tuple[Path, ...] = (images[name],)
        else:
            found = numbered.get(name, {})
            files = tuple(found[index] for index in sorted(found))
            if sorted(found) != list(range(len(found))):
                raise MedsegError(f"case {name}: has the channels {sorted(found)}, one is missing.")
        if files:
            used.update(files)
            paired.add(name)
            case = _case_name(name)
            details = {"channels": channels, "unit": unit}
            sources.append(CaseSource(case, case, (*files, label), details=details))
    _tell("labels without an image, left out", [n for n in labels if n not in paired])
    _tell("images without a label, left out", [n for n, p in images.items() if p not in used])
    if not sources:
        raise MedsegError(f"{root}: no image of imagesTr has a label of its name in labelsTr.")
    counts = {len(source.files) - 1 for source in sources}
    if len(counts) > 1:
        odd = next(s for s in sources if len(s.files) - 1 != max(counts))
        raise MedsegError(
            f"case {odd.name}: has {len(odd.files) - 1} channels, others {max(counts)}. Complete "
            "the case, or move its label elsewhere."
        )
    return sources


def _case_name(name: str) -> str:
    """Return a name as a store may hold it; most are kept as they are.

    >>> _case_name("patient 01"), _case_name("liver_0.5-")
    ('patient_01', 'liver_0.5-')
    """
    if re.fullmatch(CASE_NAME, name):
        return name
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._-") or "case"


def _volumes(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise MedsegError(
            f"{folder}: is not there. Expected imagesTr and labelsTr in {folder.parent}."
        )
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if not is_nifti_name(path.name):
            continue
        name = re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE)
        if name in found:
            raise MedsegError(f"{path}: is there twice, also as {found[name].name}. Keep one.")
        found[name] = path
    return found


def _classes(
    given: Sequence[str] | None, about: dict[str, Any], file: Path
) -> tuple[tuple[str, ...], int | None]:
    """Return the names of the classes, from the command line or else from dataset.json.

    Besides, the value of the label that is ignored, which nnU-Net calls `ignore`.
    """
    pairs = dict(_mapping(about, "labels"))
    ignored = pairs.pop("ignore", None)
    if not isinstance(ignored, int | None):
        raise MedsegError(f"{file}: the label 'ignore' is {ignored!r}, expected one number.")
    if given:
        return with_background(given), ignored
    if not pairs:
        what = "names no labels" if about else "is not there"
        raise MedsegError(f"{file}: {what}. Name the labels 1, 2, ... with --classes NAME ...")
    # The Decathlon writes {"1": "pancreas"}, nnU-Net 2 writes {"pancreas": 1}.
    if not all(str(key).isdigit() for key in pairs):
        pairs = {str(value): key for key, value in pairs.items()}
    numbers = sorted(int(key) for key in pairs if str(key).isdigit())
    if numbers != list(range(len(pairs))) or len(pairs) < 2:
        raise MedsegError(
            f"{file}: labels are {sorted(map(str, pairs))}, expected 0, 1, 2 ... without gaps. "
            "Renumber them; regions are not supported."
        )
    return tuple(str(pairs[key]) for key in sorted(pairs, key=int)), ignored


def _mapping(about: dict[str, Any], *keys: str) -> dict[str, Any]:
    for key in keys:
        if isinstance(found := about.get(key), dict):
            return found
    return {}


def _taken(files: Sequence[Path], series: str | None) -> tuple[str, Plane]:
    """Return modality and plane of a series; prediction must know both without its files.

    Of several series, the one with the most slices counts: the others are localizers, or the
    series is refused when it is read.
    """
    counts: Counter[str] = Counter()
    found: dict[str, tuple[str, Plane]] = {}
    for path in files:
        one = read_slice(path)
        if isinstance(one, str) or (series is not None and one.series != series):
            continue
        counts[one.series] += 1
        axes = np.stack([*one.directions, np.cross(*one.directions)], axis=1)
        found.setdefault(one.series, (one.modality, nearest_plane(axes, 2)))
    return found[counts.most_common(1)[0][0]] if counts else ("unknown", "axial")


def _tell(what: str, names: Sequence[str]) -> None:
    if names:
        shown = ", ".join(names[:8]) + (f" ... ({len(names)} in all)" if len(names) > 8 else "")
        print(f"{what}: {shown}")


if __name__ == "__main__":
    run_main(main)

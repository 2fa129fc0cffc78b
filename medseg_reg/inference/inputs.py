"""What can be predicted: a slice store, NIfTI volumes, a DICOM series, a folder of pictures.

Each is read as its converter reads it, and its labels are written back onto its own grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from medseg_reg.data.store import SliceStore
from medseg_reg.engine.run_directory import DataFacts
from medseg_reg.errors import MedsegError
from medseg_reg.inference.predictor import require_finite
from medseg_reg.io.dicom import list_files, read_series
from medseg_reg.io.filters import prepared
from medseg_reg.io.geometry import Geometry, Plane, geometry_of
from medseg_reg.io.images import read_image, write_mask_png
from medseg_reg.io.nifti import is_nifti_name, read_nifti, write_nifti

Array = np.ndarray[Any, np.dtype[Any]]

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".npz", ".npy")
MASKS = ("_seg", "_mask", "_label")


@dataclass(frozen=True)
class Input:
    """One volume or picture to predict.

    Attributes:
        name: for progress and errors.
        source: the file or folder that is read.
        target: the file or folder that is written.
        read: returns the images (S, H, W) or (S, H, W, C) and what `write` needs.
        write: writes the labels (S, H, W).
    """

    name: str
    source: Path
    target: Path
    read: Callable[[], tuple[Array, Any]]
    write: Callable[[Array, Any], None]


def find_inputs(source: Path, output: Path, facts: DataFacts) -> list[Input]:
    """Return what there is to predict at a path.

    Args:
        source: a slice store, a NIfTI file or a folder of them, a folder with one DICOM series,
            a picture or a folder of them.
        output: a file for one volume (ends in .nii or .nii.gz), else a folder.
        facts: how the training data were converted.

    Raises:
        MedsegError: there is nothing that can be read, or labels would be written over an input
            or over other labels.
    """
    if not source.exists():
        raise MedsegError(f"{source}: does not exist. Check --input.")
    if output.exists() and output.samefile(source):
        raise MedsegError(f"--output {output}: is the --input {source}. Choose another --output.")
    inputs = _listed(source, output, facts)
    _check_targets(inputs)
    return inputs


def _listed(source: Path, output: Path, facts: DataFacts) -> list[Input]:
    if (source / "manifest.json").exists():
        store = SliceStore(source)
        _require_same_unit(store, facts)
        return list(_store(store, output))
    if source.is_file():
        files = [source]
    else:
        files = sorted(path for path in source.iterdir() if path.is_file())
    volumes = [path for path in files if is_nifti_name(path.name)]
    if volumes:
        return [_nifti(path, _volume_target(output, path, len(volumes)), facts) for path in volumes]
    pictures = _without_masks([path for path in files if path.suffix.lower() in PICTURES])
    if pictures:
        return [_picture(path, output / f"{path.stem}.png", facts) for path in pictures]
    if source.is_file():
        raise MedsegError(f"{source}: is neither NIfTI nor a picture. For DICOM give its folder.")
    return [_dicom(source, _volume_target(output, source, 1), facts)]


def _require_same_unit(store: SliceStore, facts: DataFacts) -> None:
    """Refuse pixels of another unit: a window in HU makes nonsense of gray values."""
    unit = store.manifest.description.unit
    if (unit == "HU") != (facts.unit == "HU"):
        raise MedsegError(
            f"{store.path}: holds pixels in '{unit}', the run was trained on '{facts.unit}'. "
            "Predict with a run that was trained on such data."
        )


def _without_masks(pictures: list[Path]) -> list[Path]:
    """Leave out masks that lie beside their images, as those of BAGLS do."""
    stems = {path.stem for path in pictures}
    masks = [
        p
        for p in pictures
        if any(p.stem.removesuffix(end) in stems for end in MASKS if p.stem.endswith(end))
    ]
    if masks:
        shown = f"{masks[0].name}{' ...' if len(masks) > 1 else ''}"
        print(f"left out: {len(masks)} masks of images beside them ({shown})")
    return [path for path in pictures if path not in set(masks)]


def _check_targets(inputs: list[Input]) -> None:
    """Refuse to write over what is still to be read, or twice to one place."""
    sources = {one.source.resolve(): one.source for one in inputs}
    taken: dict[Path, Input] = {}
    for one in inputs:
        target = one.target.resolve()
        if target in sources:
            raise MedsegError(
                f"{one.source}: its labels {one.target} would be written over the input "
                f"{sources[target]}. Choose another --output."
            )
        other = taken.setdefault(target, one)
        if other is not one:
            raise MedsegError(
                f"{other.source} and {one.source}: would both be written to {one.target}. Rename "
                "one of them, or predict them one by one into folders of their own."
            )


def _volume_target(output: Path, source: Path, count: int) -> Path:
    if is_nifti_name(output.name):
        if count > 1:
            raise MedsegError(f"--output {output}: is one file, but there are {count} volumes.")
        return output
    stem = source.name
    for suffix in (".gz", ".nii"):
        stem = stem.removesuffix(suffix)
    return output / f"{stem}.nii.gz"


def _store(store: SliceStore, output: Path) -> Iterator[Input]:
    for row in store.manifest.cases:
        read = partial(_read_case, store, row.name)
        source = store.path / "images" / f"{row.name}.npy"
        if row.geometry is not None:
            target = output / f"{row.name}.nii.gz"
            yield Input(row.name, source, target, read, partial(_write_volume, target))
        else:
            names = row.slice_names or tuple(f"{number:04d}" for number in range(row.slices))
            target = output / row.name
            files = _picture_files(names, f"{store.path}, case {row.name}")
            yield Input(row.name, source, target, read, partial(_write_pictures, target, files))


def _picture_files(names: tuple[str, ...], where: str) -> tuple[str, ...]:
    """Return a file name for each slice; a name may hold dots, and the folders of its source."""
    taken: dict[str, str] = {}
    for name in names:
        file = name.replace("/", "_").replace("\\", "_") + ".png"
        if file in taken:
            raise MedsegError(
                f"{where}: the slices '{taken[file]}' and '{name}' would both be written to "
                f"{file}. Rename one of the images and convert the data again."
            )
        taken[file] = name
    return tuple(taken)


def _read_case(store: SliceStore, case: str) -> tuple[Array, Any]:
    return store.image(case), store.row(case).geometry


def _nifti(path: Path, target: Path, facts: DataFacts) -> Input:
    def read() -> tuple[Array, Geometry]:
        volume = read_nifti(path, channels=facts.channels > 1)
        shape = volume.array.shape[:3]
        geometry = geometry_of(volume.affine, shape, _plane(facts))
        if volume.array.ndim == 4:
            parts = [geometry.from_source(one) for one in np.moveaxis(volume.array, -1, 0)]
            return _prepared(np.stack(parts, axis=-1), facts), geometry
        return _prepared(geometry.from_source(volume.array), facts), geometry

    return Input(path.name, path, target, read, partial(_write_volume, target))


def _dicom(folder: Path, target: Path, facts: DataFacts) -> Input:
    def read() -> tuple[Array, Geometry]:
        volume = read_series(list_files(folder), where=folder)
        geometry = volume.geometry(_plane(facts))
        return _prepared(geometry.from_source(volume.array), facts), geometry

    return Input(folder.name, folder, target, read, partial(_write_volume, target))


def _picture(path: Path, target: Path, facts: DataFacts) -> Input:
    def read() -> tuple[Array, None]:
        image = read_image(path, "rgb" if facts.channels == 3 else "gray")
        # Here, because a filter would turn what is no number into some gray value.
        require_finite(image[np.newaxis], str(path))
        return _prepared(image[np.newaxis], facts), None

    return Input(path.name, path, target, read, partial(_write_picture, target))


def _plane(facts: DataFacts) -> Plane:
    """Return the plane of the training's slices, whatever plane an input was taken in."""
    plane: Plane = facts.conversion.get("plane") or "axial"
    return plane


def _prepared(image: Array, facts: DataFacts) -> Array:
    """Filter an input as the training data were filtered when they were converted."""
    canny = facts.conversion.get("canny")
    return prepared(
        image,
        facts.conversion.get("erosion"),
        tuple(canny) if canny else None,
        is_hu=facts.unit == "HU",
    )


def _write_volume(target: Path, labels: Array, geometry: Geometry) -> None:
    write_nifti(target, labels, geometry)


def _write_picture(target: Path, labels: Array, _: None) -> None:
    write_mask_png(target, labels[0])


def _write_pictures(folder: Path, files: tuple[str, ...], labels: Array, _: None) -> None:
    for file, mask in zip(files, labels, strict=True):
        write_mask_png(folder / file, mask)

"""What can be predicted: a slice store, NIfTI volumes, a DICOM series, a folder of pictures.

Each is read as its converter reads it, and its labels are written back onto its own grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from medseg_reg.data.store import SliceStore
from medseg_reg.engine.run_directory import DataFacts
from medseg_reg.errors import MedsegError
from medseg_reg.inference.outputs import Output, PictureOutput, VolumeOutput
from medseg_reg.inference.predictor import require_finite
from medseg_reg.inference.slices import LazySlices, Slices
from medseg_reg.io.dicom import list_files, read_series
from medseg_reg.io.dicom_seg import UNKNOWN, Algorithm, SegWriter, require_highdicom
from medseg_reg.io.filters import prepared
from medseg_reg.io.geometry import Geometry, Plane, geometry_of
from medseg_reg.io.images import read_image
from medseg_reg.io.nifti import UNSCALED, is_nifti_name, open_nifti

Array = np.ndarray[Any, np.dtype[Any]]
Format = Literal["auto", "nifti", "seg"]

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".npz", ".npy")
MASKS = ("_seg", "_mask", "_label")


class Loaded(NamedTuple):
    """An input that is read.

    Attributes:
        images: (S, H, W) or (S, H, W, C), in the order of a slice store.
        output: takes the labels and maps.
        notes: what a person should know of the input.
    """

    images: Slices
    output: Output
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Input:
    """One volume or picture to predict.

    Attributes:
        name: for progress and errors.
        source: the file or folder that is read.
        target: the file or folder of the labels.
        beside: the files and folders of the maps.
        read: reads it.
    """

    name: str
    source: Path
    target: Path
    beside: tuple[Path, ...]
    read: Callable[[], Loaded]


@dataclass(frozen=True)
class Wanted:
    """What is to be written.

    Attributes:
        output: a file for one volume (ends in .nii, .nii.gz or .dcm), else a folder.
        format: of the labels of volumes; `auto` goes by the name of `output`, else NIfTI.
        maps: the names of the maps to write beside the labels.
        series: SeriesInstanceUID of the DICOM series to take, where a folder holds several.
        algorithm: what makes the labels, for DICOM SEG.
    """

    output: Path
    format: Format = "auto"
    maps: tuple[str, ...] = ()
    series: str | None = None
    algorithm: Algorithm = UNKNOWN

    @property
    def seg(self) -> bool:
        """Whether the labels are to become a DICOM SEG.

        Raises:
            MedsegError: the name of the output says something else.
        """
        named = "seg" if self.output.suffix.lower() == ".dcm" else "auto"
        named = "nifti" if is_nifti_name(self.output.name) else named
        if "auto" not in (named, self.format) and named != self.format:
            raise MedsegError(
                f"--output {self.output}: is a name of the format {named}, but --format is "
                f"{self.format}. Leave one of them out."
            )
        return "seg" in (named, self.format)


def find_inputs(source: Path, output: Path | Wanted, facts: DataFacts) -> list[Input]:
    """Return what there is to predict at a path.

    Args:
        source: a slice store, a NIfTI file or a folder of them, a folder with one DICOM series,
            a picture or a folder of them.
        output: what to write, or just the file or folder.
        facts: how the training data were converted.

    Raises:
        MedsegError: there is nothing that can be read, it cannot be written in the format that is
            asked for, or labels would be written over an input or over other labels.
    """
    wanted = Wanted(output) if isinstance(output, Path) else output
    if not source.exists():
        raise MedsegError(f"{source}: does not exist. Check --input.")
    if wanted.output.exists() and wanted.output.samefile(source):
        raise MedsegError(
            f"--output {wanted.output}: is the --input {source}. Choose another --output."
        )
    inputs = _listed(source, wanted, facts)
    _check_targets(inputs)
    return inputs


def _listed(source: Path, wanted: Wanted, facts: DataFacts) -> list[Input]:
    if (source / "manifest.json").exists():
        _require_no_series(source, "a slice store", wanted)
        store = SliceStore(source)
        _require_same_unit(store.path, store.manifest.description.unit, facts)
        return list(_store(store, wanted))
    if source.is_file():
        files = [source]
    else:
        files = sorted(path for path in source.iterdir() if path.is_file())
    volumes = [path for path in files if is_nifti_name(path.name)]
    if volumes:
        _require_no_series(source, "NIfTI", wanted)
        return [_nifti(path, wanted, len(volumes), facts) for path in volumes]
    pictures = _without_masks([path for path in files if path.suffix.lower() in PICTURES])
    if pictures:
        _require_no_series(source, "pictures", wanted)
        if wanted.format == "nifti":
            raise MedsegError(f"--format nifti: {source} is of pictures, which become PNG.")
        _require_no_hu(pictures, facts)
        return [_picture(path, wanted, facts) for path in pictures]
    if source.is_file():
        raise MedsegError(f"{source}: is neither NIfTI nor a picture. For DICOM give its folder.")
    return [_dicom(source, wanted, facts)]


def _require_same_unit(source: Path, unit: str, facts: DataFacts) -> None:
    """Refuse pixels of another unit: a window in HU makes nonsense of gray values."""
    if (unit == "HU") != (facts.unit == "HU"):
        raise MedsegError(
            f"{source}: holds pixels in '{unit}', the run was trained on '{facts.unit}'. "
            "Predict with a run that was trained on such data."
        )


def _require_no_hu(pictures: list[Path], facts: DataFacts) -> None:
    """Refuse formats without negative values, where the training took HU."""
    gray = [path for path in pictures if path.suffix.lower() in (".png", ".jpg", ".jpeg")]
    if gray and facts.unit == "HU":
        raise MedsegError(
            f"{gray[0]}: holds gray values, the run was trained on 'HU'. Predict with a run that "
            "was trained on such pictures, or give the scan as NIfTI or DICOM."
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


def _require_no_series(source: Path, kind: str, wanted: Wanted) -> None:
    """Refuse what can be asked of a DICOM series alone."""
    if wanted.series is not None:
        raise MedsegError(
            f"--series {wanted.series}: {source} is {kind}. Name a folder of DICOM files, or leave "
            "--series out."
        )
    if wanted.seg:
        raise MedsegError(
            f"{source}: is {kind}. A DICOM SEG refers to the instances of a DICOM series, so it "
            "can be made of a series alone. Leave --format out, and end --output in .nii.gz or "
            "name a folder."
        )


def _check_targets(inputs: list[Input]) -> None:
    """Refuse to write over what is still to be read, or twice to one place."""
    sources = {one.source.resolve(): one.source for one in inputs}
    taken: dict[Path, Input] = {}
    for one in inputs:
        for place in (one.target, *one.beside):
            target = place.resolve()
            if target in sources:
                raise MedsegError(
                    f"{one.source}: its labels {place} would be written over the input "
                    f"{sources[target]}. Choose another --output."
                )
            other = taken.setdefault(target, one)
            if other is not one:
                raise MedsegError(
                    f"{other.source} and {one.source}: would both be written to {place}. Rename "
                    "one of them, or predict them one by one into folders of their own."
                )


def _stem(path: Path) -> str:
    """Return the name of a volume's file without what names its format."""
    stem = path.name
    for suffix in (".gz", ".nii", ".dcm"):
        stem = stem.removesuffix(suffix)
    return stem


def _volume_target(wanted: Wanted, stem: str, count: int = 1) -> Path:
    output = wanted.output
    if is_nifti_name(output.name) or output.suffix.lower() == ".dcm":
        if count > 1:
            raise MedsegError(f"--output {output}: is one file, but there are {count} volumes.")
        return output
    if output.suffix.lower() in PICTURES and not output.is_dir():
        raise MedsegError(
            f"--output {output}: is the name of a picture, but labels of volumes are NIfTI or "
            "DICOM SEG. End it in .nii.gz or .dcm, or name a folder."
        )
    return output / (f"{stem}.dcm" if wanted.seg else f"{stem}.nii.gz")


def _volume_maps(target: Path, wanted: Wanted) -> dict[str, Path]:
    # Uncompressed, because they are written while the network is still at work.
    return {name: target.with_name(f"{_stem(target)}_{name}.nii") for name in wanted.maps}


def _store(store: SliceStore, wanted: Wanted) -> Iterator[Input]:
    for row in store.manifest.cases:
        source = store.path / "images" / f"{row.name}.npy"
        if row.geometry is not None:
            target = _volume_target(wanted, row.name, len(store.manifest.cases))
            maps = _volume_maps(target, wanted)
            output: Output = VolumeOutput(target, row.geometry, maps)
            beside = tuple(maps.values())
        else:
            names = row.slice_names or tuple(f"{number:04d}" for number in range(row.slices))
            target = wanted.output / row.name
            stems = _picture_stems(names, f"{store.path}, case {row.name}")
            output = _picture_output(target, stems, wanted, len(store.classes))
            beside = ()
        read = partial(_read_case, store, row.name, output)
        yield Input(row.name, source, target, beside, read)


def _picture_stems(names: tuple[str, ...], where: str) -> tuple[str, ...]:
    """Return a file name for each slice; a name may hold dots, and the folders of its source."""
    taken: dict[str, str] = {}
    for name in names:
        stem = name.replace("/", "_").replace("\\", "_")
        if stem in taken:
            raise MedsegError(
                f"{where}: the slices '{taken[stem]}' and '{name}' would both be written to "
                f"{stem}.png. Rename one of the images and convert the data again."
            )
        taken[stem] = name
    return tuple(taken)


def _picture_output(
    folder: Path, stems: Sequence[str], wanted: Wanted, classes: int
) -> PictureOutput:
    """Return PNGs of labels in a folder, and beside them the maps and pictures of the entropy."""
    return PictureOutput(
        labels=tuple(folder / f"{stem}.png" for stem in stems),
        maps=tuple(folder / f"{stem}_maps.npz" for stem in stems) if wanted.maps else (),
        # In a folder of their own: they are no labels.
        pictures=tuple(folder / "entropy" / f"{stem}.png" for stem in stems)
        if "entropy" in wanted.maps
        else (),
        classes=classes,
    )


def _read_case(store: SliceStore, case: str, output: Output) -> Loaded:
    return Loaded(store.image(case), output)


def _nifti(path: Path, wanted: Wanted, count: int, facts: DataFacts) -> Input:
    target = _volume_target(wanted, _stem(path), count)
    maps = _volume_maps(target, wanted)

    def read() -> Loaded:
        volume = open_nifti(path, channels=facts.channels > 1)
        geometry = geometry_of(volume.affine, volume.array.shape[:3], _plane(facts))
        images = _changed(geometry.from_source(volume.array), facts, path.name, volume.scaling)
        return Loaded(images, VolumeOutput(target, geometry, maps), volume.notes)

    return Input(path.name, path, target, tuple(maps.values()), read)


def _dicom(folder: Path, wanted: Wanted, facts: DataFacts) -> Input:
    target = _volume_target(wanted, folder.name)
    maps = _volume_maps(target, wanted)
    if wanted.seg:
        require_highdicom()

    def read() -> Loaded:
        volume = read_series(list_files(folder), where=folder, series=wanted.series)
        # The pixels of CT are HU, those of MR are not.
        _require_same_unit(folder, "HU" if volume.modality == "CT" else "as stored", facts)
        geometry = volume.geometry(_plane(facts))
        images = _changed(geometry.from_source(volume.array), facts, folder.name)
        if not wanted.seg:
            return Loaded(images, VolumeOutput(target, geometry, maps), volume.notes)
        writer, notes = SegWriter.of(volume, facts.classes, wanted.algorithm)
        write = partial(_write_seg, writer, target, geometry)
        output = VolumeOutput(target, geometry, maps, write)
        return Loaded(images, output, (*volume.notes, *notes))

    return Input(folder.name, folder, target, tuple(maps.values()), read)


def _write_seg(writer: SegWriter, target: Path, geometry: Geometry, labels: Array) -> None:
    # On the source grid: columns, rows, slices.
    writer.write(target, geometry.to_source(labels).transpose(2, 1, 0))


def _picture(path: Path, wanted: Wanted, facts: DataFacts) -> Input:
    output = _picture_output(wanted.output, [path.stem], wanted, len(facts.classes))

    def read() -> Loaded:
        image = read_image(path, "rgb" if facts.channels == 3 else "gray")
        # Here, because a filter would turn what is no number into some gray value.
        require_finite(image[np.newaxis], str(path))
        return Loaded(_filtered(image[np.newaxis], facts), output)

    return Input(path.name, path, output.labels[0], (*output.maps, *output.pictures), read)


def _plane(facts: DataFacts) -> Plane:
    """Return the plane of the training's slices, whatever plane an input was taken in."""
    plane: Plane = facts.conversion.get("plane") or "axial"
    return plane


def _changed(
    stored: Array, facts: DataFacts, name: str, scaling: tuple[float, float] = UNSCALED
) -> Slices:
    """Scale and filter slices as the training data were, where possible not before they are used.

    Args:
        stored: (S, H, W) or (S, H, W, C).
        facts: how the training data were converted.
        name: stands in errors.
        scaling: slope and intercept of the stored values.

    Raises:
        MedsegError: pixels that would be filtered are NaN or infinite.
    """

    def scaled(block: Array) -> Array:
        return block if scaling == UNSCALED else block * scaling[0] + scaling[1]

    images: Slices = stored
    if scaling != UNSCALED or stored.dtype.kind == "f":
        images = LazySlices(stored, scaled, np.float32)
    if facts.conversion.get("erosion") is None and facts.conversion.get("canny") is None:
        return images
    # A filter would turn what is no number into some gray value.
    require_finite(images, name)
    if facts.unit == "HU":
        return LazySlices(stored, lambda block: _filtered(scaled(block), facts), np.uint8)
    # What is not HU is scaled to 8 bits by percentiles of the whole volume.
    return _filtered(np.asarray(images), facts)


def _filtered(image: Array, facts: DataFacts) -> Array:
    """Filter an input as the training data were filtered when they were converted."""
    canny = facts.conversion.get("canny")
    return prepared(
        image,
        facts.conversion.get("erosion"),
        tuple(canny) if canny else None,
        is_hu=facts.unit == "HU",
    )

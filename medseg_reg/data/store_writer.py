"""Writing a slice store: atomic, resumable, idempotent.

Everything is written into a hidden sibling, `.<name>.partial`, case by case; the row of a case
is written last, so a row says that its arrays are whole. When all cases are there, the manifest
is written and the folder is renamed to its final name in one step.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from isal import isal_zlib

from medseg_reg.data.overview import write_overview
from medseg_reg.data.store import IMAGE_DTYPES, CaseRow, Description, Manifest, SliceStore
from medseg_reg.errors import MedsegError
from medseg_reg.files import read_json, require_writable, write_json
from medseg_reg.io.geometry import Geometry

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class CaseSource:
    """Which files make a case; small, so it travels to a worker process.

    Attributes:
        name: the case's name in the store, letters, digits, dot, dash and underscore.
        group: the patient or video; one group never lies in two parts of a split.
        files: every file that the case is made from.
        part: the official part of the data set that the case belongs to, if it has one.
        details: what the reader of this kind of source needs besides.
    """

    name: str
    group: str
    files: tuple[Path, ...]
    part: str | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def fingerprint(self, times: bool = False) -> str:
        """Return a hash of the case and of its files' names and sizes, cheap to ask for.

        Args:
            times: also of the times of their last change, which a repaired file of the same size
                differs in. A copy on another disk may differ too.
        """
        stats = [(file.name, file.stat()) for file in self.files]
        files = [
            (name, stat.st_size, stat.st_mtime_ns) if times else (name, stat.st_size)
            for name, stat in stats
        ]
        text = repr((self.name, self.group, self.part, files))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass
class CaseArrays:
    """What a reader makes of a `CaseSource`.

    Attributes:
        image: (S, H, W) or (S, H, W, C); int16 in HU, uint8, or float32.
        mask: (S, H, W) uint8, the value is the index of the class, or the label that the
            description of the store says is ignored.
        geometry: the grid, for volumes.
        slice_names: the names of the frames, for images.
        notes: what a person should know of this case.
    """

    image: Array
    mask: Array
    geometry: Geometry | None = None
    slice_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


class StoreWriter:
    """A slice store in the making.

    Args:
        out: the store's final path.
        description: what the data are.
        settings: everything that decides how a case is written; a store made with other settings
            is never overwritten or continued.
        selection: what decides which cases are written. A finished store with another selection
            is never overwritten; an interrupted one goes on with it, so that a case can be
            repaired or left out.
    """

    def __init__(
        self,
        out: Path,
        description: Description,
        settings: dict[str, Any],
        selection: dict[str, Any] | None = None,
    ) -> None:
        self.out = out
        self.partial = out.parent / f".{out.name}.partial"
        self.description = description
        self.settings = settings
        self.selection = selection or {}

    def finished(self, any_selection: bool = False) -> SliceStore | None:
        """Return the store if it is there already, made with the same settings.

        Args:
            any_selection: compare the settings alone; for who has no sources to compare.
        """
        if not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return None
        if not (self.out / "manifest.json").exists():
            raise MedsegError(
                f"{self.out}: exists and is not a slice store. Name another store; nothing "
                "was touched."
            )
        store = SliceStore(self.out)
        found, wanted = store.manifest.settings, {**self.settings, **self.selection}
        if any_selection:
            found = {key: value for key, value in found.items() if key in wanted}
        if found != wanted:
            raise MedsegError(
                f"{self.out}: was made with other settings or sources "
                f"({difference(found, wanted)}). Name another store, or delete it first."
            )
        return store

    def begin(self) -> None:
        """Open the partial folder, or go on with the one that an interrupted run left."""
        require_writable(self.out.parent)
        settings = self.partial / "settings.json"
        if settings.exists():
            found = read_json(settings)
            if found != self.settings:
                raise MedsegError(
                    f"{self.partial}: is left from a conversion with other settings "
                    f"({difference(found, self.settings)}). Delete it, or use those settings."
                )
        for folder in ("images", "masks", "cases"):
            require_writable(self.partial / folder)
        write_json(settings, self.settings)

    def has(self, source: CaseSource) -> bool:
        """Whether a case is already written whole, from files that have not changed since."""
        try:
            content = json.loads(self._row_file(source.name).read_text(encoding="utf-8"))
            row = CaseRow.model_validate(content["row"])
            image, mask = (
                (self.partial / folder / f"{source.name}.npy").stat().st_size
                for folder in ("images", "masks")
            )
        except (OSError, ValueError, KeyError, TypeError):
            return False  # not there, or lost in a power cut
        pixels = math.prod(row.shape) * np.dtype(row.dtype).itemsize
        whole = image > pixels and mask > math.prod(row.shape[:3])
        return whole and content["fingerprint"] == source.fingerprint(times=True)

    def _row_file(self, name: str) -> Path:
        return self.partial / "cases" / f"{name}.json"

    def write(self, source: CaseSource, arrays: CaseArrays, source_sha256: str) -> CaseRow:
        """Check and write one case; may run in a worker process."""
        ignored = self.description.ignore_label
        check_arrays(source.name, arrays, len(self.description.classes), ignored)
        image = np.ascontiguousarray(arrays.image)
        mask = np.ascontiguousarray(arrays.mask)
        # A row from before a repair must not outlive the arrays that it speaks of.
        self._row_file(source.name).unlink(missing_ok=True)
        # Hashing lets go of the interpreter, so it runs beside the writing.
        with ThreadPoolExecutor(2) as pool:
            image_sha256 = pool.submit(npy_sha256, image)
            mask_sha256 = pool.submit(npy_sha256, mask)
            hashes = pool.submit(slice_hashes, image)
            _save(self.partial / "images" / f"{source.name}.npy", image)
            _save(self.partial / "masks" / f"{source.name}.npy", mask)
            row = CaseRow(
                name=source.name,
                group=source.group,
                part=source.part,
                shape=image.shape,
                dtype=image.dtype.name,
                geometry=arrays.geometry,
                slice_names=arrays.slice_names,
                foreground=foreground_counts(mask, ignored),
                slice_hashes=hashes.result(),
                sources=tuple(file.name for file in source.files),
                source_sha256=source_sha256,
                image_sha256=image_sha256.result(),
                mask_sha256=mask_sha256.result(),
                notes=arrays.notes,
            )
        content = {
            "fingerprint": source.fingerprint(times=True),
            "row": row.model_dump(mode="json"),
        }
        # Flushing this row would flush the arrays before it, and the converter would wait for the
        # disk after each case; `publish` flushes all of them.
        write_json(self._row_file(source.name), content, durable=False)
        return row

    def publish(self, names: list[str]) -> SliceStore:
        """Write manifest and overview, flush all to disk, and give the store its final name."""
        rows = [CaseRow.model_validate(read_json(self._row_file(name))["row"]) for name in names]
        settings = {**self.settings, **self.selection}
        manifest = Manifest(description=self.description, settings=settings, cases=tuple(rows))
        self._remove_all_but(names)
        write_json(self.partial / "manifest.json", manifest.model_dump(mode="json"))
        write_overview(SliceStore(self.partial), self.partial / "overview.png")
        for file in self.partial.rglob("*.npy"):
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        # Last, because flushing takes long, and a run killed in it should go on from here.
        shutil.rmtree(self.partial / "cases")
        (self.partial / "settings.json").unlink()
        if self.out.exists():
            self.out.rmdir()
        os.replace(self.partial, self.out)
        return SliceStore(self.out)

    def _remove_all_but(self, names: list[str]) -> None:
        """Remove cases left out after they had been written, and the rests of killed writes."""
        for folder in ("images", "masks"):
            kept = {f"{name}.npy" for name in names}
            _remove(path for path in (self.partial / folder).iterdir() if path.name not in kept)
        own = {"images", "masks", "cases", "settings.json"}
        _remove(path for path in self.partial.iterdir() if path.name not in own)

    def discard_if_empty(self) -> None:
        """Leave nothing behind when not one case was written."""
        cases = self.partial / "cases"
        if cases.exists() and not any(cases.iterdir()):
            shutil.rmtree(self.partial)


def _remove(paths: Iterable[Path]) -> None:
    # Listed before the first is removed: a folder must not change while it is read.
    for path in list(paths):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def foreground_counts(mask: Array, ignored: int | None = None) -> tuple[int, ...]:
    """Return the pixels of each slice that are neither background nor ignored.

    >>> foreground_counts(np.array([[[0, 1, 255]], [[0, 0, 0]]], np.uint8), 255)
    (1, 0)
    """
    counts = (np.count_nonzero(one) for one in mask)
    if ignored is not None:
        counts = (np.count_nonzero((one > 0) & (one != ignored)) for one in mask)
    return tuple(map(int, counts))


def top_class(mask: Array, ignored: int | None = None) -> int:
    """Return the highest label of a mask besides the ignored one; 0 where there is no other.

    >>> top_class(np.array([0, 2, 255], np.uint8), 255)
    2
    """
    if ignored is None:
        return int(mask.max())
    return int(mask.max(where=mask != ignored, initial=0))


def check_arrays(name: str, arrays: CaseArrays, classes: int, ignored: int | None = None) -> None:
    """Refuse arrays that a store must not hold; the error names the case."""
    image, mask = arrays.image, arrays.mask
    if image.ndim not in (3, 4) or mask.shape != image.shape[:3] or 0 in image.shape:
        raise MedsegError(
            f"case {name}: image {image.shape} and mask {mask.shape} do not lie on one grid of "
            "(slices, rows, columns). Check that they belong together."
        )
    if image.dtype.name not in IMAGE_DTYPES or mask.dtype != np.uint8:
        raise TypeError(f"case {name}: image is {image.dtype}, mask is {mask.dtype}")
    if image.dtype == np.float32 and not np.isfinite(image).all():
        bad = int(image.size - np.count_nonzero(np.isfinite(image)))
        raise MedsegError(
            f"case {name}: {bad} pixels of the image are NaN or infinite. Repair the source, or "
            "leave the case out with --skip."
        )
    if top_class(mask, ignored) >= classes:
        values = [int(value) for value in np.unique(mask)]
        besides = "" if ignored is None else f" and {ignored} is ignored"
        raise MedsegError(
            f"case {name}: the mask holds the labels {values}, but the declared classes are "
            f"0 to {classes - 1}{besides}. Declare all classes, or repair the mask."
        )


def _save(path: Path, array: Array) -> None:
    """Write a contiguous array as .npy by a temporary file."""
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            header = np.lib.format.header_data_from_array_1_0(array)
            np.lib.format.write_array_header_1_0(file, header)
            # Not by ndarray.tofile, which hides the reason when the disk is full.
            file.write(array.data.cast("B"))
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def npy_sha256(array: Array) -> str:
    """Return the SHA-256 of the .npy file that a contiguous array is written to."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    digest = hashlib.sha256(header.getvalue())
    digest.update(array.data.cast("B"))
    return digest.hexdigest()


def slice_hashes(image: Array) -> tuple[str | None, ...]:
    """Return a fingerprint of each slice; None where it is one flat value and so says nothing.

    Two checksums of 32 bits each: they find equal slices at the speed of memory, and are no
    protection against forgery, which `image_sha256` is.
    """
    return tuple(None if _is_flat(one) else _fingerprint(one) for one in image)


def _is_flat(one: Array) -> bool:
    first = one.flat[0]
    return bool((one == first).all())


def _fingerprint(one: Array) -> str:
    data = one.data.cast("B")
    return f"{isal_zlib.crc32(data):08x}{isal_zlib.adler32(data):08x}"


def difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Return the keys in which two settings differ, with both values."""
    keys = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
    shown = [f"{k}: {_short(found.get(k))}, now {_short(wanted.get(k))}" for k in keys]
    return "; ".join(shown)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

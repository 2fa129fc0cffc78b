"""The slice store: what conversion writes and training reads, a plain directory.

    manifest.json      what the data are, and one row per case
    images/<case>.npy  (S, H, W) or (S, H, W, C): int16 in HU, uint8, or float32
    masks/<case>.npy   (S, H, W) uint8, the value is the index of the class, or the ignored label
    overview.png       a contact sheet with the outlines of the masks, for a person's eye

Arrays are memory-mapped and never changed in place.
"""

from __future__ import annotations

import errno
from collections import OrderedDict
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from medseg_reg.errors import MedsegError, nearest
from medseg_reg.files import read_json
from medseg_reg.io.geometry import Geometry

FORMAT: Final = "medseg_reg slice store"
VERSION: Final = 1
IMAGE_DTYPES = ("uint8", "int16", "float32")
CASE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"

# Each open map holds a file handle, of which a process often has 1024.
MAX_OPEN_MAPS = 128

Array = np.ndarray[Any, np.dtype[Any]]


class CaseRow(BaseModel):
    """One case of a store: one patient's volume, or the frames of one video."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=CASE_NAME, max_length=200)
    group: str
    part: Literal["train", "test"] | None = None
    shape: tuple[int, ...] = Field(min_length=3, max_length=4)
    dtype: Literal["uint8", "int16", "float32"]
    geometry: Geometry | None = None
    slice_names: tuple[str, ...] | None = None
    foreground: tuple[int, ...]
    slice_hashes: tuple[str | None, ...]
    sources: tuple[str, ...]
    source_sha256: str
    image_sha256: str
    mask_sha256: str
    notes: tuple[str, ...] = ()

    @property
    def slices(self) -> int:
        """Number of slices or frames."""
        return self.shape[0]

    @property
    def channels(self) -> int:
        """Number of image channels: 1 for gray, 3 for colour."""
        return self.shape[3] if len(self.shape) == 4 else 1


class Description(BaseModel):
    """What a data set is, said once for all its cases.

    `notes` are what must be said wherever scores on these data are shown. `ignore_label` is a value
    in the masks besides the classes, whose pixels have no known class; None where there is none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    source: str
    licence: str
    citation: str
    modality: str
    unit: str
    classes: tuple[str, ...] = Field(min_length=2, max_length=256)
    notes: tuple[str, ...] = ()
    ignore_label: int | None = Field(None, ge=1, le=255)

    @model_validator(mode="after")
    def _ignored_is_no_class(self) -> Description:
        if self.ignore_label is not None and self.ignore_label < len(self.classes):
            raise ValueError(
                f"the ignored label {self.ignore_label} is the class "
                f"'{self.classes[self.ignore_label]}'; expected {len(self.classes)} to 255"
            )
        return self

    @model_serializer(mode="wrap")
    def _plain(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # The manifest of a store without ignored pixels, and so its hash, is as it always was.
        content: dict[str, Any] = write(self)
        if self.ignore_label is None:
            del content["ignore_label"]
        return content


class Manifest(BaseModel):
    """The content of manifest.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["medseg_reg slice store"] = FORMAT
    version: Literal[1] = VERSION
    description: Description
    settings: dict[str, Any]
    cases: tuple[CaseRow, ...]


class SliceStore:
    """Read access to a slice store; safe to share between processes, forked or spawned.

    Args:
        path: the directory that holds manifest.json.

    Raises:
        MedsegError: the directory is no slice store, or its manifest is damaged.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.manifest = _read_manifest(self.path)
        self._maps: OrderedDict[tuple[str, str], Array] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": OrderedDict()}

    @cached_property
    def rows(self) -> dict[str, CaseRow]:
        """The rows of the manifest by the names of their cases."""
        return {row.name: row for row in self.manifest.cases}

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; the index is the value in the masks, 0 is the background."""
        return self.manifest.description.classes

    @property
    def ignore_label(self) -> int | None:
        """The value in the masks of pixels whose class is not known, if there is one."""
        return self.manifest.description.ignore_label

    def row(self, case: str) -> CaseRow:
        """Return the manifest's row of a case."""
        try:
            return self.rows[case]
        except KeyError:
            raise MedsegError(
                f"{self.path}: has no case '{case}'.{nearest(case, self.rows)}"
            ) from None

    def image(self, case: str) -> Array:
        """Return the images of a case, memory-mapped and read-only: (S, H, W) or (S, H, W, C)."""
        row = self.row(case)
        return self._map("images", row, row.shape, row.dtype)

    def mask(self, case: str) -> Array:
        """Return the masks of a case, memory-mapped and read-only: (S, H, W) uint8."""
        row = self.row(case)
        return self._map("masks", row, row.shape[:3], "uint8")

    def _map(self, folder: str, row: CaseRow, shape: tuple[int, ...], dtype: str) -> Array:
        key = (folder, row.name)
        if key in self._maps:
            self._maps.move_to_end(key)
        else:
            path = self.path / folder / f"{row.name}.npy"
            self._maps[key] = open_array(path, shape, dtype)
            if len(self._maps) > MAX_OPEN_MAPS:
                self._maps.popitem(last=False)
        return self._maps[key]


def open_array(path: Path, shape: tuple[int, ...], dtype: str) -> Array:
    """Memory-map an array of a store; a missing, truncated or foreign file is a clear error."""
    try:
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise MedsegError(f"{path}: is missing. Convert the data again.") from None
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.EACCES, errno.ENOMEM):
            raise
        raise MedsegError(f"{path}: cannot be read ({error}). Convert the data again.") from None
    except Exception as error:
        # NumPy parses the header as Python text, which fails in many ways when it is damaged.
        raise MedsegError(
            f"{path}: is damaged ({error}). Delete the store and convert the data again."
        ) from None
    if array.shape != shape or array.dtype != dtype:
        raise MedsegError(
            f"{path}: holds {array.shape} {array.dtype}, the manifest says {shape} {dtype}. "
            "Convert the data again."
        )
    return array


def _read_manifest(path: Path) -> Manifest:
    file = path / "manifest.json"
    if not file.exists():
        raise MedsegError(
            f"{path}: is not a slice store (no manifest.json). Make one with "
            "`python -m data_prep.pancreas_ct`, `.bagls`, `.nifti` or `.image_folder`, "
            f"giving it `--out {path}`."
        )
    content = read_json(file)
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise MedsegError(f"{file}: {key}: {first['msg']}. Convert the data again.") from None
    if len({row.name for row in manifest.cases}) != len(manifest.cases):
        raise MedsegError(f"{file}: two cases have the same name. Convert the data again.")
    return manifest

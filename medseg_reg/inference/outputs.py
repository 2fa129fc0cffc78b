"""Where the labels of a case and the maps of their uncertainty go, some slices at a time.

Labels are kept as 8-bit numbers until the case is done; maps go to the disk at once, because in
memory those of a large volume would be many times its size. Files appear whole or not at all, the
labels last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medseg_reg.files import replacing
from medseg_reg.io.geometry import Geometry
from medseg_reg.io.images import write_mask_png
from medseg_reg.io.nifti_writer import map_on_disk, write_nifti

Array = np.ndarray[Any, np.dtype[Any]]

# Takes the number of a first slice, labels (n, H, W) from there on, and maps (n, H, W) by names.
Add = Callable[[int, Array, Mapping[str, Array]], None]


@dataclass(frozen=True)
class VolumeOutput:
    """A volume on the grid of its source.

    Attributes:
        labels: the file of the labels.
        geometry: the grid.
        maps: the files of the maps, by their names; they end in .nii.
        write: writes the labels, in the stored order (S, H, W); by default as NIfTI.
    """

    labels: Path
    geometry: Geometry
    maps: Mapping[str, Path] = field(default_factory=dict)
    write: Callable[[Array], None] | None = None

    @contextmanager
    def open(self, shape: tuple[int, ...]) -> Iterator[Add]:
        """Take the labels and maps of slices (S, H, W); write them when the block succeeds."""
        labels = np.zeros(shape[:3], np.uint8)
        with ExitStack() as stack:
            files = {
                name: stack.enter_context(map_on_disk(path, self.geometry))
                for name, path in self.maps.items()
            }

            def add(start: int, part: Array, maps: Mapping[str, Array]) -> None:
                labels[start : start + len(part)] = part
                for name, write in files.items():
                    write(start, maps[name])

            yield add
        if self.write is not None:
            self.write(labels)
        else:
            write_nifti(self.labels, labels, self.geometry)


@dataclass(frozen=True)
class PictureOutput:
    """Pictures, one for each slice.

    Attributes:
        labels: the PNG files of the labels.
        maps: the npz files of the maps, with one array for each; empty where none are wanted.
        pictures: PNG files of the entropy for the eye, black for sure and white for log K.
        classes: K, the number of classes.
    """

    labels: tuple[Path, ...]
    maps: tuple[Path, ...] = ()
    pictures: tuple[Path, ...] = ()
    classes: int = 2

    @contextmanager
    def open(self, shape: tuple[int, ...]) -> Iterator[Add]:
        """Take the labels and maps of slices (S, H, W); write the labels when the block succeeds.

        Maps are written at once, each file whole or not at all.
        """
        labels = np.zeros(shape[:3], np.uint8)

        def add(start: int, part: Array, maps: Mapping[str, Array]) -> None:
            labels[start : start + len(part)] = part
            for number in range(len(part)):
                self._write_maps(start + number, {k: v[number] for k, v in maps.items()})

        yield add
        for path, one in zip(self.labels, labels, strict=True):
            write_mask_png(path, one)

    def _write_maps(self, number: int, maps: Mapping[str, Array]) -> None:
        if self.maps:
            with replacing(self.maps[number], durable=False) as temporary:
                # NumPy's stub takes a name for that of an option.
                np.savez_compressed(temporary, **maps)  # type: ignore[arg-type]
        if self.pictures:
            gray = maps["entropy"] / np.log(self.classes) * 255
            picture = np.clip(np.nan_to_num(gray), 0, 255).round().astype(np.uint8)
            write_mask_png(self.pictures[number], picture)


Output = VolumeOutput | PictureOutput

"""What a slice costs on its way from the store to the network, beside a copy of its bytes.

    python -m benchmarks.loading
    python -m benchmarks.loading --size 256 --slices 48 --repeats 300

The floor copies the slice and its mask out of the memory map and makes the slice float32. Then an
item of the data set without augmentation, the same resized to half, and with augmentation chains;
and the slice as scripts read it, from the volume as .nii by nibabel, as .nii.gz by nibabel and by
SimpleITK, and from a PNG by PIL. These read no mask. Last, a slice of a batch that is made on the
device where all slices stay (`data.resident`).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK
import torch
from PIL import Image

from benchmarks.ratios import Row, markdown, rows_of
from data_prep.phantom import make_demo
from medseg_reg.data.augment import Augmentation
from medseg_reg.data.dataset import SliceDataset
from medseg_reg.data.preprocessing import ImageSpec
from medseg_reg.data.resident import ResidentSlices
from medseg_reg.data.sampling import Sample
from medseg_reg.data.store import SliceStore

WINDOW = (-100.0, 240.0)
CHAINS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "affine": [("Affine", {"rotate": (-10, 10), "scale": (0.9, 1.1), "p": 1.0})],
    "flip, brightness": [
        ("HorizontalFlip", {"p": 0.5}),
        ("RandomBrightnessContrast", {"p": 1.0}),
    ],
    "elastic": [("ElasticTransform", {"p": 1.0})],
}


def tasks(store: SliceStore, size: int) -> dict[str, Callable[[int], object]]:
    """Return what is timed, by name; each takes the number of a slice."""
    names = [row.name for row in store.manifest.cases]
    spec = ImageSpec(window=WINDOW)
    plain = SliceDataset(store, names, spec)
    half = SliceDataset(store, names, ImageSpec(window=WINDOW, size=(size // 2, size // 2)))

    def floor(number: int) -> object:
        case, index = plain.items[number]
        image, mask = store.image(names[case])[index], store.mask(names[case])[index]
        return image.astype(np.float32), np.array(mask)

    found: dict[str, Callable[[int], object]] = {
        "floor": floor,
        "item": plain.__getitem__,
        "item, resized to half": half.__getitem__,
    }
    for name, chain in CHAINS.items():
        changed = SliceDataset(store, names, spec, Augmentation(chain))
        found[f"item, {name}"] = partial(_augmented, changed)
    return found


def _augmented(data: SliceDataset, number: int) -> object:
    return data[Sample(number, number)]


def resident(store: SliceStore, device: str, repeats: int) -> dict[str, list[float]]:
    """Return the seconds for a slice of batches of 8 that are made on a device, by chain."""
    names = [row.name for row in store.manifest.cases]
    found: dict[str, list[float]] = {}
    for name, chain in {"no augmentation": [], **CHAINS}.items():
        data = SliceDataset(store, names, ImageSpec(window=WINDOW), Augmentation(chain))
        slices, times = ResidentSlices(data, torch.device(device)), []
        for number in range(repeats + 1):
            keys = [Sample((8 * number + i) % len(data), 8 * number + i) for i in range(8)]
            start = time.perf_counter()
            slices.batch(keys)
            if device == "cuda":
                torch.cuda.synchronize()
            if number:
                times.append((time.perf_counter() - start) / 8)
        found[f"resident on {device}, {name}"] = times
    return found


def loops(store: SliceStore, folder: Path) -> dict[str, Callable[[int], object]]:
    """Write the first case in the formats of scripts, and return how these read a slice."""
    volume = store.image(store.manifest.cases[0].name)
    image = nibabel.Nifti1Image(np.ascontiguousarray(volume.transpose(2, 1, 0)), np.eye(4))
    for suffix in ("nii", "nii.gz"):
        nibabel.save(image, folder / f"case.{suffix}")
    low, high = WINDOW
    shown = (np.clip((volume - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    for index, pixels in enumerate(shown):
        Image.fromarray(pixels).save(folder / f"{index}.png")

    def with_nibabel(suffix: str) -> Callable[[int], object]:
        def read(number: int) -> object:
            found = nibabel.load(folder / f"case.{suffix}")
            return np.asarray(found.dataobj[..., number % len(volume)], np.float32)  # type: ignore

        return read

    def with_simpleitk(number: int) -> object:
        voxels = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folder / "case.nii.gz")))
        return voxels[number % len(volume)].astype(np.float32)

    def with_pil(number: int) -> object:
        return np.asarray(Image.open(folder / f"{number % len(volume)}.png"), np.float32) / 255

    return {
        "nibabel, .nii": with_nibabel("nii"),
        "nibabel, .nii.gz": with_nibabel("nii.gz"),
        "SimpleITK, .nii.gz": with_simpleitk,
        "PIL, .png": with_pil,
    }


def measure_loading(size: int, slices: int, repeats: int, device: str) -> dict[str, list[float]]:
    """Return the seconds of single items, the tasks in turns."""
    with tempfile.TemporaryDirectory() as folder:
        make_demo(Path(folder) / "store", cases=3, size=size, slices=slices, tell=lambda _: None)
        store = SliceStore(Path(folder) / "store")
        timed = {**tasks(store, size), **loops(store, Path(folder))}
        times: dict[str, list[float]] = {name: [] for name in timed}
        for number in range(repeats + 1):
            for name, task in timed.items():
                start = time.perf_counter()
                task(number % (3 * slices))
                if number:  # the first opens files and imports
                    times[name].append(time.perf_counter() - start)
        times |= resident(store, device, max(8, repeats // 8))
    return times


def rows(options: argparse.Namespace) -> list[Row]:
    """Return the rows of this part for `python -m benchmarks`."""
    times = measure_loading(512, 24, 300 if options.full else 40, options.device)
    return rows_of("loading", quartiles(times), "floor")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--slices", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--device", default="cpu", help="where resident slices are")
    options = parser.parse_args(arguments)
    times = measure_loading(options.size, options.slices, options.repeats, options.device)
    print(markdown(rows_of("loading", quartiles(times), "floor")))


def quartiles(times: dict[str, list[float]]) -> dict[str, list[float]]:
    """Keep the middle half of many short times: the others tell of the rest of the machine."""
    return {
        name: sorted(values)[len(values) // 4 : max(1, 3 * len(values) // 4)]
        for name, values in times.items()
    }


if __name__ == "__main__":
    main()

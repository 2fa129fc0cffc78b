"""How close the converters come to the floor of decompressing the sources and writing the arrays.

    python -m benchmarks.conversion                              # all kinds of source
    python -m benchmarks.conversion pancreas_ct nifti --rounds 9 --size 512 --slices 200

The floor decodes and writes, and nothing else: DICOM by pydicom, gzip by isal, pictures by OpenCV,
arrays by np.save; no grouping, ordering, checks, proof of a label's orientation, hashes or
manifest. The loop beside it is what a script would have: SimpleITK for a DICOM series, nibabel for
NIfTI, PIL for pictures, and np.save; it checks nothing either. All three run in this process, in
turns, on one case that is made on the fly.
The converter hashes in threads beside its reading and writing; so its wall time depends on idle
cores, and where other work disturbs, the least of the rounds says most. The time of the processor
counts all threads, and with them the SHA-256 of the sources and arrays, which is most of the
difference.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import nibabel
import numpy as np
import pydicom
import SimpleITK
from isal import igzip
from PIL import Image

from benchmarks.ratios import Row, rows_of
from data_prep import bagls, nifti, pancreas_ct
from data_prep.convert import Reader, convert_one
from data_prep.labels_archive import find_labels
from data_prep.phantom import make_phantom
from data_prep.phantom_anatomy import phantom_volume
from data_prep.volumes import read_nifti_case
from medseg_reg.data.store import Description
from medseg_reg.data.store_writer import CaseSource, StoreWriter

Array = np.ndarray[Any, np.dtype[Any]]
Decoder = Callable[[CaseSource], tuple[Array, Array]]
# Wall and processor time.
Time = tuple[float, float]


class Task(NamedTuple):
    """One case of one kind of source: how it is converted, and what stands beside it.

    Attributes:
        source: the files of the case.
        read: how the converter reads it.
        description: of the store.
        floor: decodes image and mask as fast as it goes.
        loop: reads them as a script would.
    """

    source: CaseSource
    read: Reader
    description: Description
    floor: Decoder
    loop: Decoder


def with_nibabel(path: Path) -> Array:
    """Return the voxels of a NIfTI file, slice by slice, the slices in front."""
    return np.asarray(nibabel.load(path).dataobj).transpose(2, 1, 0)  # type: ignore[attr-defined]


def unpacked(path: Path) -> Array:
    """Return the voxels of a .nii.gz as they lie in it, the last axis first."""
    content = igzip.decompress(path.read_bytes())
    header = nibabel.Nifti1Header(content[:348])
    voxels = np.frombuffer(content, header.get_data_dtype(), offset=header.get_data_offset())
    return voxels.reshape(header.get_data_shape()[::-1])


def pancreas_task(folder: Path, size: int, slices: int) -> Task:
    """Return a scan in the layout of Pancreas-CT: DICOM slices, label as .nii.gz."""
    make_phantom(folder / "ct", cases=1, size=size, slices=slices, labels="gz")
    labels = find_labels(folder / "ct", pancreas_ct.LABEL)
    (source,) = pancreas_ct.pair(pancreas_ct.find_scans(folder / "ct"), labels, duplicates=False)

    def floor(source: CaseSource) -> tuple[Array, Array]:
        *files, label = source.files
        return np.stack([pydicom.dcmread(file).pixel_array for file in files]), unpacked(label)

    def loop(source: CaseSource) -> tuple[Array, Array]:
        *files, label = source.files
        reader = SimpleITK.ImageSeriesReader()
        folder = str(files[0].parent)
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(folder))
        return SimpleITK.GetArrayFromImage(reader.Execute()), with_nibabel(label)

    return Task(source, pancreas_ct.read_case, pancreas_ct.DESCRIPTION, floor, loop)


def nifti_task(folder: Path, size: int, slices: int) -> Task:
    """Return a volume in the layout of the Medical Decathlon."""
    hu, mask = phantom_volume(0, 1, size, slices)
    affine = np.diag([0.7, 0.7, 1.0, 1.0])
    for name, volume in (("imagesTr", hu), ("labelsTr", mask)):
        (folder / "msd" / name).mkdir(parents=True)
        image = nibabel.Nifti1Image(np.ascontiguousarray(volume.transpose(2, 1, 0)), affine)
        packed = igzip.compress(image.to_bytes(), compresslevel=2)
        (folder / "msd" / name / "case.nii.gz").write_bytes(packed)
    (source,) = nifti.find_cases(folder / "msd", unit="HU")

    def floor(source: CaseSource) -> tuple[Array, Array]:
        image, label = source.files
        return unpacked(image), unpacked(label)

    def loop(source: CaseSource) -> tuple[Array, Array]:
        image, label = source.files
        return with_nibabel(image), with_nibabel(label)

    read = partial(read_nifti_case, plane="axial")
    return Task(source, read, pancreas_ct.DESCRIPTION, floor, loop)


def _decoded(file: Path) -> Array:
    found = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
    assert found is not None
    return found


def bagls_task(folder: Path, size: int, slices: int) -> Task:
    """Return a video in the layout of BAGLS: gray frames stored as RGB PNG."""
    hu, mask = phantom_volume(0, 1, size, slices)
    frames = np.clip((hu + 160) * (255 / 400), 0, 255).astype(np.uint8)
    (folder / "bagls" / "training").mkdir(parents=True)
    for number, (frame, labels) in enumerate(zip(frames, mask, strict=True)):
        place = folder / "bagls" / "training" / str(number)
        cv2.imwrite(f"{place}.png", np.repeat(frame[..., None], 3, axis=2))
        cv2.imwrite(f"{place}_seg.png", 255 * labels)
        place.with_suffix(".meta").write_text(json.dumps({bagls.VIDEO_KEY: 0}))
    (source,) = bagls.find_cases(folder / "bagls")

    def floor(source: CaseSource) -> tuple[Array, Array]:
        images = [_decoded(file)[..., 0] for file in source.files[::3]]
        return np.stack(images), np.stack([_decoded(file) for file in source.files[1::3]])

    def loop(source: CaseSource) -> tuple[Array, Array]:
        images = [np.asarray(Image.open(file).convert("L")) for file in source.files[::3]]
        return np.stack(images), np.stack([np.asarray(Image.open(f)) for f in source.files[1::3]])

    read = partial(bagls.read_case, color="gray", threshold=None)
    return Task(source, read, bagls.DESCRIPTION, floor, loop)


KINDS = {"pancreas_ct": pancreas_task, "nifti": nifti_task, "bagls": bagls_task}


def decode_and_write(decode: Decoder, task: Task, out: Path) -> None:
    """Decode and write, and nothing else."""
    out.mkdir()
    image, mask = decode(task.source)
    np.save(out / "image.npy", image)
    np.save(out / "mask.npy", mask)


def run_floor(task: Task, out: Path) -> None:
    """Decode with the fastest decoders, and write."""
    decode_and_write(task.floor, task, out)


def run_loop(task: Task, out: Path) -> None:
    """Decode as a script would, and write."""
    decode_and_write(task.loop, task, out)


def run_converter(task: Task, out: Path) -> None:
    """Read, check, prove, hash and write one case as the converter does."""
    writer = StoreWriter(out, task.description, {})
    writer.begin()
    convert_one(task.source, task.read, writer)


RUNS = {"floor": run_floor, "converter": run_converter, "plain loop": run_loop}


def seconds(run: Callable[[Task, Path], None], task: Task, folder: Path) -> Time:
    """Return the wall and processor time of a run; what it writes is thrown away afterwards."""
    start, start_cpu = time.perf_counter(), time.process_time()
    run(task, folder / "out")
    elapsed = time.perf_counter() - start, time.process_time() - start_cpu
    shutil.rmtree(folder / "out", ignore_errors=True)
    shutil.rmtree(folder / ".out.partial", ignore_errors=True)
    return elapsed


def measure(kind: str, size: int, slices: int, rounds: int) -> dict[str, list[Time]]:
    """Return the times of each of `RUNS`, one a round."""
    times: dict[str, list[Time]] = {name: [] for name in RUNS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task = KINDS[kind](folder, size, slices)
        for number in range(rounds + 1):
            for title, run in RUNS.items():
                found = seconds(run, task, folder)
                if number:  # the first round warms the page cache and imports
                    times[title].append(found)
    return times


def report(kind: str, times: dict[str, list[Time]]) -> None:
    """Print seconds, and ratios to the floor, for one kind of source."""
    for clock, name in enumerate(("wall", "processor")):
        print(f"{kind + ', ' + name:32} {'median':>8} {'min':>8} {'max':>8}")
        least = [one[clock] for one in times["floor"]]
        for title, pairs in times.items():
            values = [one[clock] for one in pairs]
            lines = {f"{title}, s": values}
            if title != "floor":
                ratios = [b / a for a, b in zip(least, values, strict=True)]
                lines[f"{title}, ratio of a round"] = ratios
            for line, numbers in lines.items():
                middle = statistics.median(numbers)
                print(f"  {line:30} {middle:8.3f} {min(numbers):8.3f} {max(numbers):8.3f}")
            print(f"  {title + ', ratio of the least':30} {min(values) / min(least):8.3f}")


def rows(options: argparse.Namespace) -> list[Row]:
    """Return the rows of this part for `python -m benchmarks`."""
    slices, rounds = (200, 7) if options.full else (40, 5)
    found = []
    for kind in KINDS:
        times = measure(kind, 512, slices, rounds)
        wall = {title: [one[0] for one in pairs] for title, pairs in times.items()}
        found += rows_of(f"conversion, {kind}", wall, "floor")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure in turns and print the ratios."""
    parser = argparse.ArgumentParser(description="Ratio of the converters to their floor.")
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []], help="default: all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--slices", type=int, default=200)
    options = parser.parse_args(arguments)
    for kind in options.kinds or KINDS:
        report(kind, measure(kind, options.size, options.slices, options.rounds))


if __name__ == "__main__":
    main()

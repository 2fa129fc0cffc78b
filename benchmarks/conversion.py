"""How close the converter of Pancreas-CT comes to the floor of reading and writing.

    python benchmarks/conversion.py --rounds 7 --size 512 --slices 200

The floor only reads the DICOM files with pydicom, unpacks the label with isal, and writes both
arrays with np.save, in the order in which they come: no grouping, ordering, checks, proof of the
label's orientation, hashes or manifest. Both run in this process, in turns, on one phantom scan
that is made on the fly. The converter hashes in threads beside its reading and writing; so its wall
time depends on idle cores, and where other work disturbs, the least of the rounds says most. The
time of the processor counts all threads, and with them the SHA-256 of the sources and arrays,
which is most of the difference.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom
from isal import igzip

from data_prep.convert import convert_one
from data_prep.labels_archive import find_labels
from data_prep.pancreas_ct import LABEL, find_scans, pair, read_case
from data_prep.phantom import DESCRIPTION, make_phantom
from medseg_reg.data.store_writer import CaseSource, StoreWriter


def floor(source: CaseSource, out: Path) -> None:
    """Read, decode and write, and nothing else."""
    out.mkdir()
    *files, label = source.files
    image = np.stack([pydicom.dcmread(file).pixel_array for file in files])
    content = igzip.decompress(label.read_bytes())
    header = nibabel.Nifti1Header(content[:348])
    shape = header.get_data_shape()
    mask = np.frombuffer(content, header.get_data_dtype(), offset=header.get_data_offset())
    np.save(out / "image.npy", image)
    np.save(out / "mask.npy", mask.reshape(shape, order="F").T)


def conversion(source: CaseSource, out: Path) -> None:
    """Read, check, prove, hash and write one case as the converter does."""
    writer = StoreWriter(out, DESCRIPTION, {})
    writer.begin()
    convert_one(source, read_case, writer)


def seconds(
    task: Callable[[CaseSource, Path], None], source: CaseSource, folder: Path
) -> tuple[float, float]:
    """Return the wall and processor time of a task; what it writes is thrown away afterwards."""
    start, start_cpu = time.perf_counter(), time.process_time()
    task(source, folder / "out")
    elapsed = time.perf_counter() - start, time.process_time() - start_cpu
    shutil.rmtree(folder / "out", ignore_errors=True)
    shutil.rmtree(folder / ".out.partial", ignore_errors=True)
    return elapsed


def main() -> None:
    """Measure in turns and print the ratio."""
    parser = argparse.ArgumentParser(description="Ratio of the converter to its floor.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--slices", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        phantom = folder / "phantom"
        make_phantom(phantom, cases=1, size=options.size, slices=options.slices, labels="gz")
        (source,) = pair(find_scans(phantom), find_labels(phantom, LABEL), duplicates=False)
        rounds = [
            (seconds(floor, source, folder), seconds(conversion, source, folder))
            for _ in range(options.rounds + 1)
        ][1:]  # the first round warms the page cache and imports
    for kind, clock in enumerate(("wall", "processor")):
        least = [one[kind] for one, _ in rounds]
        ours = [one[kind] for _, one in rounds]
        print(f"{clock:18} {'median':>8} {'min':>8} {'max':>8}")
        for title, values in (
            ("floor, s", least),
            ("converter, s", ours),
            ("ratio of a round", [b / a for a, b in zip(least, ours, strict=True)]),
        ):
            middle = statistics.median(values)
            print(f"{title:18} {middle:8.3f} {min(values):8.3f} {max(values):8.3f}")
        print(f"{'ratio of the least':18} {min(ours) / min(least):8.3f}\n")


if __name__ == "__main__":
    main()

"""The memory of a prediction grows with the source and with 8-bit labels, not with the maps.

Measured are a volume and one four times as large, so that what does not grow is left out.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from torch import nn

from medseg_reg.data.preprocessing import ImageSpec
from medseg_reg.engine.run_directory import DataFacts
from medseg_reg.inference.ensemble import Ensemble
from medseg_reg.inference.inputs import Wanted, find_inputs
from medseg_reg.inference.predictor import Predictor
from medseg_reg.io import nifti_writer
from medseg_reg.io.dicom import list_files, read_series
from medseg_reg.predict import _predict
from tests.io.conftest import slice_dataset

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure memory"
)

SIZE, SLICES = 96, {"small": 200, "large": 800}
GROWN = SIZE * SIZE * 600
CLASSES = ("background", "one", "two")


class Pixels(nn.Module):
    """Classes by the value of a pixel, and dropout on them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop = nn.Conv2d(1, 3, 1), nn.Dropout2d(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.first(x)) * 5


def facts(plane: str) -> DataFacts:
    return DataFacts(
        name="x", classes=CLASSES, channels=1, unit="HU", modality="CT", citation="",
        licence="", manifest_sha256="", conversion={"plane": plane},
    )  # fmt: skip


def peak_of(task: Callable[[], None]) -> float:
    """Return by how many bytes the memory of this process grows at most during a task."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            before = _memory("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            task()
            os.write(writer, str(_memory("VmHWM") - before).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as answer:
        grown = answer.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return float(grown)


def _memory(word: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().split("\n") if x.startswith(word))
    return int(line.split()[1]) * 1024


def write_scan(path: Path, slices: int, plane: str, dtype: str = "int16") -> Path:
    """Write noise with this many slices of a plane."""
    shape = [SIZE] * 3
    shape[("sagittal", "coronal", "axial").index(plane)] = slices
    values = np.random.default_rng(0).integers(-200, 200, shape, dtype=np.int16)
    if dtype == "float32":
        values = values.astype(dtype) + np.float32(0.25)  # no whole numbers
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
    return path


def write_series(folder: Path, slices: int) -> Path:
    """Write noise as a CT series."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(slices):
        pixels = rng.integers(-200, 200, (SIZE, SIZE), dtype=np.int16)
        one = slice_dataset(pixels, number, StudyInstanceUID="1.2.7")
        one.save_as(folder / f"{number}.dcm", enforce_file_format=True)
    return folder


def predict_into(
    scan: Path,
    output: Path,
    plane: str,
    maps: bool,
    spec: ImageSpec = ImageSpec(window=(-200, 200)),  # noqa: B008
) -> Callable[[], None]:
    torch.manual_seed(0)
    predictor = Predictor(Pixels(), spec, 1, 8, "cpu", draws=2 if maps else 0)
    ensemble = Ensemble([predictor], CLASSES)

    def task() -> None:
        names = ensemble.map_names(maps, maps)
        (one,) = find_inputs(scan, Wanted(output, maps=names), facts(plane))
        _predict(one, ensemble, names, alone=True)

    return task


@pytest.mark.parametrize(("plane", "maps"), [("axial", False), ("axial", True), ("sagittal", True)])
def test_only_source_and_labels_are_held(tmp_path, plane, maps, monkeypatch):
    monkeypatch.setattr(nifti_writer, "TURNED_BYTES", 1 << 20)
    peaks = {}
    for name, slices in SLICES.items():
        scan = write_scan(tmp_path / f"{name}.nii.gz", slices, plane)
        peaks[name] = peak_of(predict_into(scan, tmp_path / name / "x.nii.gz", plane, maps))
    written = [path.stat().st_size for path in (tmp_path / "large").glob("*_*.nii")]
    assert len(written) == (4 if maps else 0)
    # Two bytes a voxel of the source, one of the labels, and a little for what may come between;
    # the maps take sixteen.
    grown = (peaks["large"] - peaks["small"]) / GROWN
    assert grown < 5, f"{grown:.1f} bytes a voxel"


def test_percentiles_of_float32_need_no_second_volume(tmp_path):
    peaks, counts = {}, {"small": 100, "large": 400}
    for name, slices in counts.items():
        scan = write_scan(tmp_path / f"{name}.nii.gz", slices, "axial", "float32")
        spec, output = ImageSpec(percentiles=(1, 99)), tmp_path / name / "x.nii.gz"
        peaks[name] = peak_of(predict_into(scan, output, "axial", False, spec))
    # Four bytes a voxel of the source, one of the labels; sorted, it took eleven and more.
    grown = (peaks["large"] - peaks["small"]) / (300 * SIZE * SIZE)
    assert grown < 7, f"{grown:.1f} bytes a voxel"


def test_a_series_is_held_once_while_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "SIZE", 256)
    peaks, counts = {}, {"small": 20, "large": 80}
    for name, slices in counts.items():
        files = list_files(write_series(tmp_path / name, slices))
        peaks[name] = peak_of(lambda files=files: read_series(files, where=tmp_path))
    grown = (peaks["large"] - peaks["small"]) / (60 * 256 * 256)
    assert grown < 3, f"{grown:.1f} bytes a voxel"


@pytest.mark.slow
def test_a_dicom_seg_of_a_series_is_written_in_little_memory(tmp_path):
    pytest.importorskip("highdicom")
    peaks, counts = {}, {"small": 100, "large": 400}
    for name, slices in counts.items():
        folder = write_series(tmp_path / name, slices)
        peaks[name] = peak_of(predict_into(folder, tmp_path / f"{name}.dcm", "axial", False))
    # Two bytes a voxel of the source, one of the labels. The rest are tags of each slice and of the
    # frames on it, about 30 kB a slice: three bytes a voxel in small slices as these.
    grown = (peaks["large"] - peaks["small"]) / (300 * SIZE * SIZE)
    assert grown < 9, f"{grown:.1f} bytes a voxel"


def test_the_measure_sees_what_is_held():
    # As many bytes as the maps take.
    assert peak_of(lambda: np.ones(16 * GROWN, np.uint8).sum()) > 12 * GROWN

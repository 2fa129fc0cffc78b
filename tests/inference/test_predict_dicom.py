"""A DICOM series in; a NIfTI volume and a DICOM SEG out that lie on it to the voxel."""

from __future__ import annotations

from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
import torch
from torch import nn

from medseg_reg.errors import MedsegError
from medseg_reg.io.dicom import DicomVolume, list_files, read_series
from medseg_reg.predict import main as predict
from tests.inference.made_runs import NOISY, make_run
from tests.io.test_dicom_seg import ORIENTATIONS, by_positions, instances_of, phantom, turned
from tests.stores import make_store

__all__ = ["phantom"]  # the fixture

CLASSES = ("background", "pancreas", "liver")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    store = make_store(folder / "store", dtype="int16", size=32, slices=1, classes=CLASSES)
    return make_run(folder / "run", store, data__image={"window": [-300, 300]}, **NOISY)


@pytest.fixture(autouse=True)
def thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that tells the classes by the value of a pixel, so that labels show the image."""
    network = nn.Conv2d(1, 3, 1)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([0.0, 10, 20]).view(3, 1, 1, 1))
        network.bias.copy_(torch.tensor([0.0, -5, -11]))
    monkeypatch.setattr("medseg_reg.inference.ensemble.load_run_network", lambda run: network)


def predicted(run: Path, folder: Path, output: Path, *options: str) -> None:
    paths = ["--run", run, "--input", folder, "--output", output, "--device", "cpu", *options]
    predict([str(one) for one in paths])


def both(run: Path, folder: Path, out: Path) -> tuple[DicomVolume, np.ndarray]:
    """Predict in both formats, make sure that they say the same, and return the labels."""
    volume = read_series(list_files(folder), where=folder)
    predicted(run, folder, out / "x.nii.gz")
    predicted(run, folder, out / "x.dcm")
    image = nibabel.load(out / "x.nii.gz")
    np.testing.assert_allclose(image.affine, volume.affine, atol=1e-4)
    labels = np.asarray(image.dataobj)
    assert labels.shape == volume.array.shape
    np.testing.assert_array_equal(by_positions(out / "x.dcm", volume), labels)
    seg = highdicom.seg.segread(out / "x.dcm")
    found = seg.get_pixels_by_source_instance(
        instances_of(volume), combine_segments=True, assert_missing_frames_are_empty=True
    )
    np.testing.assert_array_equal(found.transpose(2, 1, 0), labels)
    assert set(np.unique(labels)) == {0, 1, 2}
    return volume, labels


def test_the_phantom_in_four_orientations(run, phantom, tmp_path):
    in_order = []
    for number, how in enumerate(ORIENTATIONS):
        folder = turned(phantom, tmp_path / f"in{number}", how)
        volume, labels = both(run, folder, tmp_path / f"out{number}")
        in_order.append(volume.geometry("axial").from_source(labels))
    # The anatomy lies where it was, so the labels do.
    assert all(np.array_equal(in_order[0], other) for other in in_order[1:])


@pytest.mark.parametrize(
    ("dataset", "folder"),
    [
        ("totalsegmentator_ct", "example_ct_dicom"),
        ("mirp_sts001_ct_dicom_rtstruct", "dicom/image"),
    ],
)
def test_real_series(run, shared_data, tmp_path, dataset, folder):
    both(run, shared_data(dataset) / folder, tmp_path)


def test_a_folder_gets_a_file_named_after_the_series(run, phantom, tmp_path, capsys):
    predicted(run, phantom, tmp_path / "out", "--format", "seg", "--uncertainty")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["series.dcm", "series_entropy.nii"]
    seg = pydicom.dcmread(tmp_path / "out" / "series.dcm")
    assert [one.SegmentLabel for one in seg.SegmentSequence] == list(CLASSES[1:])
    assert (seg.Manufacturer, seg.ManufacturerModelName) == ("medseg_reg", "tiny")
    assert len(seg.DeviceSerialNumber) == 12


def test_what_is_made_up_is_told(run, shared_data, tmp_path, capsys):
    source = shared_data("totalsegmentator_ct") / "example_ct_dicom"
    predicted(run, source, tmp_path / "x.dcm")
    assert (
        "note: example_ct_dicom: the series states no StudyInstanceUID" in capsys.readouterr().out
    )


def test_a_series_that_cannot_be_referred_to_is_refused_before_the_prediction(
    run, phantom, tmp_path, monkeypatch
):
    (tmp_path / "in").mkdir()
    for path in phantom.iterdir():
        dataset = pydicom.dcmread(path)
        del dataset.SOPInstanceUID
        del dataset.file_meta.MediaStorageSOPInstanceUID
        dataset.save_as(tmp_path / "in" / path.name, enforce_file_format=False)
    monkeypatch.setattr("medseg_reg.inference.ensemble.Ensemble.parts", None)
    with pytest.raises(MedsegError, match="has no SOPInstanceUID"):
        predicted(run, tmp_path / "in", tmp_path / "out" / "x.dcm")
    assert list((tmp_path / "out").iterdir()) == []

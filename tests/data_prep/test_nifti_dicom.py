"""A DICOM series with a label in NIfTI becomes slices of the series, however the label lies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from nibabel import orientations

from data_prep.nifti import main
from data_prep.phantom_anatomy import phantom_volume
from medseg_reg.data.store import SliceStore
from medseg_reg.errors import MedsegError
from medseg_reg.io.dicom import list_files, read_series
from tests.data_prep.test_nifti_layouts import save


class TestDicom:
    @pytest.fixture
    def scan(self, phantom: Callable[..., Path]) -> Path:
        return next(phantom().rglob("PANCREAS_0001"))

    def run(self, scan: Path, out: Path, *more: str) -> SliceStore:
        main(["--dicom", str(scan), "--out", str(out), "--workers", "1", *more])
        return SliceStore(out)

    def save_label(self, scan: Path, path: Path, code: str) -> None:
        """Save the true mask on the grid of the series, in the orientation of a code."""
        series = read_series(list_files(scan), where=scan)
        mask = series.geometry().to_source(phantom_volume(3, 1, 48, 12)[1])
        image = nibabel.Nifti1Image(np.ascontiguousarray(mask), series.affine)
        turn = orientations.ornt_transform(
            orientations.io_orientation(series.affine), orientations.axcodes2ornt(code)
        )
        nibabel.save(image.as_reoriented(turn), path)

    @pytest.mark.parametrize("code", ["RAS", "LPS", "LAI", "PIR"])
    def test_a_label_in_any_orientation_lies_on_the_series(self, scan, tmp_path, code) -> None:
        path = tmp_path / "label.nii.gz"
        self.save_label(scan, path, code)
        store = self.run(scan, tmp_path / "s", "--label", str(path), "--classes", "pancreas")
        image, mask = phantom_volume(3, 1, 48, 12)
        (name,) = store.rows
        np.testing.assert_array_equal(store.image(name), image)
        np.testing.assert_array_equal(store.mask(name), mask)
        assert (name, store.manifest.description.unit) == ("PANCREAS_0001", "HU")

    @pytest.mark.parametrize(
        ("asked", "turn", "plane"),
        [
            ((), None, "axial"),
            ((), [1, 0, 0, 0, 0, -1], "coronal"),
            ((), [0, 1, 0, 0, 0, -1], "sagittal"),
            (("--plane", "axial"), [1, 0, 0, 0, 0, -1], "axial"),
        ],
    )
    def test_the_plane_is_stored(self, scan, tmp_path, asked, turn, plane) -> None:
        normal = np.cross(turn[:3], turn[3:]) if turn else None
        for index, path in enumerate(sorted(scan.rglob("*.dcm"))):
            if turn:
                one = pydicom.dcmread(path)
                one.ImageOrientationPatient = turn
                one.ImagePositionPatient = [float(v) for v in 3 * index * normal]
                one.save_as(path)
        # A localizer lies across the series and comes first.
        other = pydicom.dcmread(path)
        other.SeriesInstanceUID, other.SOPInstanceUID = "1.2.3", "1.2.3.4"
        other.ImageOrientationPatient = [0, 1, 0, 0, 0, -1] if plane != "sagittal" else turn
        other.save_as(scan / "000.dcm")
        series = read_series(list_files(scan), where=scan)
        mask = np.zeros(series.array.shape, np.uint8)
        mask[5:9, 5:9, 5:9] = 1
        nibabel.save(nibabel.Nifti1Image(mask, series.affine), tmp_path / "label.nii")
        options = ("--label", str(tmp_path / "label.nii"), "--classes", "x", *asked)
        store = self.run(scan, tmp_path / "s", *options)
        assert store.manifest.settings["plane"] == plane
        (row,) = store.manifest.cases
        assert row.geometry == series.geometry(plane)

    def test_a_label_of_another_scan_is_refused(self, scan, tmp_path) -> None:
        save(tmp_path / "label.nii", np.ones((48, 48, 12), np.uint8))
        with pytest.raises(MedsegError, match=r"label\.nii: does not lie on the grid of the ser"):
            self.run(scan, tmp_path / "s", "--label", str(tmp_path / "label.nii"), "--classes", "x")

    @pytest.mark.parametrize(
        "options",
        [("--label", "l.nii", "--rtstruct", "r.dcm", "--roi", "x"), (), ("--rtstruct", "r.dcm")],
    )
    def test_one_kind_of_label_is_needed(self, scan, tmp_path, options) -> None:
        with pytest.raises(SystemExit) as stop:
            self.run(scan, tmp_path / "s", *options)
        assert stop.value.code == 2

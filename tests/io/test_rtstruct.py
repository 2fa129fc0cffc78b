"""Contours become the voxels whose centres they enclose; what does not fit is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from isal import isal_zlib
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid

from medseg_reg.errors import MedsegError
from medseg_reg.io.dicom import DicomVolume, list_files, read_series
from medseg_reg.io.nifti import read_nifti
from medseg_reg.io.rtstruct import read_rtstruct, roi_names

FRAME = "1.2.4"
Contours = Sequence[Sequence[Sequence[float]]]


def square(low: float, high: float, height: float) -> list[list[float]]:
    """A square contour around (-10 + .7 i, -20 + .8 j) for columns and rows from low to high."""
    return [
        [-10 + 0.7 * x, -20 + 0.8 * y, height]
        for x, y in ((low, low), (high, low), (high, high), (low, high))
    ]


def write_rtstruct(
    path: Path,
    regions: dict[str, Contours],
    frame: str = FRAME,
    modality: str = "RTSTRUCT",
    kind: str = "CLOSED_PLANAR",
) -> Path:
    """Write contours, given as points in LPS millimetres."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = RTStructureSetStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.Modality = modality
    dataset.StructureSetROISequence, dataset.ROIContourSequence = [], []
    for number, (name, contours) in enumerate(regions.items(), start=1):
        entry, drawn = Dataset(), Dataset()
        entry.ROINumber, entry.ROIName = number, name
        entry.ReferencedFrameOfReferenceUID = frame
        drawn.ReferencedROINumber, drawn.ContourSequence = number, []
        for points in contours:
            item = Dataset()
            item.ContourGeometricType, item.NumberOfContourPoints = kind, len(points)
            item.ContourData = [f"{value:.6f}" for point in points for value in point]
            drawn.ContourSequence.append(item)
        dataset.StructureSetROISequence.append(entry)
        dataset.ROIContourSequence.append(drawn)
    dataset.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture
def volume(write_series: Callable[..., Path]) -> DicomVolume:
    folder = write_series()
    return read_series(list_files(folder), where=folder)


def test_a_contour_holds_the_centres_inside_it(volume: DicomVolume, tmp_path: Path) -> None:
    path = write_rtstruct(tmp_path / "rs.dcm", {"tumour": [square(1.5, 5.5, 7.5)]})
    mask = read_rtstruct(path, volume, "tumour")
    expected = np.zeros((12, 10, 6), np.uint8)
    expected[2:6, 2:6, 1] = 1
    np.testing.assert_array_equal(mask, expected)
    assert mask.dtype == np.uint8


def test_nested_contours_are_holes_and_islands(volume: DicomVolume, tmp_path: Path) -> None:
    contours = [square(0.5, 8.5, 5), square(1.5, 7.5, 5), square(3.5, 5.5, 5), square(0, 3, 10)]
    mask = read_rtstruct(write_rtstruct(tmp_path / "rs.dcm", {"ring": contours}), volume, "ring")
    expected = np.zeros((12, 10), np.uint8)
    expected[1:9, 1:9] = 1
    expected[2:8, 2:8] = 0
    expected[4:6, 4:6] = 1
    np.testing.assert_array_equal(mask[..., 0], expected)
    assert mask[..., 1].sum() == 0
    assert mask[..., 2].sum() > 0


def test_a_contour_that_leaves_the_image_is_cut(volume: DicomVolume, tmp_path: Path) -> None:
    path = write_rtstruct(tmp_path / "rs.dcm", {"r": [square(-5.5, 1.5, 5)]})
    mask = read_rtstruct(path, volume, "r")
    assert mask[:2, :2, 0].all()
    assert mask.sum() == 4


def test_regions_are_told_apart_by_name(volume: DicomVolume, tmp_path: Path) -> None:
    regions = {"a": [square(0.5, 2.5, 5)], "b": [square(4.5, 7.5, 5)]}
    path = write_rtstruct(tmp_path / "rs.dcm", regions)
    assert roi_names(path) == ["a", "b"]
    assert [int(read_rtstruct(path, volume, name).sum()) for name in regions] == [4, 9]


class TestRefused:
    def message(self, volume: DicomVolume, path: Path, roi: str = "GTV") -> str:
        with pytest.raises(MedsegError) as error:
            read_rtstruct(path, volume, roi)
        assert len(str(error.value).splitlines()) <= 3
        assert path.name in str(error.value)
        return str(error.value)

    def test_a_wrong_name_lists_the_names(self, volume: DicomVolume, tmp_path: Path) -> None:
        regions = {"GTV_Mass": [square(1, 5, 5)], "Lung": [square(1, 5, 5)]}
        text = self.message(volume, write_rtstruct(tmp_path / "rs.dcm", regions), "GTV_mass")
        assert "no region 'GTV_mass'. Did you mean 'GTV_Mass'?" in text
        assert "The regions are GTV_Mass, Lung." in text

    @pytest.mark.parametrize(
        ("height", "told"), [(6.0, "slice 0.40 of 0 to 5"), (30.0, "slice 10.00"), (2.5, "-1.00")]
    )
    def test_a_contour_off_the_slices(self, volume, tmp_path: Path, height, told) -> None:
        path = write_rtstruct(tmp_path / "rs.dcm", {"GTV": [square(1, 5, height)]})
        text = self.message(volume, path)
        assert "contour 1 of 'GTV' lies at" in text
        assert told in text

    def test_a_contour_that_is_not_flat_on_a_slice(self, volume, tmp_path: Path) -> None:
        points = square(1, 5, 5)
        points[0][2] = 7.5
        path = write_rtstruct(tmp_path / "rs.dcm", {"GTV": [points]})
        assert "not on a slice" in self.message(volume, path)

    def test_another_frame_of_reference(self, volume, tmp_path: Path) -> None:
        path = write_rtstruct(tmp_path / "rs.dcm", {"GTV": [square(1, 5, 5)]}, frame="1.9")
        assert "frame of reference 1.9, the series to 1.2.4" in self.message(volume, path)

    def test_a_region_without_a_closed_contour(self, volume, tmp_path: Path) -> None:
        path = write_rtstruct(tmp_path / "rs.dcm", {"GTV": [square(1, 5, 5)]}, kind="POINT")
        assert "no closed contour" in self.message(volume, path)

    def test_a_contour_that_holds_no_centre(self, volume, tmp_path: Path) -> None:
        path = write_rtstruct(tmp_path / "rs.dcm", {"GTV": [square(1.2, 1.8, 5)]})
        assert "hold no voxel" in self.message(volume, path)

    def test_contours_of_too_few_points(self, volume, tmp_path: Path) -> None:
        path = write_rtstruct(tmp_path / "rs.dcm", {"GTV": [square(1, 5, 5)[:2]]})
        assert "damaged: 6 numbers" in self.message(volume, path)

    @pytest.mark.parametrize("bad", [b"nan      ", b"inf      ", b"1e999    ", b"x        "])
    def test_a_point_that_is_no_number(self, volume, tmp_path: Path, patch, bad) -> None:
        path = write_rtstruct(tmp_path / "rs.dcm", {"GTV": [square(1, 5, 5)]})
        patch(path, b"-9.300000", bad)
        assert "contour 1 of 'GTV' is damaged" in self.message(volume, path)

    def test_another_kind_of_dicom_file(self, volume, tmp_path: Path) -> None:
        path = write_rtstruct(tmp_path / "rs.dcm", {}, modality="RTPLAN")
        assert "is not an RTSTRUCT (modality RTPLAN)" in self.message(volume, path)

    @pytest.mark.parametrize("content", [b"", b"text" * 99, b"\0" * 128 + b"DICM" + b"\xff" * 99])
    def test_garbage(self, volume, tmp_path: Path, content) -> None:
        (tmp_path / "rs.dcm").write_bytes(content)
        assert "is not" in self.message(volume, tmp_path / "rs.dcm")

    @pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
    def test_no_truncation_raises_anything_but_our_error(self, volume, tmp_path: Path) -> None:
        regions = {"GTV": [square(1, 5, 5)], "Lung": [square(1, 5, 7.5)]}
        path = write_rtstruct(tmp_path / "rs.dcm", regions)
        whole = path.read_bytes()
        for keep in range(0, len(whole) - 1, 7):
            path.write_bytes(whole[:keep])
            assert "rs.dcm" in self.message(volume, path, "Lung")


class TestReal:
    """A sarcoma whose contours and image are published as DICOM and as NIfTI."""

    @pytest.fixture
    def root(self, shared_data: Callable[[str], Path]) -> Path:
        return shared_data("mirp_sts001_ct_dicom_rtstruct")

    @pytest.fixture
    def ct(self, root: Path) -> DicomVolume:
        return read_series(list_files(root / "dicom/image"), where=root)

    def test_the_image_equals_its_nifti(self, root: Path, ct: DicomVolume) -> None:
        nifti = read_nifti(root / "nifti/image/image.nii.gz")
        np.testing.assert_allclose(ct.affine, nifti.affine, atol=1e-4)
        assert np.abs(ct.array - nifti.array).max() <= 0.004

    def test_the_contours_equal_the_published_mask(self, root: Path, ct: DicomVolume) -> None:
        """Expected: Dice 1, not one voxel differs, on the slices that the mask file holds."""
        mask = read_rtstruct(root / "dicom/mask/RS.dcm", ct, "GTV_Mass_CT")
        # Some copies of the file end after 20 of the 59 slices; these are compared then.
        content = isal_zlib.decompressobj(31).decompress(
            (root / "nifti/mask/mask.nii.gz").read_bytes()
        )
        columns, rows, slices = mask.shape
        there = min(slices, (len(content) - 352) // (columns * rows))
        truth = np.frombuffer(content, np.uint8, columns * rows * there, 352)
        truth = truth.reshape((columns, rows, there), order="F")
        assert truth.sum() >= 16_215
        np.testing.assert_array_equal(mask[..., :there], truth)
        assert mask.sum() == 117_145
        assert np.flatnonzero(mask.any(axis=(0, 1))).tolist() == list(range(12, 43))

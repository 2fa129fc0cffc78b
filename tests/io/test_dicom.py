"""A DICOM series is read by positions, in real values, or refused with the reason."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian, MRImageStorage

from medseg_reg.errors import MedsegError
from medseg_reg.io.dicom import DicomVolume, list_files, read_series
from medseg_reg.io.dicom_file import read_slice
from medseg_reg.io.geometry import geometry_of
from medseg_reg.io.nifti import read_nifti

MR: dict[str, Any] = {"SOPClassUID": MRImageStorage, "Modality": "MR"}
Write = Callable[..., Path]


def read(folder: Path, series: str | None = None) -> DicomVolume:
    return read_series(list_files(folder), where=folder, series=series)


def refused(folder: Path, series: str | None = None) -> str:
    """Return the message of the error, which must be short enough to be read."""
    with pytest.raises(MedsegError) as error:
        read(folder, series)
    assert 1 <= len(str(error.value).splitlines()) <= 3
    return str(error.value)


class TestGrid:
    def test_array_and_affine_are_those_of_the_patient(self, write_series: Write, ramp) -> None:
        volume = read(write_series())
        np.testing.assert_array_equal(volume.array, ramp.transpose(2, 1, 0))
        assert volume.array.dtype == np.int16
        # LPS (-10 + .7 column, -20 + .8 row, 5 + 2.5 slice); RAS turns x and y round.
        np.testing.assert_allclose(
            volume.affine, [[-0.7, 0, 0, 10], [0, -0.8, 0, 20], [0, 0, 2.5, 5], [0, 0, 0, 1]]
        )
        assert (volume.plane, volume.modality, volume.notes) == ("axial", "CT", ())

    def test_slices_are_ordered_by_position_not_by_name_or_number(
        self, write_series: Write, ramp
    ) -> None:
        folder = write_series(
            name=lambda index: f"{(index * 5 + 2) % 6}.dcm",
            each=lambda index: {"InstanceNumber": 7 - index},
        )
        volume = read(folder)
        np.testing.assert_array_equal(volume.array, ramp.transpose(2, 1, 0))
        assert [path.name for path in volume.files] == [f"{(i * 5 + 2) % 6}.dcm" for i in range(6)]

    @pytest.mark.parametrize("number", [None, 1], ids=["missing", "all equal"])
    def test_instance_numbers_are_not_needed(self, write_series: Write, ramp, number) -> None:
        tags = {} if number is None else {"InstanceNumber": number}
        np.testing.assert_array_equal(read(write_series(**tags)).array, ramp.transpose(2, 1, 0))

    @pytest.mark.parametrize(
        ("orientation", "step", "plane"),
        [
            ([1, 0, 0, 0, 0, -1], (0, 2.5, 0), "coronal"),
            ([0, 1, 0, 0, 0, -1], (2.5, 0, 0), "sagittal"),
            ([1, 0, 0, 0, 0.96, 0.28], (0, -0.7, 2.4), "axial"),
        ],
        ids=["coronal", "sagittal", "oblique"],
    )
    def test_the_plane_is_that_of_the_slices(
        self, write_series: Write, orientation, step, plane
    ) -> None:
        folder = write_series(
            ImageOrientationPatient=orientation,
            each=lambda i: {"ImagePositionPatient": [round(i * s, 6) for s in step]},
        )
        volume = read(folder)
        assert volume.plane == plane
        # Index (1, 2, 3) and the DICOM formula must name one point.
        along, down = np.array(orientation, float).reshape(2, 3)
        centre = np.array(volume.files.index(volume.files[3]) * np.array(step))
        if np.cross(along, down) @ step < 0:
            centre = np.array(step) * 2  # the last written slice comes first
        lps = centre + 0.7 * along + 0.8 * 2 * down
        np.testing.assert_allclose((volume.affine @ [1, 2, 3, 1])[:3], lps * [-1, -1, 1], atol=1e-6)

    def test_positions_rounded_by_the_scanner_are_one_gap(self, write_series: Write) -> None:
        folder = write_series(each=lambda i: {"ImagePositionPatient": [0, 0, round(i * 0.7031, 2)]})
        assert read(folder).affine[2, 2] == pytest.approx(0.7031, abs=2e-3)

    def test_slice_thickness_does_not_decide_the_gap(self, write_series: Write) -> None:
        assert read(write_series(SliceThickness=99)).affine[2, 2] == 2.5


class TestValues:
    def test_slope_and_intercept_are_applied(self, write_series: Write, ramp) -> None:
        volume = read(write_series(RescaleSlope=2, RescaleIntercept=-5))
        np.testing.assert_array_equal(volume.array, (2 * ramp - 5).transpose(2, 1, 0))
        assert volume.array.dtype == np.int16

    def test_every_slice_has_its_own_slope(self, write_series: Write, ramp) -> None:
        volume = read(write_series(each=lambda i: {"RescaleSlope": 1 + i / 4}, **MR))
        factors = 1 + np.arange(6) / 4
        expected = (ramp * factors[:, None, None]).transpose(2, 1, 0)
        np.testing.assert_array_equal(volume.array, expected.astype(np.float32))
        assert volume.array.dtype == np.float32

    def test_unsigned_numbers_with_an_intercept_are_hu(self, write_series: Write, ramp) -> None:
        volume = read(write_series((ramp + 1024).astype(np.uint16), RescaleIntercept=-1024))
        np.testing.assert_array_equal(volume.array, ramp.transpose(2, 1, 0))

    def test_unsigned_numbers_beyond_int16_are_not_wrapped(self, write_series: Write, ramp) -> None:
        stored = (ramp.astype(np.int32) + 60000).astype(np.uint16)
        volume = read(write_series(stored, **MR))
        np.testing.assert_array_equal(volume.array, stored.transpose(2, 1, 0))

    def test_eight_bits_and_32_bits_are_read(self, write_series: Write, ramp) -> None:
        for dtype in (np.uint8, np.int32):
            stored = (ramp + 300).clip(0, 200).astype(dtype)
            volume = read(write_series(stored, folder=np.dtype(dtype).name, **MR))
            np.testing.assert_array_equal(volume.array, stored.transpose(2, 1, 0))

    @pytest.mark.parametrize("dtype", [np.int16, np.uint16])
    def test_bits_beyond_bits_stored_are_cut_off(self, write_series: Write, ramp, dtype) -> None:
        values = ramp if dtype == np.int16 else ramp + 300
        stored = ((values & 0x0FFF) | 0x5000).astype(np.uint16).view(dtype)
        volume = read(write_series(stored, BitsStored=12, HighBit=11))
        np.testing.assert_array_equal(volume.array, values.transpose(2, 1, 0))

    def test_what_is_below_air_in_ct_is_air(self, write_series: Write, ramp) -> None:
        volume = read(write_series(ramp - 1000))
        assert volume.array.min() == -1024
        inside = ramp.transpose(2, 1, 0) - 1000 >= -1024
        np.testing.assert_array_equal(
            volume.array[inside], (ramp.transpose(2, 1, 0) - 1000)[inside]
        )

    def test_padding_of_mr_becomes_zero(self, write_series: Write, ramp) -> None:
        tags = {"PixelPaddingValue": -300, **MR}
        array = read(write_series(**tags)).array
        assert (array[0, 0, 0], array[1, 0, 0]) == (0, -299)

    def test_padding_of_ct_above_all_tissue_becomes_air(self, write_series: Write, ramp) -> None:
        stored = ramp.copy()
        stored[0, 0, 0] = 4000
        array = read(write_series(stored, PixelPaddingValue=4000)).array
        assert (array[0, 0, 0], array[1, 0, 0]) == (-1024, -299)

    def test_padding_of_ct_declared_as_water_is_not_believed(
        self, write_series: Write, ramp
    ) -> None:
        array = read(write_series(PixelPaddingValue=0)).array
        np.testing.assert_array_equal(array, ramp.transpose(2, 1, 0))

    @pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
    def test_other_byte_orders_are_read(self, write_series: Write, ramp, syntax) -> None:
        stored = ramp.byteswap() if syntax == ExplicitVRBigEndian else ramp
        folder = write_series(stored, TransferSyntaxUID=syntax)
        np.testing.assert_array_equal(read(folder).array, ramp.transpose(2, 1, 0))


class TestFiles:
    def test_files_without_a_preamble_are_read(self, write_series: Write, ramp) -> None:
        folder = write_series()
        for path in folder.iterdir():
            path.write_bytes(path.read_bytes()[132:])
        np.testing.assert_array_equal(read(folder).array, ramp.transpose(2, 1, 0))

    def test_files_without_any_file_header_are_read(self, write_series: Write, ramp) -> None:
        folder = write_series()
        for path in folder.iterdir():
            dataset = pydicom.dcmread(path)
            del dataset.file_meta
            dataset.save_as(path, implicit_vr=True, little_endian=True, overwrite=True)
        np.testing.assert_array_equal(read(folder).array, ramp.transpose(2, 1, 0))

    def test_what_is_no_slice_is_left_out_and_noted(self, write_series: Write, ramp) -> None:
        folder = write_series()
        write_series(
            ramp[:2],
            name=lambda i: f"scout{i}.dcm",
            ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"],
            ImageOrientationPatient=[0, 1, 0, 0, 0, -1],
        )
        write_series(
            ramp[:1], name=lambda i: "dose", SOPClassUID="1.2.840.10008.5.1.4.1.1.88.67",
            Modality="SR",
        )  # fmt: skip
        write_series(ramp[:1], name=lambda i: "single", SeriesInstanceUID="9.9")
        (folder / "LICENSE").write_text("free")
        (folder / "empty").touch()
        (folder / ".DS_Store").write_bytes(b"\x08\x00\x05\x00 hidden")
        volume = read(folder)
        assert volume.array.shape == (12, 10, 6)
        assert volume.notes == (
            "left out: 1 x SR object",
            "left out: 2 x localizer",
            "left out: 2 x not DICOM",
            "left out: 1 x series 9.9 of 1 slice",
        )

    @pytest.mark.parametrize("content", [b"", b"\0" * 200, b"text" * 99])
    def test_a_folder_without_slices_says_what_is_there(self, tmp_path: Path, content) -> None:
        (tmp_path / "file").write_bytes(content)
        assert "holds no series of CT or MR slices (0 slices, 1 x not DICOM)" in refused(tmp_path)

    @pytest.mark.parametrize(("content", "found"), [(b"", "is empty"), (b"x" * 999, "holds no")])
    def test_a_damaged_slice_at_the_end_of_a_series_is_named(
        self, write_series: Write, content: bytes, found: str
    ) -> None:
        folder = write_series()
        last = sorted(folder.glob("*.dcm"))[-1]
        last.write_bytes(content)
        assert f"{last}: {found}" in refused(folder)

    def test_a_folder_that_is_missing_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(MedsegError, match="nowhere: is not a folder"):
            list_files(tmp_path / "nowhere")

    def test_garbage_behind_the_mark_of_dicom_is_named(self, write_series: Write) -> None:
        folder = write_series()
        (folder / "bad.dcm").write_bytes(b"\0" * 128 + b"DICM" + bytes(range(256)) * 4)
        assert "bad.dcm: " in refused(folder)

    @pytest.mark.parametrize("keep", [-1, -100, -241, 700, 400, 133])
    def test_a_truncated_file_is_named_and_never_left_out(
        self, write_series: Write, keep: int
    ) -> None:
        folder = write_series()
        path = folder / "005.dcm"  # the last slice: no gap would betray that it is missing
        path.write_bytes(path.read_bytes()[:keep])
        assert "005.dcm: " in refused(folder)

    @pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
    def test_wherever_a_file_is_cut_off_it_is_refused(self, write_series: Write) -> None:
        whole = (write_series() / "000.dcm").read_bytes()
        accepted = []
        for keep in range(132, len(whole), 3):
            try:
                one = read_slice(Path("cut.dcm"), whole[:keep])
                accepted.append((keep, one if isinstance(one, str) else one.values().shape))
            except MedsegError as error:
                assert str(error).startswith("cut.dcm: ")
        assert accepted == []

    def test_truncated_pixels_are_told_in_bytes(self, write_series: Write) -> None:
        folder = write_series()
        path = folder / "002.dcm"
        path.write_bytes(path.read_bytes()[:-40])
        text = refused(folder)
        assert "002.dcm: " in text
        assert "truncated" in text or "damaged" in text

    @pytest.mark.parametrize("class_uid", ["1.2.840.10008.5.1.4.1.1.2.1"])
    def test_multi_frame_images_are_refused_with_a_way_out(
        self, write_series: Write, class_uid
    ) -> None:
        assert "dcm2niix" in refused(write_series(SOPClassUID=class_uid))


class TestOneSeries:
    def two(self, write_series: Write) -> Path:
        write_series()
        return write_series(
            name=lambda i: f"b{i}", SeriesInstanceUID="1.2.9", SeriesDescription="late"
        )

    def test_several_series_are_listed(self, write_series: Write) -> None:
        text = refused(self.two(write_series))
        assert "2 series: 1.2.3 (6 slices 'test'), 1.2.9 (6 slices 'late')" in text
        assert "--series" in text

    def test_one_of_several_can_be_chosen(self, write_series: Write) -> None:
        assert read(self.two(write_series), series="1.2.9").series == "1.2.9"

    def test_a_series_that_is_not_there_lists_those_that_are(self, write_series: Write) -> None:
        assert "has no series 7. It has 1.2.3 (6" in refused(write_series(), series="7")

    def test_files_without_a_series_make_one(self, write_series: Write) -> None:
        assert read(write_series(SeriesInstanceUID=None)).array.shape == (12, 10, 6)


class TestRefusedGrid:
    def at(self, write_series: Write, heights: list[float]) -> str:
        return refused(write_series(each=lambda i: {"ImagePositionPatient": [0, 0, heights[i]]}))

    def test_two_slices_at_one_position(self, write_series: Write) -> None:
        text = self.at(write_series, [0, 3, 6, 6, 9, 12])
        assert "two slices at one position (6.000 mm)" in text
        assert "002.dcm" in text
        assert "003.dcm" in text

    @pytest.mark.parametrize(
        ("heights", "message"),
        [
            ([0, 3, 6, 12, 15, 18], "1 slice is missing between them (gap 6.000 mm, elsewhere 3"),
            ([0, 3, 6, 15, 18, 21], "2 slices are missing between"),
        ],
    )
    def test_missing_slices(self, write_series: Write, heights, message) -> None:
        text = self.at(write_series, heights)
        assert message in text
        assert "002.dcm and 003.dcm" in text

    def test_a_gap_that_changes(self, write_series: Write) -> None:
        text = self.at(write_series, [0, 4, 8, 12, 19, 26])
        assert "the slice gap changes: 7.000 mm, elsewhere 4.000 mm" in text

    def test_a_gap_that_grows_slowly_is_not_taken_for_rounding(self, write_series: Write) -> None:
        assert "gap changes" in self.at(write_series, [0, 1, 2.02, 3.06, 4.12, 5.2])

    def test_a_tilted_gantry_tells_its_angle(self, write_series: Write) -> None:
        slide = 2.5 * np.tan(np.deg2rad(18.5))
        folder = write_series(
            each=lambda i: {"ImagePositionPatient": [0, round(i * slide, 4), 2.5 * i]}
        )
        assert "gantry tilt of 18.5 degrees?" in refused(folder)

    @pytest.mark.parametrize(
        ("tags", "message"),
        [
            ({"ImageOrientationPatient": [0, 1, 0, 1, 0, 0]}, "004.dcm: its orientation is"),
            ({"PixelSpacing": [0.8, 0.9]}, "004.dcm: its PixelSpacing is (0.8, 0.9)"),
            (MR, "004.dcm: is MR, 000.dcm CT"),
        ],
    )
    def test_slices_that_differ(self, write_series: Write, tags, message) -> None:
        assert message in refused(write_series(each=lambda i: tags if i == 4 else {}))

    def test_a_slice_of_another_size(self, write_series: Write, ramp) -> None:
        folder = write_series()
        write_series(
            ramp[:1, :5], name=lambda i: "zz.dcm",
            each=lambda i: {"ImagePositionPatient": [-10, -20, 20]},
        )  # fmt: skip
        assert "zz.dcm: its size is (5, 12), that of 000.dcm is (10, 12)" in refused(folder)

    @pytest.mark.parametrize(
        "orientation", [[1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 2, 0], [0, 0, 0, 0, 0, 0]]
    )
    def test_directions_that_are_no_right_angle(self, write_series: Write, orientation) -> None:
        text = refused(write_series(ImageOrientationPatient=orientation))
        assert "ImageOrientationPatient" in text
        assert "right angles" in text

    @pytest.mark.parametrize("spacing", [[0, 0.7], [0.8, -0.7]])
    def test_a_pixel_spacing_that_is_no_length(self, write_series: Write, spacing) -> None:
        assert "PixelSpacing is" in refused(write_series(PixelSpacing=spacing))


class TestReal:
    @pytest.fixture
    def ct(self, shared_data: Callable[[str], Path]) -> Path:
        return shared_data("totalsegmentator_ct")

    def test_a_label_paired_by_affine_lies_on_the_liver(self, ct: Path) -> None:
        volume = read(ct / "example_ct_dicom")
        label = read_nifti(ct / "example_seg_dicom.nii.gz")
        image = volume.geometry().from_source(volume.array)
        own = geometry_of(label.affine, label.array.shape)
        liver = image[own.from_source(label.array) == 5].astype(float)
        assert liver.mean() == pytest.approx(89, abs=2)
        assert liver.std() == pytest.approx(22, abs=1)
        # Paired by array index the label lies upside down: the numbers are no liver.
        assert volume.array[label.array == 5].astype(float).mean() < 0

    def test_a_truncated_compressed_slice_is_refused(self, ct: Path, tmp_path: Path) -> None:
        files = sorted((ct / "example_ct_dicom").iterdir())[:3]
        for path in files:
            shutil.copyfile(path, tmp_path / path.name)
        bad = tmp_path / files[1].name
        bad.write_bytes(bad.read_bytes()[: bad.stat().st_size // 2])
        assert f"{bad.name}: " in refused(tmp_path)

    def test_an_mr_series_is_read(self, shared_data: Callable[[str], Path]) -> None:
        volume = read(shared_data("msd_hippocampus") / "dicom_Study1_13_HCropVolume")
        assert volume.array.shape == (35, 51, 32)
        assert (volume.modality, volume.plane) == ("MR", "axial")
        np.testing.assert_allclose(np.diag(volume.affine), [-1, -1, 1, 1])

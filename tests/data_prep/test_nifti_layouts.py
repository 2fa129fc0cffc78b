"""Volumes of any layout, orientation and type become the same slices, or are refused."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from nibabel import orientations

from data_prep.nifti import main
from medseg_reg.data.store import SliceStore
from medseg_reg.data.verify import verify
from medseg_reg.errors import MedsegError
from medseg_reg.io.filters import prepared

SHAPE = (9, 8, 6)
AFFINE = np.array([[0.7, 0, 0, -5], [0, 0.9, 0, 3], [0, 0, 2.5, 11], [0, 0, 0, 1]])
DECATHLON = {
    "name": "toy", "modality": {"0": "CT"}, "licence": "CC0", "reference": "nobody",
    "labels": {"0": "background", "1": "organ", "2": "tumour"},
}  # fmt: skip
CODES = [
    "".join(pair[flip] for pair, flip in zip(order, flips, strict=True))
    for order in itertools.permutations(("RL", "AP", "SI"))
    for flips in itertools.product((0, 1), repeat=3)
]


def volume(dtype: str = "int16") -> np.ndarray:
    """An array in RAS whose every voxel is different."""
    return (np.arange(np.prod(SHAPE)).reshape(SHAPE) - 100).astype(dtype)


def label() -> np.ndarray:
    array = np.zeros(SHAPE, np.uint8)
    array[1:5, 2:6, 1:4] = 1
    array[2:4, 3:5, 2] = 2
    return array


def save(path: Path, array: np.ndarray, code: str = "RAS", affine: np.ndarray = AFFINE) -> None:
    """Save an array that is given in RAS with its axes in the order of a code."""
    path.parent.mkdir(parents=True, exist_ok=True)
    turn = orientations.ornt_transform(
        orientations.axcodes2ornt("RAS"), orientations.axcodes2ornt(code)
    )
    nibabel.save(nibabel.Nifti1Image(array, affine).as_reoriented(turn), path)


def dataset(
    root: Path,
    images: dict[str, np.ndarray],
    about: dict[str, Any] | None = DECATHLON,
    labels: dict[str, np.ndarray] | None = None,
) -> Path:
    root.mkdir()
    for name, array in images.items():
        save(root / "imagesTr" / f"{name}.nii.gz", array)
    for name, array in (labels if labels is not None else {n: label() for n in images}).items():
        save(root / "labelsTr" / f"{name}.nii.gz", array)
    if about is not None:
        (root / "dataset.json").write_text(json.dumps(about))
    return root


def convert(source: Path, *more: str, out: str = "store") -> SliceStore:
    path = source.parent / out
    main(["--source", str(source), "--out", str(path), "--workers", "1", *more])
    return SliceStore(path)


def refused(source: Path, *more: str) -> str:
    with pytest.raises(MedsegError) as error:
        convert(source, *more)
    assert 1 <= len(str(error.value).splitlines()) <= 3
    assert not (source.parent / "store").exists()
    return str(error.value)


def axial(array: np.ndarray) -> np.ndarray:
    """RAS to slices from feet to head, rows from front to back, columns from right to left."""
    return array[::-1, ::-1].transpose(2, 1, 0)


class TestOrder:
    def test_all_48_orientations_give_the_same_case(self, tmp_path: Path) -> None:
        assert len(set(CODES)) == 48
        source = dataset(tmp_path / "task", {})
        for code in CODES:
            save(source / f"imagesTr/{code}.nii.gz", volume(), code)
            save(source / f"labelsTr/{code}.nii.gz", label(), code)
        store = convert(source)
        assert len(store.rows) == 48
        for code in CODES:
            np.testing.assert_array_equal(store.image(code), axial(volume()))
            np.testing.assert_array_equal(store.mask(code), axial(label()))
            geometry = store.row(code).geometry
            assert geometry.spacing == pytest.approx((2.5, 0.9, 0.7))
            on_disk = np.asarray(nibabel.load(source / f"labelsTr/{code}.nii.gz").dataobj)
            np.testing.assert_array_equal(geometry.to_source(store.mask(code)), on_disk)

    @pytest.mark.parametrize(
        ("plane", "expected", "spacing"),
        [
            ("axial", axial(volume()), (2.5, 0.9, 0.7)),
            ("coronal", volume()[::-1, ::-1, ::-1].transpose(1, 2, 0), (0.9, 2.5, 0.7)),
            ("sagittal", volume()[::-1, ::-1, ::-1].transpose(0, 2, 1), (0.7, 2.5, 0.9)),
        ],
    )
    def test_a_slice_shows_the_plane_asked_for(self, tmp_path, plane, expected, spacing) -> None:
        store = convert(dataset(tmp_path / "task", {"a": volume()}), "--plane", plane)
        np.testing.assert_array_equal(store.image("a"), expected)
        assert store.row("a").geometry.spacing == pytest.approx(spacing)

    def test_image_and_label_must_have_the_axes_of_one_grid(self, tmp_path: Path) -> None:
        source = dataset(tmp_path / "task", {"a": volume()})
        save(source / "labelsTr/a.nii.gz", label(), "LAS")
        assert "labelsTr/a.nii.gz: does not lie on the grid of a.nii.gz" in refused(source)

    @pytest.mark.parametrize(
        ("shape", "affine", "told"),
        [
            ((8, 8, 6), AFFINE, "it is 8x8x6"),
            (SHAPE, AFFINE + 0.2 * np.eye(4, k=3), "-4.800"),
            (SHAPE, AFFINE @ np.diag([1, 1, 1.1, 1]), "2.750"),
        ],
        ids=["shape", "origin", "spacing"],
    )
    def test_a_label_on_another_grid_names_both(self, tmp_path, shape, affine, told) -> None:
        source = dataset(tmp_path / "task", {"a": volume()})
        save(source / "labelsTr/a.nii.gz", np.ones(shape, np.uint8), affine=affine)
        text = refused(source)
        assert "labelsTr/a.nii.gz: does not lie on the grid of a.nii.gz" in text
        assert told in text

    def test_rounding_of_headers_is_no_other_grid(self, tmp_path: Path) -> None:
        source = dataset(tmp_path / "task", {"a": volume()})
        save(source / "labelsTr/a.nii.gz", label(), affine=AFFINE + 1e-4)
        assert len(convert(source).rows) == 1


class TestTypes:
    @pytest.mark.parametrize(
        ("array", "dtype"),
        [
            (volume(), "int16"),
            (volume("float32"), "int16"),
            (volume("float64"), "int16"),
            (volume("float32") + 0.5, "float32"),
            ((volume() + 100).clip(0, 255).astype(np.uint8), "uint8"),
            ((volume() + 100).astype(np.uint16), "int16"),
            (volume("int32") * 1000, "float32"),
        ],
        ids=["int16", "whole", "whole64", "real", "uint8", "uint16", "int32"],
    )
    def test_the_narrowest_exact_type_is_stored(self, tmp_path: Path, array, dtype) -> None:
        store = convert(dataset(tmp_path / "task", {"a": array}))
        assert store.image("a").dtype == dtype
        np.testing.assert_array_equal(store.image("a"), axial(array))

    def test_rounding_of_64_bits_is_noted(self, tmp_path: Path) -> None:
        store = convert(dataset(tmp_path / "task", {"a": volume("float64") / 3}))
        assert store.row("a").notes == ("pixels of 64 bits were rounded to float32",)

    def test_labels_stored_as_real_numbers_are_read(self, tmp_path: Path) -> None:
        source = dataset(tmp_path / "task", {"a": volume()}, labels={"a": label().astype("f4")})
        np.testing.assert_array_equal(convert(source).mask("a"), axial(label()))

    def test_pixels_that_are_nan_are_refused(self, tmp_path: Path) -> None:
        array = volume("float32")
        array[0, 0, 0] = np.nan
        assert "imagesTr/a.nii.gz: 1 of 432" in refused(dataset(tmp_path / "task", {"a": array}))

    def test_labels_that_were_interpolated_are_refused(self, tmp_path: Path) -> None:
        source = dataset(tmp_path / "task", {"a": volume()}, labels={"a": label() * 0.5})
        assert "nearest neighbour" in refused(source)


class TestClasses:
    def test_names_come_from_the_decathlon_file(self, tmp_path: Path) -> None:
        store = convert(dataset(tmp_path / "task", {"a": volume()}))
        about = store.manifest.description
        assert store.classes == ("background", "organ", "tumour")
        assert (about.name, about.modality, about.unit) == ("toy", "CT", "HU")
        assert (about.licence, about.citation) == ("CC0", "nobody")
        assert verify(store) == []

    def test_names_come_from_the_nnunet_file(self, tmp_path: Path) -> None:
        about = {
            "channel_names": {"0": "MR"},
            "labels": {"background": 0, "tumour": 2, "organ": 1},
        }
        source = dataset(tmp_path / "task", {"a_0000": volume()}, about, {"a": label()})
        store = convert(source)
        assert store.classes == ("background", "organ", "tumour")
        assert store.manifest.description.unit == "as stored"

    def test_names_come_from_the_command_line(self, tmp_path: Path) -> None:
        source = dataset(tmp_path / "task", {"a": volume()}, about=None)
        assert convert(source, "--classes", "x", "y").classes == ("background", "x", "y")

    def test_without_names_the_option_is_told(self, tmp_path: Path) -> None:
        source = dataset(tmp_path / "task", {"a": volume()}, about=None)
        assert "--classes NAME" in refused(source)

    def test_a_value_without_a_name_is_refused(self, tmp_path: Path) -> None:
        source = dataset(tmp_path / "task", {"a": volume()})
        text = refused(source, "--classes", "organ")
        assert "case a: the mask holds the labels [0, 1, 2], but the declared classes are" in text

    @pytest.mark.parametrize(
        "labels", [{"0": "background"}, {"0": "b", "2": "x"}, {"b": 0, "x": [1, 2]}]
    )
    def test_numbers_with_gaps_are_refused(self, tmp_path: Path, labels) -> None:
        source = dataset(tmp_path / "task", {"a": volume()}, {**DECATHLON, "labels": labels})
        assert "dataset.json: labels are" in refused(source)

    @pytest.mark.parametrize("text", ["", "{", "[]", "3"])
    def test_a_damaged_description_is_named(self, tmp_path: Path, text) -> None:
        source = dataset(tmp_path / "task", {"a": volume()})
        (source / "dataset.json").write_text(text)
        assert "dataset.json: " in refused(source)


class TestChannels:
    BOTH = {**DECATHLON, "modality": {"0": "T1", "1": "T2"}}  # noqa: RUF012

    def test_channels_in_files_of_their_own(self, tmp_path: Path) -> None:
        images = {"a_0000": volume(), "a_0001": volume() * 2}
        store = convert(dataset(tmp_path / "task", images, self.BOTH, {"a": label()}))
        expected = np.stack([axial(volume()), axial(volume() * 2)], axis=-1)
        np.testing.assert_array_equal(store.image("a"), expected)
        assert store.mask("a").shape == store.image("a").shape[:3]

    def test_channels_in_one_file(self, tmp_path: Path) -> None:
        both = np.stack([volume(), volume() * 2], axis=-1)
        store = convert(dataset(tmp_path / "task", {"a": both}, self.BOTH))
        np.testing.assert_array_equal(store.image("a")[..., 1], axial(volume() * 2))

    def test_frames_are_not_taken_for_channels(self, tmp_path: Path) -> None:
        both = np.stack([volume(), volume()], axis=-1)
        assert "Split the frames" in refused(dataset(tmp_path / "task", {"a": both}))

    def test_a_missing_channel_is_told(self, tmp_path: Path) -> None:
        images = {"a_0000": volume(), "a_0002": volume()}
        source = dataset(tmp_path / "task", images, self.BOTH, {"a": label()})
        assert "case a: has the channels [0, 2], one is missing" in refused(source)

    def test_a_channel_that_is_declared_and_nowhere_there_is_told(self, tmp_path: Path) -> None:
        source = dataset(tmp_path / "task", {"a_0000": volume()}, self.BOTH, {"a": label()})
        message = refused(source)
        assert "case a has 1 channel, dataset.json declares 2" in message
        assert "a_0000.nii.gz" in message

    def test_cases_of_unequal_channels_are_told(self, tmp_path: Path) -> None:
        images = {"a_0000": volume(), "a_0001": volume(), "b_0000": volume()}
        source = dataset(tmp_path / "task", images, self.BOTH, {"a": label(), "b": label()})
        assert "case b: has 1 channels, others 2" in refused(source)

    def test_channels_on_different_grids_are_refused(self, tmp_path: Path) -> None:
        images = {"a_0000": volume(), "a_0001": volume()[1:]}
        source = dataset(tmp_path / "task", images, self.BOTH, {"a": label()})
        assert "a_0001.nii.gz: does not lie on the grid of a_0000.nii.gz" in refused(source)


class TestPairs:
    def test_what_does_not_pair_is_told_and_left_out(self, tmp_path: Path, capsys) -> None:
        source = dataset(tmp_path / "task", {"a": volume(), "b": volume()})
        (source / "labelsTr/b.nii.gz").rename(source / "labelsTr/c.nii.gz")
        (source / "imagesTr/._a.nii.gz").write_bytes(b"macOS")
        assert list(convert(source).rows) == ["a"]
        out = capsys.readouterr().out
        assert "labels without an image, left out: c\n" in out
        assert "images without a label, left out: b\n" in out

    def test_a_folder_of_another_layout_is_told(self, tmp_path: Path) -> None:
        (tmp_path / "task").mkdir()
        about = {**DECATHLON}
        (tmp_path / "task/dataset.json").write_text(json.dumps(about))
        assert "Expected imagesTr and labelsTr" in refused(tmp_path / "task")


class TestFilters:
    def test_erosion_and_edges_are_burnt_in(self, tmp_path: Path) -> None:
        source = dataset(tmp_path / "task", {"a": volume()})
        store = convert(source, "--erosion", "3", "--canny", "20", "60")
        expected = prepared(axial(volume()), 3, (20, 60), is_hu=True)
        assert store.image("a").dtype == np.uint8
        np.testing.assert_array_equal(store.image("a"), expected)
        assert (expected != prepared(axial(volume()), None, (20, 60), is_hu=True)).any()
        assert store.manifest.settings["erosion"] == 3

    @pytest.mark.parametrize(
        "option", [("--erosion", "0"), ("--canny", "60", "20"), ("--canny", "-1", "20")]
    )
    def test_settings_without_sense_are_refused(self, tmp_path: Path, option) -> None:
        assert option[0] in refused(dataset(tmp_path / "task", {"a": volume()}), *option)


class TestReal:
    def test_volumes_of_the_decathlon(self, shared_data, tmp_path: Path) -> None:
        root = shared_data("msd_hippocampus")
        names = sorted(path.name for path in (root / "imagesTr").glob("*.nii.gz"))[:8]
        for folder in ("imagesTr", "labelsTr"):
            (tmp_path / "task" / folder).mkdir(parents=True)
            for name in names:
                shutil.copyfile(root / folder / name, tmp_path / "task" / folder / name)
        store = convert(tmp_path / "task", "--classes", "anterior", "posterior")
        assert len(store.rows) == 8
        assert verify(store) == []
        for name in names:
            case = name.removesuffix(".nii.gz")
            for read, folder in ((store.image, "imagesTr"), (store.mask, "labelsTr")):
                source = nibabel.as_closest_canonical(nibabel.load(root / folder / name))
                np.testing.assert_array_equal(read(case), axial(np.asarray(source.dataobj)))

    def test_a_compressed_series_with_a_label(self, shared_data, tmp_path: Path) -> None:
        root = shared_data("totalsegmentator_ct")
        main(
            ["--dicom", str(root / "example_ct_dicom"), "--out", str(tmp_path / "s"),
             "--label", str(root / "example_seg_dicom.nii.gz"),
             "--classes", *(f"organ_{i}" for i in range(1, 118))]
        )  # fmt: skip
        store = SliceStore(tmp_path / "s")
        liver = store.image("example_ct_dicom")[store.mask("example_ct_dicom") == 5]
        assert liver.mean() == pytest.approx(89, abs=2)

    def test_a_series_with_contours(self, shared_data, tmp_path: Path) -> None:
        root = shared_data("mirp_sts001_ct_dicom_rtstruct") / "dicom"
        main(
            ["--dicom", str(root), "--out", str(tmp_path / "s"), "--rtstruct",
             str(root / "mask/RS.dcm"), "--roi", "GTV_Mass_CT", "--name", "sts_001"]
        )  # fmt: skip
        store = SliceStore(tmp_path / "s")
        assert store.classes == ("background", "GTV_Mass_CT")
        assert sum(store.row("sts_001").foreground) == 117_145
        assert store.image("sts_001").shape == (59, 202, 198)
        assert verify(store) == []

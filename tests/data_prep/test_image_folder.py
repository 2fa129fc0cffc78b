"""A folder of images and masks becomes a store of patients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.image_folder import main
from data_prep.image_pairs import cases_of, find_pairs
from data_prep.labels import to_classes
from medseg_reg.data.store import SliceStore
from medseg_reg.data.verify import verify
from medseg_reg.errors import MedsegError

GRAY = np.arange(96, dtype=np.uint8).reshape(8, 12)
MASK = np.zeros((8, 12), np.uint8)
MASK[2:5, 3:9] = 1


def put(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def convert(tmp_path) -> Callable[..., SliceStore]:
    def run(*more: str) -> SliceStore:
        out = tmp_path / "store"
        main(["--source", str(tmp_path / "in"), "--out", str(out), "--workers", "1", *more])
        return SliceStore(out)

    return run


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six images of three patients."""
    for number in range(6):
        put(tmp_path / f"in/images/P{number // 2}_s{number + 8}.png", GRAY + number)
        put(tmp_path / f"in/masks/P{number // 2}_s{number + 8}.png", MASK * 255)
    return tmp_path / "in"


class TestLayouts:
    @pytest.mark.parametrize("folder", ["masks", "labels", "annotations"])
    @pytest.mark.parametrize("suffix", ["", "_mask", "_seg", "_label"])
    def test_two_folders(self, tmp_path, folder, suffix):
        put(tmp_path / "images/a/1.jpg", GRAY)
        put(tmp_path / "images/b/1.TIFF", GRAY)
        put(tmp_path / f"{folder}/a/1{suffix}.png", MASK)
        put(tmp_path / f"{folder}/b/1{suffix}.png", MASK)
        pairs = find_pairs(tmp_path)
        assert [pair.name for pair in pairs] == ["a/1", "b/1"]
        assert pairs[1].mask == tmp_path / f"{folder}/b/1{suffix}.png"

    @pytest.mark.parametrize("suffix", ["_mask", "_seg", "_label"])
    def test_masks_beside_images_in_natural_order(self, tmp_path, suffix):
        for number in (10, 2, 1):
            put(tmp_path / f"f{number}.png", GRAY)
            put(tmp_path / f"f{number}{suffix}.tif", MASK)
        put(tmp_path / ".hidden.png", GRAY)
        (tmp_path / "readme.txt").touch()
        assert [pair.name for pair in find_pairs(tmp_path)] == ["f1", "f2", "f10"]

    def test_npz_hold_both(self, tmp_path):
        np.savez(tmp_path / "a.npz", hu=GRAY, mask=MASK)
        (pair,) = find_pairs(tmp_path)
        assert pair.image == pair.mask == tmp_path / "a.npz"

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ([], "has no images"),
            (["images/a.png"], "found: none"),
            (["images/a.png", "masks/a.png", "labels/a.png"], "found: masks, labels"),
            (["images/a.png", "masks/b.png"], r"a\.png: needs one mask .* found none"),
            (["images/a.png", "masks/a.png", "masks/a_seg.png"], r"a\.png and .*a_seg\.png"),
            (["images/a.png", "masks/a.png", "masks/b.png"], r"b\.png: no image in"),
            (["images/a.png", "images/a.jpg", "masks/a.png"], "one name twice"),
            (["a.png", "b_mask.png"], r"a\.png: needs one mask"),
            (["a.png"], r"a\.png: needs one mask"),
            (["a_mask.png"], "has no images"),
        ],
    )
    def test_what_does_not_pair_is_named(self, tmp_path, files, message):
        for file in files:
            put(tmp_path / file, MASK)
        with pytest.raises(MedsegError, match=message):
            find_pairs(tmp_path)

    def test_a_path_that_is_no_folder(self, tmp_path):
        with pytest.raises(MedsegError, match="is not a folder"):
            find_pairs(tmp_path / "nothing")


class TestGroups:
    def test_by_pattern(self, folder, convert, capsys):
        store = convert("--group-pattern", r"^(P\d)")
        assert list(store.rows) == ["P0", "P1", "P2"]
        assert store.row("P1").slice_names == ("P1_s10", "P1_s11")
        np.testing.assert_array_equal(store.image("P1"), [GRAY + 2, GRAY + 3])
        np.testing.assert_array_equal(store.mask("P1"), [MASK, MASK])
        assert verify(store) == []
        assert "WARNING" not in capsys.readouterr().out

    def test_by_size(self, folder, convert):
        store = convert("--group-size", "3")
        assert list(store.rows) == ["group_000", "group_001"]
        assert store.row("group_001").slice_names == ("P1_s11", "P2_s12", "P2_s13")

    def test_by_default_every_image_with_a_warning_that_stays(self, folder, convert, capsys):
        store = convert()
        assert len(store.rows) == 6
        assert "WARNING: every image is its own group" in capsys.readouterr().out
        assert "every image is its own group" in store.manifest.description.notes[0]

    def test_numbers_get_a_word_and_odd_letters_a_dash(self, tmp_path):
        for name in ("7", "a b", "x/y"):
            put(tmp_path / f"images/{name}.png", GRAY)
            put(tmp_path / f"masks/{name}.png", MASK)
        cases = cases_of(find_pairs(tmp_path))
        assert [case.name for case in cases] == ["case_7", "a_b", "x_y"]
        assert [case.group for case in cases] == ["7", "a b", "x/y"]

    def test_two_sizes_make_two_cases_of_one_group(self, folder):
        put(folder / "images/P0_s99.png", GRAY.T)
        put(folder / "masks/P0_s99.png", MASK.T)
        cases = cases_of(find_pairs(folder), r"(P\d)")
        assert [case.name for case in cases] == ["P0_8x12", "P0_12x8", "P1", "P2"]
        assert [case.group for case in cases] == ["P0", "P0", "P1", "P2"]

    @pytest.mark.parametrize(
        ("pattern", "size", "message"),
        [
            ("(", None, "is no regular expression"),
            ("P", None, "has 0 bracketed parts"),
            ("(P)(.)", None, "has 2 bracketed parts"),
            ("(Q)", None, "finds no patient in 'P0_s8'"),
            ("(Q?)", None, "finds no patient in 'P0_s8'"),
            (None, 4, "6 images do not divide into patients of 4"),
            (None, 0, "do not divide"),
            ("(P)", 2, "exclude each other"),
        ],
    )
    def test_a_grouping_that_does_not_fit_is_refused(self, folder, pattern, size, message):
        with pytest.raises(MedsegError, match=message):
            cases_of(find_pairs(folder), pattern, size)

    def test_names_that_collide_are_refused(self, tmp_path):
        for name in ("a b", "a_b"):
            put(tmp_path / f"images/{name}.png", GRAY)
            put(tmp_path / f"masks/{name}.png", MASK)
        with pytest.raises(MedsegError, match="'a b' and 'a_b' would both"):
            cases_of(find_pairs(tmp_path))


class TestLabels:
    def test_gray_values_become_classes(self, tmp_path, convert):
        put(tmp_path / "in/images/a.png", GRAY)
        put(
            tmp_path / "in/masks/a.png",
            np.where(GRAY < 40, 0, np.where(GRAY < 70, 128, 255)).astype(np.uint8),
        )
        names = ("--classes", "liver", "tumour")
        with pytest.raises(MedsegError, match=r"128, 255; expected only 0, 1, 2\.\n.*label-values"):
            convert(*names)
        store = convert(*names, "--label-values", "0", "128", "255")
        assert np.bincount(store.mask("a").ravel()).tolist() == [40, 30, 26]
        assert store.classes == ("background", "liver", "tumour")

    def test_the_order_of_label_values_counts(self):
        values = np.array([[0, 9, 300]], np.uint16)
        result = to_classes(values, Path("m"), 3, label_values=(300, 0, 9))
        assert result.tolist() == [[1, 2, 0]]

    @pytest.mark.parametrize("values", [[0, 2], [-1, 0], [1, 255]])
    def test_two_classes_are_0_1_or_0_255(self, values):
        with pytest.raises(MedsegError, match="expected only 0 and 1, or 0 and 255"):
            to_classes(np.array([values], np.int16), Path("m"), 2)

    @pytest.mark.parametrize(
        ("values", "options", "expected"),
        [
            ([0, 1, 255], {}, [0, 1, 255]),
            ([0, 200, 255], {"label_values": (0, 200)}, [0, 1, 255]),
            ([3, 250, 255], {"threshold": 127}, [0, 1, 255]),
            ([255, 255, 255], {}, [255, 255, 255]),
        ],
    )
    def test_an_ignored_value_stays_as_it_is(self, values, options, expected):
        masks = np.array([values], np.uint8)
        found = to_classes(masks, Path("m"), 2, ignored=255, **options)
        assert found.tolist() == [expected]
        assert found.dtype == np.uint8
        with pytest.raises(
            MedsegError, match="holds 9; expected only .* and 255, which is ignored"
        ):
            to_classes(np.array([[0, 9, 255]]), Path("m"), 2, ignored=255)

    def test_a_store_keeps_ignored_pixels(self, tmp_path, convert):
        mask = MASK.copy()
        mask[6:] = 255
        put(tmp_path / "in/images/a.png", GRAY)
        put(tmp_path / "in/masks/a.png", mask)
        with pytest.raises(MedsegError, match="the mask holds 255; expected only 0 and 1"):
            convert()
        store = convert("--ignore-label", "255")
        assert store.ignore_label == 255
        assert np.array_equal(store.mask("a")[0], mask)
        assert store.row("a").foreground == (MASK.sum(),)
        assert verify(store) == []

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--ignore-label", "1"], "--ignore-label 1 is the class 'foreground'"),
            (["--ignore-label", "256"], "--ignore-label 256: expected a value from 2 to 255"),
            (["--ignore-label", "9", "--label-values", "0", "9"], "the gray value of the class"),
            (["--classes", "background"], "--classes: 1 given"),
            (["--label-values", "0", "1", "2"], "--label-values: .* each class"),
            (["--label-values", "7", "7"], "of its own"),
            (["--label-values", "0", "-1"], "from 0 to 65535"),
            (["--threshold", "9", "--label-values", "0", "9"], "makes one class beside"),
            (["--threshold", "9", "--classes", "a", "b", "c"], "makes one class beside"),
            (["--canny", "9", "9"], "--canny 9 9"),
            (["--erosion", "0"], "--erosion 0"),
        ],
    )
    def test_options_that_do_not_fit_are_refused(self, folder, convert, options, message):
        with pytest.raises(MedsegError, match=message):
            convert(*options)


class TestPixels:
    def test_auto_colour_is_one_for_the_whole_folder(self, folder, convert):
        put(folder / "images/P2_s13.png", np.dstack([GRAY, GRAY, GRAY // 2]))
        assert {row.channels for row in convert().manifest.cases} == {3}

    def test_gray_stored_as_colour_is_one_channel(self, tmp_path, convert):
        put(tmp_path / "in/images/a.png", np.dstack([GRAY] * 3))
        put(tmp_path / "in/masks/a.png", MASK)
        assert convert().row("a").shape == (1, 8, 12)

    def test_hounsfield_units_are_known_by_their_key(self, tmp_path, convert):
        (tmp_path / "in").mkdir()
        hu = (GRAY.astype(np.int16) - 50) * 20
        np.savez(tmp_path / "in/a.npz", hu=hu, mask=MASK)
        store = convert()
        assert store.row("a").dtype == "int16"
        np.testing.assert_array_equal(store.image("a")[0], hu)
        assert store.manifest.description.unit == "HU"
        assert store.manifest.description.modality == "CT"

    def test_depths_mix_within_16_bits_and_not_with_8(self, tmp_path, convert):
        for number, top in enumerate((300, 60_000)):
            deep = GRAY.astype(np.uint16)
            deep[0, 0] = top
            put(tmp_path / f"in/images/{number}.png", deep)
            put(tmp_path / f"in/masks/{number}.png", MASK)
        pairs = ("--group-size", "2")
        assert convert(*pairs).row("group_000").dtype == "float32"
        put(tmp_path / "in/images/1.png", GRAY)
        with pytest.raises(MedsegError, match="8-bit and deeper images are mixed"):
            main(["--source", str(tmp_path / "in"), "--out", str(tmp_path / "s2"), *pairs])

    def test_another_size_of_the_mask_names_both(self, folder, convert):
        put(folder / "masks/P1_s10.png", MASK.T)
        with pytest.raises(MedsegError, match=r"P1_s10\.png: is 12x8, .* is 8x12"):
            convert()

    def test_edges_are_burnt_into_images_alone(self, folder, convert):
        store = convert("--group-pattern", r"(P\d)", "--erosion", "3", "--canny", "20", "60")
        assert store.manifest.settings["canny"] == [20.0, 60.0]
        np.testing.assert_array_equal(store.mask("P0"), [MASK, MASK])
        assert (store.image("P0") == 255).any()

    def test_edges_need_8_bits(self, tmp_path, convert):
        (tmp_path / "in").mkdir()
        np.savez(tmp_path / "in/a.npz", hu=GRAY.astype(np.int16), mask=MASK)
        with pytest.raises(MedsegError, match="need 8-bit images"):
            convert("--erosion", "3")


def test_the_real_slices_as_jpeg(shared_data, tmp_path):
    source = ["--source", str(shared_data("pancreas_ct_jpg")), "--out", str(tmp_path / "s")]
    pattern = ["--group-pattern", r"PANCREAS_(\d+)", "--workers", "1"]
    with pytest.raises(MedsegError, match="--threshold 127"):
        main([*source, *pattern, "--skip", *[f"case_{n:04d}" for n in (1, 3, 4, 5)]])
    main([*source, *pattern, "--threshold", "127", "--out", str(tmp_path / "t")])
    rows = SliceStore(tmp_path / "t").manifest.cases
    assert (len(rows), sum(row.slices for row in rows)) == (45, 184)
    assert {(row.channels, row.dtype) for row in rows} == {(1, "uint8")}
    assert all(count > 0 for row in rows for count in row.foreground)


def test_the_real_slices_in_hounsfield_units(shared_data, tmp_path):
    source = ["--source", str(shared_data("pancreas_ct_hu15")), "--out", str(tmp_path / "s")]
    main([*source, "--group-size", "5", "--classes", "background", "pancreas"])
    store = SliceStore(tmp_path / "s")
    assert [row.shape for row in store.manifest.cases] == [(5, 512, 512)] * 3
    inside = np.concatenate([store.image(c)[store.mask(c) == 1] for c in store.rows])
    assert 0 < np.median(inside) < 150

"""Scans and labels as TCIA publishes them become a store that equals the truth, voxel by voxel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest

from data_prep.pancreas_ct import find_scans, main
from data_prep.phantom import LABEL_FOLDER
from data_prep.phantom_anatomy import phantom_volume
from medseg_reg.data.store import SliceStore
from medseg_reg.data.verify import verify
from medseg_reg.errors import MedsegError
from medseg_reg.files import read_json

Phantom = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[2]
SIZE, SLICES, SEED = 48, 12, 3


def convert(source: Path, *more: str, labels: Path | None = None, out: str = "store") -> SliceStore:
    store = source.parent / out
    main(
        ["--images", str(source), "--labels", str(labels or source), "--out", str(store),
         "--workers", "1", *more]
    )  # fmt: skip
    return SliceStore(store)


def refused(source: Path, *more: str) -> str:
    """Return the message of the error; the store must not be there, not even in part."""
    with pytest.raises(MedsegError) as error:
        convert(source, *more)
    assert 1 <= len(str(error.value).splitlines()) <= 3
    assert not (source.parent / "store").exists()
    return str(error.value)


def assert_equals_truth(store: SliceStore, name: str, twin: int | None = None) -> None:
    number = int(name[-4:])
    image, mask = phantom_volume(SEED, twin or number, SIZE, SLICES)
    cut = SLICES // 8 if twin else 0
    np.testing.assert_array_equal(store.image(name), image[cut:])
    np.testing.assert_array_equal(store.mask(name), mask[cut:])


def scan(source: Path, number: int) -> list[Path]:
    """Return the files of a scan from feet to head."""
    (folder,) = source.rglob(f"PANCREAS_{number:04d}")
    files = list(folder.rglob("*.dcm"))
    return sorted(files, key=lambda f: float(pydicom.dcmread(f).ImagePositionPatient[2]))


def edit_scan(source: Path, number: int, change: Callable[[pydicom.Dataset], None]) -> None:
    for path in scan(source, number):
        dataset = pydicom.dcmread(path)
        change(dataset)
        dataset.save_as(path)


def label_file(source: Path, number: int) -> Path:
    return next((source / LABEL_FOLDER).glob(f"label{number:04d}.nii*"))


def edit_label(source: Path, number: int, change: Callable[[np.ndarray], np.ndarray]) -> None:
    path = label_file(source, number)
    image = nibabel.load(path)
    array = change(np.asarray(image.dataobj).copy())
    nibabel.save(nibabel.Nifti1Image(array, image.affine), path)


class TestTruth:
    @pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "shuffled"])
    @pytest.mark.parametrize("layout", ["manifest", "doi", "uuid"])
    def test_every_layout_gives_the_truth(self, phantom: Phantom, layout, shuffle) -> None:
        # Numbers 1 to 4 hold rows from front and back, and numbering from head and from feet.
        store = convert(phantom(cases=4, layout=layout, shuffle=shuffle))
        assert list(store.rows) == [f"pancreas_{n:04d}" for n in (1, 2, 3, 4)]
        for name in store.rows:
            assert_equals_truth(store, name)
        assert store.manifest.settings["plane"] == "axial"
        assert store.image("pancreas_0001").dtype == np.int16
        assert verify(store) == []

    @pytest.mark.parametrize("labels", ["zip", "gz", "nii"])
    def test_labels_packed_in_any_way_give_the_truth(self, phantom: Phantom, labels) -> None:
        source = phantom(labels=labels)
        where = source / (f"{LABEL_FOLDER}.zip" if labels == "zip" else LABEL_FOLDER)
        store = convert(source, labels=where)
        for name in store.rows:
            assert_equals_truth(store, name)

    def test_the_manifest_tells_source_spacing_and_proof(self, phantom: Phantom, capsys) -> None:
        source = phantom()
        store = convert(source)
        row = store.row("pancreas_0001")
        first = pydicom.dcmread(scan(source, 1)[0])
        assert row.geometry.spacing[1:] == tuple(map(float, first.PixelSpacing))
        assert row.geometry.spacing[0] == pytest.approx(float(first.SliceThickness))
        assert row.group == "PANCREAS_0001"
        assert len(row.sources) == SLICES + 1
        assert row.notes[-1].startswith("label transposed, flipped ")
        assert store.manifest.description.licence == "CC BY 3.0"
        assert "scans        2 found,     80 published" in capsys.readouterr().out

    def test_the_mask_goes_back_to_the_grid_of_the_scan(self, phantom: Phantom) -> None:
        source = phantom()
        store = convert(source)
        geometry = store.row("pancreas_0001").geometry
        # (columns, rows, slices from feet to head), the order of the DICOM pixels themselves.
        pixels = np.stack([pydicom.dcmread(f).pixel_array for f in scan(source, 1)])
        back = geometry.to_source(store.image("pancreas_0001"))
        if geometry.source_affine[2][2] < 0:
            back = back[..., ::-1]
        np.testing.assert_array_equal(back, pixels.clip(-1024).transpose(2, 1, 0))

    def test_a_slope_and_an_intercept_give_the_same_hu(self, phantom: Phantom) -> None:
        source = phantom(cases=1)

        def rescale(dataset: pydicom.Dataset) -> None:
            stored = dataset.pixel_array.astype(np.int32).clip(-1024)
            dataset.PixelData = (stored + 1024).astype("<u2").tobytes()
            dataset.PixelRepresentation, dataset.RescaleIntercept = 0, -1024
            del dataset.PixelPaddingValue

        edit_scan(source, 1, rescale)
        assert_equals_truth(convert(source), "pancreas_0001")

    def test_padding_below_air_is_air(self, phantom: Phantom) -> None:
        source = phantom(cases=1)
        assert min(pydicom.dcmread(f).pixel_array.min() for f in scan(source, 1)) == -2048
        assert convert(source).image("pancreas_0001").min() == -1024


class TestPairing:
    def test_copies_of_scan_2_are_left_out(self, phantom: Phantom, capsys) -> None:
        store = convert(phantom(duplicates="full"))
        assert list(store.rows) == ["pancreas_0001", "pancreas_0002"]
        assert "left out as scan #2 again, cropped differently: #25, #70" in capsys.readouterr().out

    def test_copies_of_scan_2_come_in_its_group_on_request(self, phantom: Phantom) -> None:
        store = convert(phantom(duplicates="full"), "--include-duplicates")
        assert list(store.rows)[2:] == ["pancreas_0025", "pancreas_0070"]
        assert {store.row(f"pancreas_00{n}").group for n in ("02", "25", "70")} == {"PANCREAS_0002"}
        assert_equals_truth(store, "pancreas_0025", twin=2)
        assert_equals_truth(store, "pancreas_0070", twin=2)

    @pytest.mark.parametrize("more", [(), ("--include-duplicates",)])
    def test_empty_folders_with_labels_are_no_cases(self, phantom: Phantom, more) -> None:
        assert len(convert(phantom(duplicates="empty"), *more).rows) == 2

    def test_missing_cases_do_not_shift_the_pairs(self, phantom: Phantom, capsys) -> None:
        source = phantom(cases=5, labels="gz")
        shutil.rmtree(next(source.rglob("PANCREAS_0002")))
        label_file(source, 4).unlink()
        store = convert(source)
        assert list(store.rows) == [f"pancreas_{n:04d}" for n in (1, 3, 5)]
        for name in store.rows:
            assert_equals_truth(store, name)
        out = capsys.readouterr().out
        assert "scans without a label, left out: #4\n" in out
        assert "labels without a scan, left out: #2\n" in out

    def test_scans_without_folders_are_known_by_their_patient(self, phantom: Phantom) -> None:
        source = phantom()
        flat = source / "flat"
        flat.mkdir()
        for index, path in enumerate(sorted(source.rglob("*.dcm"))):
            path.rename(flat / f"{index:04d}.dcm")
        store = source.parent / "store"
        main(
            ["--images", str(flat), "--labels", str(source), "--out", str(store), "--workers", "1"]
        )
        assert_equals_truth(SliceStore(store), "pancreas_0002")

    def test_the_folder_of_one_scan_is_enough(self, phantom: Phantom) -> None:
        folder = next(phantom().rglob("PANCREAS_0002"))
        assert list(find_scans(folder)) == [2]

    def test_a_scan_in_the_folder_of_another_is_refused(self, phantom: Phantom) -> None:
        source = phantom()
        one, two = (next(source.rglob(f"PANCREAS_000{n}")) for n in (1, 2))
        one.rename(one.with_name("spare"))
        two.rename(two.with_name("PANCREAS_0001"))
        assert "folder of scan 1, but its files say PatientID PANCREAS_0002" in refused(source)

    def test_skipping_what_is_not_there_lists_the_cases(self, phantom: Phantom) -> None:
        text = refused(phantom(), "--skip", "pancreas_2")
        assert "--skip pancreas_2: no such case. The cases are pancreas_0001, pancreas_0002" in text

    def test_two_labels_of_one_number_are_refused(self, phantom: Phantom) -> None:
        source = phantom(labels="gz")
        shutil.copyfile(label_file(source, 1), source / "LABEL1.nii.gz")
        assert "two labels have the number 1" in refused(source)

    def test_a_folder_without_scans_says_what_is_expected(self, tmp_path: Path) -> None:
        assert "no folder like PANCREAS_0001 with files" in refused(tmp_path)

    def test_a_folder_without_labels_says_what_is_expected(self, phantom: Phantom) -> None:
        source = phantom()
        (source / f"{LABEL_FOLDER}.zip").unlink()
        assert "holds no label file like label0001.nii.gz" in refused(source)


class TestLabelsThatDoNotFit:
    def test_another_shape(self, phantom: Phantom) -> None:
        source = phantom(labels="gz")
        edit_label(source, 2, lambda label: label[..., 1:])
        text = refused(source)
        assert "case pancreas_0002: the label has (48, 48, 11) voxels" in text
        assert "12 slices" in text

    def test_an_empty_label(self, phantom: Phantom) -> None:
        source = phantom(labels="gz")
        edit_label(source, 2, np.zeros_like)
        assert "case pancreas_0002: the label marks 0 voxels, too few" in refused(source)

    @pytest.mark.parametrize(
        "change",
        [
            lambda label: np.roll(label, (16, -12), (0, 1)),
            lambda label: np.roll(label, 6, 2),
            lambda label: np.random.default_rng(0).integers(0, 2, label.shape).astype(np.uint8),
            np.ones_like,
        ],
        ids=["shifted in the slice", "shifted along the slices", "noise", "full"],
    )
    def test_a_label_that_lies_nowhere(self, phantom: Phantom, change) -> None:
        source = phantom(labels="gz")
        edit_label(source, 2, change)
        text = refused(source)
        assert "case pancreas_0002: the label's orientation cannot be proved" in text
        assert "--skip" in text

    def test_labels_that_were_swapped(self, phantom: Phantom) -> None:
        source = phantom(cases=3, labels="gz")
        one, three = label_file(source, 1), label_file(source, 3)
        content = one.read_bytes()
        one.write_bytes(three.read_bytes())
        three.write_bytes(content)
        with pytest.raises(MedsegError, match="cannot be proved"):
            convert(source)

    def test_values_that_are_no_class(self, phantom: Phantom) -> None:
        source = phantom(labels="gz")
        edit_label(source, 2, lambda label: label * 2)
        text = refused(source)
        assert "case pancreas_0002: the mask holds the labels [0, 2]" in text

    def test_a_scan_that_lost_its_intercept(self, phantom: Phantom) -> None:
        source = phantom()

        def lose(dataset: pydicom.Dataset) -> None:
            dataset.PixelData = (dataset.pixel_array.clip(-1024) + 1024).astype("<i2").tobytes()
            del dataset.PixelPaddingValue

        edit_scan(source, 2, lose)
        text = refused(source)
        assert "are not HU of an abdomen" in text
        assert "PANCREAS_0002" in text


class TestDamage:
    """Each way of damage ends with exit code 2, a short message, and the other case kept."""

    def damage(self, source: Path, kind: str) -> str:
        path = scan(source, 2)[3]
        if kind == "truncated slice":
            path.write_bytes(path.read_bytes()[:-500])
        elif kind == "slice cut off in its header":
            path.write_bytes(path.read_bytes()[:450])
        elif kind == "truncated label":
            path = label_file(source, 2)
            path.write_bytes(path.read_bytes()[:-200])
        elif kind == "missing slice":
            path.unlink()
            return "PANCREAS_0002"
        elif kind == "NaN in a tag":
            spacing = str(pydicom.dcmread(path).PixelSpacing[0]).encode()
            content = path.read_bytes()
            assert content.count(spacing) == 2
            path.write_bytes(content.replace(spacing, b"nan".ljust(len(spacing))))
        return path.name

    KINDS = (
        "truncated slice", "slice cut off in its header", "truncated label", "missing slice",
        "NaN in a tag",
    )  # fmt: skip

    @pytest.mark.parametrize("kind", KINDS)
    def test_damage_is_named_and_repair_goes_on(self, phantom: Phantom, kind, capsys) -> None:
        source = phantom(labels="gz")
        whole = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
        named = self.damage(source, kind)
        text = refused(source)
        assert named in text
        assert "1 case is kept; repair, then run again" in text
        partial = source.parent / ".store.partial"
        assert sorted(p.name for p in partial.rglob("*.npy")) == ["pancreas_0001.npy"] * 2
        assert list(partial.rglob("*.tmp")) == []
        for path, content in whole.items():
            if not path.exists() or path.read_bytes() != content:
                path.write_bytes(content)
        kept = partial / "images/pancreas_0001.npy"
        inode = kept.stat().st_ino
        capsys.readouterr()
        store = convert(source)
        assert "going on; 1 case is already there" in capsys.readouterr().out
        assert (store.path / "images/pancreas_0001.npy").stat().st_ino == inode
        assert_equals_truth(store, "pancreas_0001")
        assert_equals_truth(store, "pancreas_0002")

    def test_a_damaged_case_can_be_left_out_and_the_rest_goes_on(self, phantom, capsys) -> None:
        source = phantom(labels="gz")
        self.damage(source, "truncated label")
        refused(source)
        store = convert(source, "--skip", "pancreas_0002")
        assert "going on; 1 case is already there" in capsys.readouterr().out
        assert list(store.rows) == ["pancreas_0001"]
        assert len(list(store.path.rglob("*.npy"))) == 2

    def test_the_command_ends_with_code_2_and_a_short_message(self, phantom: Phantom) -> None:
        source = phantom(labels="gz")
        named = self.damage(source, "NaN in a tag")
        done = self.command(source)
        assert done.returncode == 2
        error = [line for line in done.stderr.splitlines() if "case/s" not in line and line]
        assert error[0].startswith("error: ")
        assert f"{named}: PixelSpacing (0028,0030) is 'nan" in error[0]
        assert len(error) <= 3
        assert "Traceback" not in done.stderr

    def command(self, source: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "data_prep.pancreas_ct", "--images", str(source), "--labels",
             str(source), "--out", str(source.parent / "store"), "--workers", "1"],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, capture_output=True,
            check=False,
        )  # fmt: skip

    @pytest.mark.parametrize(
        "member", ["../label0001.nii.gz", "/label0001.nii.gz", "a/../../x", "C:\\label0001.nii.gz"]
    )
    def test_a_zip_that_leads_out_is_refused(self, phantom: Phantom, member) -> None:
        source = phantom()
        with zipfile.ZipFile(source / f"{LABEL_FOLDER}.zip", "a") as archive:
            archive.writestr(member, b"")
        text = refused(source)
        assert "which leads out of the archive" in text
        assert not (source.parent / ".store.partial").exists()

    @pytest.mark.parametrize("keep", [0, 1000, -30])
    def test_a_zip_that_is_not_whole_is_refused(self, phantom: Phantom, keep) -> None:
        source = phantom()
        path = source / f"{LABEL_FOLDER}.zip"
        path.write_bytes(path.read_bytes()[:keep])
        assert "is not a whole zip archive" in refused(source)

    def test_a_flipped_bit_in_the_zip_is_found(self, phantom: Phantom) -> None:
        source = phantom()
        path = source / f"{LABEL_FOLDER}.zip"
        content = bytearray(path.read_bytes())
        content[300] ^= 1
        path.write_bytes(content)
        assert "label0001.nii.gz: cannot be read" in refused(source)


class TestAgain:
    def test_a_second_run_changes_nothing(self, phantom: Phantom, capsys) -> None:
        source = phantom()
        store = convert(source).path
        before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in store.rglob("*.*")}
        capsys.readouterr()
        convert(source)
        assert "is already complete (2 cases); nothing to do" in capsys.readouterr().out
        assert before == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in store.rglob("*.*")}

    def test_equal_sources_give_equal_stores(self, phantom: Phantom) -> None:
        source = phantom()
        one, two = convert(source), convert(source, out="two")
        for path in one.path.rglob("*.*"):
            assert path.read_bytes() == (two.path / path.relative_to(one.path)).read_bytes()

    def test_other_settings_are_refused(self, phantom: Phantom) -> None:
        source = phantom()
        before = convert(source).path / "manifest.json"
        content = read_json(before)
        with pytest.raises(MedsegError, match="margin: 0.1, now 0.2"):
            convert(source, "--margin", "0.2")
        assert read_json(before) == content

"""`verify` finds every change that was made to a store after its conversion."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg_reg.data.store import Description, SliceStore
from medseg_reg.data.store_writer import CaseArrays, CaseSource, StoreWriter
from medseg_reg.data.verify import main, verify
from medseg_reg.errors import MedsegError, run_main
from medseg_reg.io.geometry import geometry_of
from tests.stores import make_store


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("verify") / "store", cases=3, slices=3).path


@pytest.fixture
def path(template, tmp_path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "store"))


def edit_case(path: Path, change: Callable[[dict[str, Any]], None], case: int = 1) -> None:
    file = path / "manifest.json"
    content = json.loads(file.read_text())
    change(content["cases"][case])
    file.write_text(json.dumps(content))


def edit_array(file: Path, change: Callable[[np.ndarray], np.ndarray | None]) -> None:
    array = np.load(file)
    changed = change(array)
    np.save(file, array if changed is None else changed)


def only(path: Path) -> str:
    findings = verify(SliceStore(path))
    assert findings
    return "\n".join(findings)


def test_an_untouched_store_has_no_findings(path, capsys):
    assert verify(SliceStore(path)) == []
    main([str(path)])
    printed = capsys.readouterr().out
    assert "case_01  case_01  -     3x32x32  uint8  3 of 3      good" in printed
    assert "3 cases, all well" in printed


@pytest.mark.parametrize(
    ("dtype", "channels"), [("uint8", 1), ("uint8", 3), ("int16", 1), ("float32", 1)]
)
def test_every_kind_of_store_is_good(tmp_path, dtype, channels):
    store = make_store(
        tmp_path / "s", cases=2, size=(20, 30), dtype=dtype, channels=channels, empty=0.5
    )
    assert verify(store) == []


def test_one_changed_pixel_is_found(path):
    def brighten(array):
        array[2, 5, 7] ^= 1

    edit_array(path / "images/case_01.npy", brighten)
    findings = only(path)
    assert "images/case_01.npy: SHA-256 is" in findings
    assert "images/case_01.npy: slices 2 are not those of the manifest" in findings


def test_changed_masks_are_found_with_their_slice(path):
    def erase(array):
        array[1] = 0

    edit_array(path / "masks/case_02.npy", erase)
    assert "masks/case_02.npy: slice 1 has 0 foreground pixels, the manifest says" in only(path)


def test_a_label_beyond_the_classes_is_found(path):
    edit_array(path / "masks/case_00.npy", lambda array: array * 7)
    assert "masks/case_00.npy: holds the label 7, the classes are 0 to 1" in only(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a[:2], r"holds \(2, 32, 32\) uint8, the manifest says \(3, 32, 32\) uint8"),
        (lambda a: a.astype(np.int16), "int16, the manifest says"),
        (np.asfortranarray, "SHA-256"),
    ],
)
def test_other_shapes_and_types_are_found(path, change, message):
    edit_array(path / "images/case_00.npy", change)
    with pytest.raises(MedsegError, match=message):
        raise MedsegError(only(path))


def test_missing_truncated_and_extra_files_are_found(path):
    (path / "images/case_00.npy").unlink()
    (path / "overview.png").unlink()
    file = path / "masks/case_01.npy"
    file.write_bytes(file.read_bytes()[:-100])
    (path / "images/case_99.npy").write_bytes(b"x")
    (path / "notes.txt").write_text("x")
    (path / ".DS_Store").write_text("x")
    findings = only(path)
    assert "images/case_00.npy: is missing" in findings
    assert "overview.png: is missing" in findings
    assert "masks/case_01.npy: is damaged" in findings
    assert "images/case_99.npy: does not belong to the store" in findings
    assert "notes.txt: does not belong to the store" in findings
    assert ".DS_Store" not in findings


def test_lists_of_another_length_are_found(path):
    edit_case(path, lambda row: row["foreground"].pop())
    assert "case case_01: foreground has 2 entries for 3 slices" in only(path)


def test_a_group_in_both_official_parts_is_found(tmp_path):
    store = make_store(
        tmp_path / "s", cases=3, groups=["a", "a", "b"], parts=["train", "test", "train"]
    )
    assert "'a' has cases inside and outside the official test part" in verify(store)[0]


class TestGeometry:
    @pytest.fixture
    def path(self, tmp_path) -> Path:
        affine = np.array([[-0.7, 0, 0, 5], [0, 0.7, 0, 6], [0, 0, 2.5, 7], [0, 0, 0, 1.0]])
        geometry = geometry_of(affine, (30, 20, 4), "axial")
        about = dict.fromkeys(("name", "source", "licence", "citation", "modality", "unit"), "x")
        writer = StoreWriter(
            tmp_path / "s", Description(**about, classes=("background", "organ")), {}
        )
        writer.begin()
        image = np.random.default_rng(0).integers(-100, 200, (4, 20, 30)).astype(np.int16)
        arrays = CaseArrays(image, (image > 150).astype(np.uint8), geometry=geometry)
        writer.write(CaseSource("scan", "scan", ()), arrays, "")
        return writer.publish(["scan"]).path

    def test_a_true_one_is_good(self, path):
        assert verify(SliceStore(path)) == []

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"source_shape": [20, 30, 4]}, r"gives \(4, 30, 20\)"),
            ({"spacing": [2.5, 0.7, 0.8]}, r"source_affine gives \(2\.5, 0\.7, 0\.7\)"),
            ({"axes": [2, 2, 0]}, "no order of three axes"),
            ({"flips": [True, False, False]}, "none of the planes"),
            ({"source_affine": [[0.0] * 4] * 4}, "axis of length zero"),
            ({"source_affine": [[1.0] * 4] * 3}, "no finite 4x4 matrix"),
        ],
    )
    def test_a_false_one_is_found(self, path, change, message):
        edit_case(path, lambda row: row["geometry"].update(change), case=0)
        with pytest.raises(MedsegError, match=message):
            raise MedsegError(only(path))


def test_findings_end_the_command_with_exit_code_2(path, monkeypatch, capsys):
    (path / "masks/case_01.npy").unlink()
    monkeypatch.setattr("sys.argv", ["verify", str(path)])
    with pytest.raises(SystemExit) as caught:
        run_main(main)
    assert caught.value.code == 2
    streams = capsys.readouterr()
    assert "1 findings" in streams.out
    assert "masks/case_01.npy: is missing" in streams.err

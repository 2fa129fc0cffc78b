"""A slice store refuses what it cannot trust, and can be read from any process."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg_reg.data.store import SliceStore
from medseg_reg.data.store_writer import CaseArrays, CaseSource, StoreWriter
from medseg_reg.errors import MedsegError
from tests.stores import make_store


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("store") / "store", cases=2, size=(16, 24)).path


@pytest.fixture
def path(template, tmp_path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "store"))


def read_manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / "manifest.json").read_text())


def write_manifest(path: Path, content: Any) -> None:
    (path / "manifest.json").write_text(json.dumps(content))


def test_arrays_come_back_as_they_were_written_and_cannot_be_changed(path):
    store = SliceStore(path)
    image, mask = store.image("case_00"), store.mask("case_00")
    assert image.shape == mask.shape == (4, 16, 24)
    assert image[mask == 1].mean() > image[mask == 0].mean() + 50
    with pytest.raises(ValueError, match="read-only"):
        image[0, 0, 0] = 1


def test_the_same_seed_makes_the_same_store(path, tmp_path):
    again = make_store(tmp_path / "again", cases=2, size=(16, 24))
    other = make_store(tmp_path / "other", cases=2, size=(16, 24), seed=1)
    assert again.row("case_01") == SliceStore(path).row("case_01")
    assert other.row("case_01").image_sha256 != again.row("case_01").image_sha256


class TestManifest:
    def test_a_folder_without_one_is_no_store(self, tmp_path):
        with pytest.raises(MedsegError, match=r"no manifest\.json.*data_prep"):
            SliceStore(tmp_path)

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '{"format": 1}', "\xff"])
    def test_a_damaged_one_is_named(self, path, text):
        (path / "manifest.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(MedsegError, match=r"manifest\.json"):
            SliceStore(path)

    @pytest.mark.parametrize(
        "name",
        ["../outside", "..", ".", "/etc/passwd", "a/b", "a\\b", "", ".hidden", "x\n", "x" * 300],
    )
    def test_a_name_that_leads_elsewhere_is_refused(self, path, name):
        content = read_manifest(path)
        content["cases"][0]["name"] = name
        write_manifest(path, content)
        with pytest.raises(MedsegError, match=r"cases\.0\.name"):
            SliceStore(path)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("shape", [4, 16]),
            ("shape", "big"),
            ("dtype", "object"),
            ("part", "validation"),
            ("foreground", None),
            ("surprise", 1),
        ],
    )
    def test_a_row_that_breaks_the_format_is_refused_by_its_key(self, path, key, value):
        content = read_manifest(path)
        content["cases"][1][key] = value
        write_manifest(path, content)
        with pytest.raises(MedsegError, match=rf"cases\.1\.{key}"):
            SliceStore(path)

    def test_another_version_is_refused(self, path):
        write_manifest(path, {**read_manifest(path), "version": 2})
        with pytest.raises(MedsegError, match="version"):
            SliceStore(path)

    def test_two_cases_of_one_name_are_refused(self, path):
        content = read_manifest(path)
        content["cases"][1]["name"] = "case_00"
        write_manifest(path, content)
        with pytest.raises(MedsegError, match="two cases have the same name"):
            SliceStore(path)

    def test_an_unknown_case_gets_a_hint(self, path):
        with pytest.raises(MedsegError, match=r"no case 'case_0'\. Did you mean 'case_0[01]'"):
            SliceStore(path).image("case_0")


class TestArrays:
    def test_a_pickle_is_never_loaded(self, path, tmp_path):
        flag = tmp_path / "executed"
        np.save(path / "images/case_00.npy", np.array([Evil(flag)], object), allow_pickle=True)
        (path / "masks/case_00.npy").write_bytes(pickle.dumps(Evil(flag)))
        for read in (SliceStore(path).image, SliceStore(path).mask):
            with pytest.raises(MedsegError, match=r"case_00\.npy: is damaged"):
                read("case_00")
        assert not flag.exists()

    @pytest.mark.parametrize("size", [0, 5, 60, 200, -1])
    def test_a_truncated_one_is_named(self, path, size):
        file = path / "images/case_01.npy"
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(MedsegError, match=r"images/case_01\.npy: is damaged"):
            SliceStore(path).image("case_01")

    def test_a_missing_one_is_named(self, path):
        (path / "masks/case_01.npy").unlink()
        with pytest.raises(MedsegError, match=r"masks/case_01\.npy: is missing"):
            SliceStore(path).mask("case_01")

    def test_another_shape_or_type_is_told_with_both_values(self, path):
        np.save(path / "images/case_01.npy", np.zeros((4, 24, 16), np.uint8))
        with pytest.raises(MedsegError, match=r"\(4, 24, 16\) uint8.*\(4, 16, 24\) uint8"):
            SliceStore(path).image("case_01")


class Evil:
    """An object that would leave a trace if anybody unpickled it."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self):
        return Path.touch, (self.flag,)


def _sums(store: SliceStore) -> list[int]:
    return [int(store.image(name).sum()) for name in store.rows]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_read_what_the_parent_reads(path, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    store = SliceStore(path)
    expected = _sums(store)
    # A method of the store, because a spawned process cannot import functions of a test.
    with multiprocessing.get_context(method).Pool(1) as pool:
        found = [int(pool.apply(store.image, (name,)).sum()) for name in store.rows]
    assert found == expected


def test_a_pickled_store_carries_no_arrays(path):
    store = SliceStore(path)
    small = len(pickle.dumps(store))
    _sums(store)
    assert len(pickle.dumps(store)) < small + 2000
    assert _sums(pickle.loads(pickle.dumps(store))) == _sums(store)


class TestWriter:
    def write(self, tmp_path: Path, image: np.ndarray, mask: np.ndarray) -> None:
        store = make_store(tmp_path / "made", cases=1)
        writer = StoreWriter(tmp_path / "s", store.manifest.description, {})
        writer.begin()
        writer.write(CaseSource("one", "one", ()), CaseArrays(image, mask), "")

    @pytest.mark.parametrize(
        ("image", "mask", "message"),
        [
            (np.zeros((2, 4, 5)), np.zeros((2, 5, 4)), "do not lie on one grid"),
            (np.zeros((4, 5)), np.zeros((4, 5)), "do not lie on one grid"),
            (np.zeros((0, 4, 5)), np.zeros((0, 4, 5)), "do not lie on one grid"),
            (np.full((1, 4, 5), np.nan), np.zeros((1, 4, 5)), "20 pixels .* NaN or infinite"),
            (np.zeros((1, 4, 5)), np.full((1, 4, 5), 3), r"labels \[3\].* 0 to 1"),
        ],
    )
    def test_arrays_that_a_store_must_not_hold_are_refused(self, tmp_path, image, mask, message):
        with pytest.raises(MedsegError, match=message):
            self.write(tmp_path, image.astype(np.float32), mask.astype(np.uint8))

    def test_a_folder_that_is_no_store_is_never_touched(self, tmp_path):
        store = make_store(tmp_path / "made", cases=1)
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("x")
        writer = StoreWriter(tmp_path / "mine", store.manifest.description, {})
        with pytest.raises(MedsegError, match="nothing was touched"):
            writer.finished()

    def test_a_store_of_other_settings_is_not_taken_for_finished(self, tmp_path):
        store = make_store(tmp_path / "made", cases=1)
        writer = StoreWriter(store.path, store.manifest.description, {"seed": 5})
        with pytest.raises(MedsegError, match="seed: 0, now 5"):
            writer.finished()

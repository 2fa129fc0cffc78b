"""A run says which cases it has seen, and another finds its own among them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medseg_reg.data.splits import Splits
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.run_directory import DataFacts, RunDirectory
from medseg_reg.engine.seen import Seen, SeenCase, read_seen
from medseg_reg.errors import MedsegError
from tests.stores import make_store

NAMES = [f"case_{n:02d}" for n in range(6)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SliceStore:
    """Six cases of five patients: the last two are of one."""
    groups = ["a", "b", "c", "d", "e", "e"]
    return make_store(tmp_path_factory.mktemp("data") / "store", slices=2, size=16, groups=groups)


def split(train: str, val: str, test: str, **more: object) -> Splits:
    parts = {
        part: tuple(NAMES[int(n)] for n in numbers)
        for part, numbers in (("train", train), ("val", val), ("test", test))
    }
    return Splits(**parts, **more)


@pytest.mark.parametrize(
    ("seen", "own", "test", "val"),
    [
        (split("01", "2", "3"), split("01", "2", "345"), [], []),
        (split("01", "2", "3"), split("3", "0", "124"), [1, 2], [0]),
        (split("01", "2", "3"), split("01", "2", "3"), [], []),  # its validation cases are no leak
        (split("04", "1", "2"), split("0", "1", "25"), [5], []),  # another case of that patient
    ],
)
def test_cases_are_found_by_patient(store, seen, own, test, val):
    found = Seen.of(store, seen).shared(own, store)
    assert found == (tuple(NAMES[n] for n in test), tuple(NAMES[n] for n in val))


def test_a_case_of_which_no_slice_was_drawn_was_not_seen(store):
    drawn = split("01", "2", "3", train_slices={NAMES[0]: (1,), NAMES[1]: ()})
    seen = Seen.of(store, drawn)
    assert {name: one.slices for name, one in seen.train.items()} == {NAMES[0]: 1}
    assert seen.shared(split("2", "3", "014"), store).test == (NAMES[0],)


def test_its_hash_is_that_of_the_images(store):
    one = Seen.of(store, split("01", "2", "3"))
    assert one.hash == Seen.of(store, split("10", "2", "5"), 7).hash
    assert one.hash != Seen.of(store, split("0", "12", "3")).hash
    drawn = split("01", "2", "3", train_slices={NAMES[0]: (1,), NAMES[1]: (0, 1)})
    assert one.hash != Seen.of(store, drawn).hash


def test_in_another_store_the_images_tell_the_case_and_not_its_name(store, tmp_path):
    # The last case has the images of the first one here, and the names of the others mean nothing.
    images = {case.name: case.image_sha256 for case in store.manifest.cases}
    theirs = {
        name: SeenCase(group=name, slices=2, image_sha256=sha, source_sha256="0" * 64)
        for name, sha in (("case_01", images["case_00"]), ("case_02", "1" * 64))
    }
    seen = Seen(manifest_sha256="of another", train=theirs, val={})
    assert seen.shared(split("2", "3", "014"), store).test == ("case_00",)
    # All cases here have the same "files", which tells nothing; one that is of one patient does.
    telling = SeenCase(group="x", slices=1, image_sha256="2" * 64, source_sha256="f" * 64)
    rows = [row.model_copy(update={"source_sha256": "f" * 64}) if row.name == NAMES[4] else row
            for row in store.manifest.cases]  # fmt: skip
    other = SliceStore(store.path)
    other.manifest = store.manifest.model_copy(update={"cases": tuple(rows)})
    seen = Seen(manifest_sha256="of another", train={"x": telling}, val={})
    assert seen.shared(split("2", "3", "015"), other).test == (NAMES[5],)  # of the same patient


def test_it_is_read_as_it_was_written_and_an_older_run_has_its_split(store, tmp_path):
    run, splits = RunDirectory(tmp_path / "run"), split("01", "2", "345")
    run.begin(DataFacts.of(store, 1), store)
    assert read_seen(run, store) is None
    splits.write(run.path / "splits.json")
    assert read_seen(run, store) == Seen.of(store, splits)
    other = make_store(tmp_path / "other", slices=1, size=16, seed=1)
    assert read_seen(run, other) is None  # names say nothing there
    seen = Seen.of(store, splits, 12)
    seen.write(run.path)
    assert read_seen(run, other) == seen
    content = json.loads(Path(run.path / "seen.json").read_text())
    assert (content["hash"], content["slices_per_epoch"]) == (seen.hash, 12)
    (run.path / "seen.json").write_text(json.dumps({**content, "train": 3}))
    with pytest.raises(MedsegError, match=r"seen.json: is damaged: 'train'"):
        read_seen(run, store)

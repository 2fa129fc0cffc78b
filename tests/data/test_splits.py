"""A split goes by patient, keeps duplicates together, and is the same everywhere."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from medseg_reg.data.splits import (
    Splits,
    SplitSpec,
    check_splits,
    make_splits,
    read_splits,
    units_of,
)
from medseg_reg.data.store import CaseRow, Description, Manifest, SliceStore
from medseg_reg.errors import MedsegError
from medseg_reg.files import write_json
from tests.stores import make_store

PARTS = ("train", "val", "test")


def store_of(folder: Path, rows: Sequence[dict]) -> SliceStore:
    """Write a manifest alone: a split looks at nothing else."""
    cases = tuple(
        CaseRow(
            **{
                "name": f"c{index:02d}",
                "group": f"g{index:02d}",
                "shape": (3, 8, 8),
                "dtype": "uint8",
                "foreground": (1, 1, 1),
                "slice_hashes": tuple(f"{index}-{number}" for number in range(3)),
                "sources": (),
                "source_sha256": "",
                "image_sha256": "",
                "mask_sha256": "",
                **row,
            }
        )
        for index, row in enumerate(rows)
    )
    about = dict.fromkeys(("name", "source", "licence", "citation", "modality", "unit"), "x")
    manifest = Manifest(
        description=Description(**about, classes=("a", "b")), settings={}, cases=cases
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "manifest.json", manifest.model_dump(mode="json"))
    return SliceStore(folder)


def assert_sound(splits: Splits, store: SliceStore) -> None:
    """State the rules a second time, by brute force over all pairs."""
    part_of = {c: p for p in (*PARTS, "unused") for c in getattr(splits, p)}
    assert sorted(part_of) == sorted(store.rows)
    assert sum(len(getattr(splits, p)) for p in (*PARTS, "unused")) == len(store.rows)
    assert all(getattr(splits, part) for part in PARTS)
    for a in store.manifest.cases:
        for b in store.manifest.cases:
            related = a.group == b.group or {*a.slice_hashes} & {*b.slice_hashes} - {None}
            if related and "unused" not in (part_of[a.name], part_of[b.name]):
                assert part_of[a.name] == part_of[b.name]
    official = {row.name for row in store.manifest.cases if row.part == "test"}
    if official:
        assert set(splits.test) == official


rows_strategy = st.lists(
    st.fixed_dictionaries(
        {
            "group": st.sampled_from([f"g{i}" for i in range(12)]),
            "slice_hashes": st.tuples(
                *[st.one_of(st.none(), st.integers(0, 250).map(str)) for _ in range(3)]
            ),
            "part": st.sampled_from([None, None, None, None, "train", "test"]),
        }
    ),
    min_size=5,
    max_size=16,
)
spec_strategy = st.one_of(
    st.builds(
        SplitSpec,
        val=st.sampled_from([None, 0.1, 0.4]),
        train_frames=st.sampled_from([None, 1, 5]),
    ),
    st.builds(
        SplitSpec,
        kind=st.just("counts"),
        train=st.integers(1, 4),
        val=st.integers(1, 2),
        test=st.sampled_from([None, 1]),
    ),
    st.builds(
        SplitSpec,
        kind=st.just("kfold"),
        folds=st.integers(3, 5),
        fold=st.integers(0, 2),
        val=st.sampled_from([None, 0.3]),
    ),
)


@settings(max_examples=150, deadline=None)
@given(rows=rows_strategy, spec=spec_strategy, seed=st.integers(0, 2**32))
def test_a_split_never_leaks_and_is_complete_or_says_why_not(rows, spec, seed):
    with tempfile.TemporaryDirectory() as folder:
        store = store_of(Path(folder) / "store", rows)
        try:
            splits = make_splits(store, spec, seed)
        except MedsegError:
            return
        assert_sound(splits, store)
        assert make_splits(store, spec, seed) == splits
        splits.write(Path(folder) / "splits.json")
        assert read_splits(Path(folder) / "splits.json", store) == splits
        if spec.train_frames is not None:
            assert sum(map(len, splits.train_slices.values())) == spec.train_frames


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(9)), seed=st.integers(0, 1000))
def test_the_order_of_the_manifest_plays_no_role(order, seed):
    rows = [{"name": f"c{i}", "group": f"g{i // 2}", "slice_hashes": (str(i),)} for i in range(9)]
    with tempfile.TemporaryDirectory() as folder:
        plain = store_of(Path(folder) / "a", rows)
        shuffled = store_of(Path(folder) / "b", [rows[i] for i in order])
        spec = SplitSpec(train_frames=4)
        assert make_splits(plain, spec, seed) == make_splits(shuffled, spec, seed)


def test_the_draw_is_pinned(tmp_path):
    store = store_of(tmp_path, [{}] * 10)
    splits = make_splits(store, SplitSpec(train_frames=4))
    assert splits.val == ("c00", "c08")
    assert splits.hash == "d16b26af69b63063"


def test_the_seed_of_the_spec_moves_the_split_and_an_argument_overrides_it(tmp_path):
    store = store_of(tmp_path, [{}] * 20)
    assert make_splits(store, SplitSpec(seed=1)) != make_splits(store, SplitSpec(seed=2))
    by_argument = make_splits(store, SplitSpec(seed=1), seed=2)
    assert by_argument.hash == make_splits(store, SplitSpec(seed=2)).hash


def test_counts_of_the_paper_leave_the_other_scans_unused(tmp_path):
    store = store_of(tmp_path, [{}] * 82)
    splits = make_splits(store, SplitSpec(kind="counts", train=8, val=2, test=2))
    assert [len(getattr(splits, part)) for part in (*PARTS, "unused")] == [8, 2, 2, 70]


@pytest.mark.parametrize(
    ("groups", "spec", "sizes"),
    [
        (3, {}, [1, 1, 1]),
        (5, {}, [3, 1, 1]),
        (20, {}, [14, 3, 3]),
        (10, {"train": 0.8, "val": 0.1}, [8, 1, 1]),
        (10, {"val": 0.3, "test": 0.3}, [4, 3, 3]),
        (10, {"kind": "kfold", "folds": 5, "fold": 4}, [6, 2, 2]),
        (10, {"kind": "kfold", "folds": 5, "val": 0.25}, [6, 2, 2]),
        (4, {"kind": "kfold", "folds": 2, "val": 0.5}, [1, 1, 2]),
    ],
)
def test_sizes_of_the_parts(tmp_path, groups, spec, sizes):
    splits = make_splits(store_of(tmp_path, [{}] * groups), SplitSpec(**spec))
    assert [len(getattr(splits, part)) for part in PARTS] == sizes


def test_every_group_is_tested_in_exactly_one_fold(tmp_path):
    store = store_of(tmp_path, [{}] * 11)
    tested: list[str] = []
    for fold in range(4):
        tested.extend(make_splits(store, SplitSpec(kind="kfold", folds=4, fold=fold)).test)
    assert sorted(tested) == sorted(store.rows)


class TestDuplicates:
    def test_cases_with_an_identical_slice_stay_together_and_the_split_says_so(self, tmp_path):
        names = [f"p{i}" for i in range(8)]
        store = make_store(tmp_path / "s", cases=names, copies={"p7": "p2"})
        assert units_of(store)["p2"] == ("p2", "p7")
        for seed in range(8):
            splits = make_splits(store, SplitSpec(seed=seed))
            assert_sound(splits, store)
            assert "'p2', 'p7': kept together" in splits.notes[0]

    def test_flat_slices_say_nothing(self, tmp_path):
        store = store_of(tmp_path, [{"slice_hashes": (None, None, str(i))} for i in range(4)])
        assert len(units_of(store)) == 4

    def test_chains_of_duplicates_are_one_unit(self, tmp_path):
        hashes = [("a", "b"), ("b", "c"), ("c", "d"), ("x", "y")]
        store = store_of(tmp_path, [{"slice_hashes": pair} for pair in hashes])
        assert list(units_of(store).values()) == [("c00", "c01", "c02"), ("c03",)]


class TestOfficialTestPart:
    def rows(self) -> list[dict]:
        return [{"part": "train"}] * 6 + [{"part": "test"}] * 3

    def test_it_is_exactly_the_test_part(self, tmp_path):
        store = store_of(tmp_path, self.rows())
        for spec in ({}, {"kind": "counts", "train": 3, "val": 1}, {"kind": "kfold", "folds": 2}):
            splits = make_splits(store, SplitSpec(**spec))
            assert splits.test == ("c06", "c07", "c08")
            assert "official test part" in splits.method

    @pytest.mark.parametrize("spec", [{"test": 0.2}, {"kind": "counts", "val": 1, "test": 1}])
    def test_a_wish_for_another_test_part_is_refused(self, tmp_path, spec):
        if spec.get("kind") == "counts":
            spec = {**spec, "train": 2}
        with pytest.raises(MedsegError, match=r"official test part of 3.*Leave data\.split\.test"):
            make_splits(store_of(tmp_path, self.rows()), SplitSpec(**spec))

    def test_val_of_kfold_is_refused_because_the_fold_validates(self, tmp_path):
        with pytest.raises(MedsegError, match=r"Leave data\.split\.val out"):
            make_splits(store_of(tmp_path, self.rows()), SplitSpec(kind="kfold", val=0.2))

    def test_a_training_case_that_repeats_a_test_slice_is_left_unused(self, tmp_path):
        rows = self.rows()
        rows[0] = {"part": "train", "slice_hashes": ("8-1",)}
        splits = make_splits(store_of(tmp_path, rows), SplitSpec())
        assert splits.unused == ("c00",)
        assert "'c00': left unused" in splits.notes[0]

    def test_nothing_left_to_train_on_says_why(self, tmp_path):
        rows = [{"part": "train", "slice_hashes": ("8-1",)}] * 6 + [{"part": "test"}] * 3
        with pytest.raises(MedsegError, match=r"too little is left to train on\.\n'c00', 'c01'"):
            make_splits(store_of(tmp_path, rows), SplitSpec())

    def test_a_file_cannot_move_it(self, tmp_path):
        store = store_of(tmp_path, self.rows())
        good = make_splits(store, SplitSpec())
        moved = good.model_copy(update={"test": good.test[1:], "unused": good.test[:1]})
        with pytest.raises(MedsegError, match="'c06': in the data set's official test part"):
            check_splits(moved, store)
        added = good.model_copy(
            update={"test": (*good.test, good.train[0]), "train": good.train[1:]}
        )
        with pytest.raises(MedsegError, match="not in the data set's official test part"):
            check_splits(added, store)


class TestTooFew:
    @pytest.mark.parametrize(
        ("groups", "spec", "message"),
        [
            (1, {}, "has 1 patients or videos to divide, and a split by patient needs 3"),
            (2, {}, "has 2 patients"),
            (3, {"kind": "kfold", "folds": 5}, r"5 folds need 5 patients.*split\.folds to 3"),
            (4, {"kind": "kfold", "folds": 2}, "none is left to train on"),
            (9, {"kind": "counts", "train": 8, "val": 2, "test": 2}, r"asks for 12 .*8/2/2"),
            (9, {"kind": "counts", "train": 8, "val": 1}, "the part test is empty"),
            (9, {"kind": "counts", "train": 0, "val": 1, "test": 1}, "the part train is empty"),
            (9, {"val": 0.0}, "the part val is empty"),
            (9, {"train": 0.8, "val": 0.2}, "the part test is empty"),
            (9, {"train": 0.5, "val": 0.2, "test": 0.2}, "0.5/0.2/0.2 .* do not add up to 1"),
            (9, {"train_frames": 999}, r"split\.train_frames is 999, the training part has 18"),
        ],
    )
    def test_says_what_is_missing(self, tmp_path, groups, spec, message):
        with pytest.raises(MedsegError, match=message):
            make_splits(store_of(tmp_path, [{}] * groups), SplitSpec(**spec))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"train": 0.9, "val": 0.2}, "add up to 1 at most"),
        ({"train": 8, "val": 2, "test": 2}, "fractions lie below 1"),
        ({"kind": "counts", "train": 8}, "needs 'val'"),
        ({"kind": "counts", "train": 1.5, "val": 1}, "train 1.5 is no whole number"),
        ({"kind": "counts", "train": float("inf"), "val": 1}, "finite"),
        ({"kind": "kfold", "train": 0.5}, "'train' has no meaning for kind 'kfold'"),
        ({"folds": 3}, "'folds' has no meaning for kind 'fractions'"),
        ({"kind": "kfold", "folds": 3, "fold": 3}, "folds are numbered 0 to 2"),
        ({"kind": "file"}, "needs 'file'"),
        ({"val": -0.1}, "greater than or equal to 0"),
        ({"trian": 0.5}, "Extra inputs are not permitted"),
    ],
)
def test_a_spec_without_sense_is_refused(spec, message):
    with pytest.raises(ValidationError, match=message):
        SplitSpec(**spec)


class TestFile:
    @pytest.fixture
    def store(self, tmp_path) -> SliceStore:
        rows = [{"group": f"g{i // 2}"} for i in range(6)]
        rows[4] = {"group": "g2", "slice_hashes": ("same", "x", "y")}
        rows[1] = {"group": "g0", "slice_hashes": ("same", "u", "v")}
        return store_of(tmp_path / "store", [*rows, {"group": "g9"}, {"group": "g9"}])

    def spec(self, tmp_path: Path, content: object) -> SplitSpec:
        path = tmp_path / "mine.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return SplitSpec(kind="file", file=str(path))

    def good(self) -> dict:
        return {
            "train": ["c00", "c01", "c04", "c05"],
            "val": ["c02", "c03"],
            "test": ["c06"],
            "unused": ["c07"],
        }

    def test_a_list_made_by_hand_is_taken(self, tmp_path, store):
        splits = make_splits(store, self.spec(tmp_path, self.good()))
        assert splits.train == ("c00", "c01", "c04", "c05")
        assert splits.train_slices is None

    def test_frames_can_be_drawn_on_top(self, tmp_path, store):
        spec = self.spec(tmp_path, self.good()).model_copy(update={"train_frames": 5})
        assert sum(map(len, make_splits(store, spec).train_slices.values())) == 5

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"val": ["c02"], "test": ["c06", "c03"]}, "'c02' in val and 'c03' in test.*'g1'"),
            (
                {"train": ["c00", "c01"], "val": ["c02", "c03", "c04", "c05"]},
                "'c01' in train and 'c04' in val share an identical slice",
            ),
            ({"unused": []}, "no part has 'c07'"),
            ({"test": ["c06", "c99"]}, "test names the case 'c99', which .* does not have"),
            ({"val": ["c02", "c03", "c00"]}, "case 'c00' stands in train and in val"),
            ({"val": [], "unused": ["c07", "c02", "c03"]}, "the part val is empty"),
            ({"trian": []}, "trian: Extra inputs.*Did you mean 'train'"),
            ({"test": "c06"}, "test: Input should be a valid tuple"),
            ({"hash": "0" * 16}, "was changed after it was written"),
            ({"train_slices": {"c00": [0]}}, "each once"),
            (
                {"train_slices": {"c00": [0, 3], "c01": [], "c04": [], "c05": []}},
                "train_slices of 'c00' must be different numbers from 0 to 2",
            ),
            (
                {"train_slices": {name: [] for name in ("c00", "c01", "c04", "c05")}},
                "no slice to train on",
            ),
        ],
    )
    def test_a_bad_file_is_refused_by_name(self, tmp_path, store, change, message):
        with pytest.raises(MedsegError, match=message) as caught:
            make_splits(store, self.spec(tmp_path, {**self.good(), **change}))
        assert "mine.json" in str(caught.value)

    @pytest.mark.parametrize("content", ["[1, 2]", "{", "null", "\x00"])
    def test_a_file_of_another_kind_is_refused(self, tmp_path, store, content):
        with pytest.raises(MedsegError, match=r"mine\.json"):
            make_splits(store, self.spec(tmp_path, content))

    def test_frames_in_the_file_and_in_the_spec_exclude_each_other(self, tmp_path, store):
        slices = {"c00": [0], "c01": [], "c04": [1, 2], "c05": []}
        spec = self.spec(tmp_path, {**self.good(), "train_slices": slices})
        assert make_splits(store, spec).train_slices["c04"] == (1, 2)
        with pytest.raises(MedsegError, match="Leave one of them out"):
            make_splits(store, spec.model_copy(update={"train_frames": 2}))


def test_the_hash_follows_the_content_and_nothing_else():
    one = Splits(train=("a", "b"), val=("c",), test=("d",), method="x", seed=1)
    assert one.hash == Splits(train=("b", "a"), val=("c",), test=("d",), unused=("e",)).hash
    assert one.hash != Splits(train=("a",), val=("b", "c"), test=("d",)).hash
    assert one.hash != one.model_copy(update={"train_slices": {"a": (0,), "b": ()}}).hash
    assert len(one.hash) == 16

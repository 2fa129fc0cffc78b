"""A study whose runs lack what they shall learn from does not begin."""

from __future__ import annotations

from pathlib import Path

import pytest

from medseg_reg.data.splits import make_splits
from medseg_reg.data.store import SliceStore
from medseg_reg.errors import MedsegError
from medseg_reg.study.__main__ import run
from medseg_reg.study.grid import expand
from medseg_reg.study.placeholders import TEACHER
from medseg_reg.study.sources import require_sources
from tests.inference.made_runs import PLAIN, make_run
from tests.stores import make_store
from tests.study.studies import study_of


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> SliceStore:
    return make_store(tmp_path_factory.mktemp("data") / "store", slices=2, size=16)


def study(store, folder, path, **changes):
    methods = {"none": [], "distilled": {"overrides": {TEACHER: str(path)}}}
    return study_of(store.path, folder, methods=methods, seeds=1, **changes)


def teachers(store, folder, study):
    """Write a finished run in the place of each teacher, with the split of its pupil."""
    for cell in expand(study):
        if cell.spot.method == "distilled":
            path = folder / f"fold{cell.config.data.split.fold}"
            made = make_run(path, store, **PLAIN)
            make_splits(store, cell.config.data.split).write(made / "splits.json")


def test_all_teachers_must_be_there_before_anything_trains(store, tmp_path):
    folds = study(store, tmp_path, tmp_path / "teachers/fold{fold}", folds=3)
    with pytest.raises(
        MedsegError,
        match=r"run blobs/unet/distilled/fold0/seed0: .*teacher: .*fold0: is not a run directory"
        r".* 2 more of the runs cannot begin either\. Nothing was trained",
    ):
        run(folds, expand(folds))
    assert not (folds.directory / "runs").exists()
    teachers(store, tmp_path / "teachers", folds)
    require_sources(expand(folds))
    (tmp_path / "teachers/fold1/weights.safetensors").unlink()
    with pytest.raises(MedsegError, match=r"fold1/seed0: .*fold1: the training is not finished"):
        require_sources(expand(folds))


def test_a_teacher_of_another_fold_is_refused_before_anything_trains(store, tmp_path):
    folds = study(store, tmp_path, tmp_path / "teachers/fold{fold}", folds=3)
    teachers(store, tmp_path / "teachers", folds)
    one = study(store, tmp_path, tmp_path / "teachers/fold1", folds=3)
    with pytest.raises(
        MedsegError, match=r"fold0/seed0: .* has learned from case_.*keeps for 'test'.* 1 more of"
    ):
        require_sources(expand(one))


def test_weights_must_be_there_until_a_run_has_taken_them(store, tmp_path):
    networks = {"unet": {"pretrained": str(tmp_path / "mae/weights.safetensors")}}
    cells = expand(study_of(store.path, tmp_path, networks=networks, seeds=1))
    with pytest.raises(MedsegError, match=r"network.pretrained: .*does not exist. Make it first"):
        require_sources(cells)
    (tmp_path / "mae").mkdir()
    (tmp_path / "mae/config.yaml").write_text("masking: {}")
    with pytest.raises(MedsegError, match=r"mae is not finished. Start it again.* 1 more of the"):
        require_sources(cells)
    for cell, name in zip(cells, ("weights.safetensors", "checkpoints/last.ckpt"), strict=True):
        file = Path(cell.config.run_path) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    require_sources(cells)


def test_weights_that_know_labels_of_another_fold_are_refused_before_anything_trains(
    store, tmp_path
):
    networks = {"unet": {"pretrained": str(tmp_path / "fold1/weights.safetensors")}}
    cells = expand(study_of(store.path, tmp_path, networks=networks, folds=3, seeds=1))
    made = make_run(tmp_path / "fold1", store, **PLAIN)
    (own, *_) = fitting = [cell for cell in cells if cell.spot.part == "fold1"]
    make_splits(store, own.config.data.split).write(made / "splits.json")
    with pytest.raises(MedsegError, match=r"fold0/seed0: network.pretrained: .*has learned from"):
        require_sources(cells)
    require_sources(fitting)

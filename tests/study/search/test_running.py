"""A search finds the planted best value by the validation part, and does not see the test part."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from medseg_reg.config import load_config
from medseg_reg.data.splits import make_splits
from medseg_reg.engine.checkpoint import LAST, read_checkpoint
from medseg_reg.errors import Interrupted, MedsegError
from medseg_reg.study.search import __main__ as command
from medseg_reg.study.search.__main__ import main, run_search
from tests.stores import make_store
from tests.study.search.made_search import LR, ScoringPool, by_value, nearness, search_of
from tests.study.studies import ForkPool

import medseg_reg.train  # noqa: F401  isort: skip
import albumentations  # noqa: F401  isort: skip

BAD, GOOD = "trial0000/seed0", "trial0001/seed0"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("data") / "store", cases=6, slices=6, size=32).path


def silent(_: str) -> None:
    pass


def test_the_better_value_is_found_whatever_the_test_part_holds(tmp_path):
    tables = []
    for name in ("whole", "spoilt"):
        folder = tmp_path / name
        folder.mkdir()
        store = make_store(folder / "store", cases=6, slices=6, size=32)
        overrides = {"training.epochs": 3, "regularization.architecture": []}
        search = search_of(store.path, folder, overrides=overrides)
        if name == "spoilt":
            split = load_config(search.config).data.split
            for case in make_splits(store, split).test:
                for path in (store.path / "images", store.path / "masks"):
                    array = np.load(path / f"{case}.npy")
                    np.save(path / f"{case}.npy", np.zeros_like(array))
        tables.append(run_search(search, ForkPool(), silent)[0])
        assert not list(search.directory.rglob("evaluation"))
        assert not list(search.directory.rglob("summary.json"))
        again = ForkPool()
        pd.testing.assert_frame_equal(run_search(search, again, silent)[0], tables[-1])
        assert again.started == []
    assert tables[0]["optimizer.lr"].tolist() == [1e-2, 1e-7]
    pd.testing.assert_frame_equal(*tables)
    # The score is that of the weights that the run keeps, by the account of the training itself.
    run = search.directory / "runs" / GOOD
    (state,) = (
        one
        for one in read_checkpoint(run / "checkpoints" / LAST)["callbacks"].values()
        if "best_epoch" in one
    )
    assert tables[1]["val_dice"].iloc[0] == state["best_score"]


def test_the_score_is_that_of_the_epoch_whose_weights_are_kept(store, tmp_path):
    scores = by_value({1e-7: [0.5, 0.9, 0.4], 1e-2: [0.6, 0.6, 0.6]})
    for select, wanted in (("best", {1e-7: 0.9, 1e-2: 0.6}), ("last", {1e-7: 0.4, 1e-2: 0.6})):
        for monitor, factor in (("val_dice", 1), ("val_iou", 0.5)):
            folder = tmp_path / select / monitor
            folder.mkdir(parents=True)
            overrides = {"regularization.optimization.select": select}
            search = search_of(store, folder, overrides=overrides, monitor=monitor)
            table, _ = run_search(search, ScoringPool(scores), silent)
            found = table.set_index("optimizer.lr")[monitor]
            assert found.to_dict() == {key: factor * value for key, value in wanted.items()}


def test_a_trial_is_judged_by_the_mean_over_its_seeds(store, tmp_path):
    def scores(config):
        return [config.seed / 10] if config.optimizer.lr == 1e-2 else [0.32]

    table, _ = run_search(search_of(store, tmp_path, seeds=[1, 3, 5]), ScoringPool(scores), silent)
    assert table["optimizer.lr"].tolist() == [1e-7, 1e-2]
    assert table["val_dice"].iloc[1] == pytest.approx(0.3)


def test_failed_trials_are_told_as_those_of_a_study(store, tmp_path, monkeypatch, capsys):
    search = search_of(store, tmp_path, parameters={"optimizer.lr": [1e-7, 1e-2, 1e-4]})
    file = tmp_path / "search.yaml"
    content = search.model_dump(mode="json", exclude_unset=True)
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    pools = [
        ScoringPool(by_value({1e-7: None, 1e-2: [0.7], 1e-4: None})),
        ScoringPool(by_value({1e-7: [0.9], 1e-4: None})),
        ScoringPool(by_value({1e-4: [0.8]})),
    ]
    monkeypatch.setattr(command, "make_pool", lambda *_: pools.pop(0))
    failures = search.directory / "failures.csv"

    def run() -> str:
        main(["--config", str(file)])
        return capsys.readouterr().out

    with pytest.raises(SystemExit) as end:
        run()
    assert end.value.code == 1
    said = capsys.readouterr().out
    assert f"2 runs have failed: see {failures}" in said
    assert "[1/3] trial0000 seed0: FAILED: error: made to fail." in said
    table = pd.read_csv(failures)
    assert table.columns.tolist() == ["trial", "seed", "exit_code", "error", "log"]
    assert table["trial"].tolist() == [0, 2]
    assert (search.directory / table["log"].iloc[0]).exists()
    assert load_config(search.directory / "best.yaml").optimizer.lr == 1e-2
    # Those that failed, and no others, are tried again.
    with pytest.raises(SystemExit):
        run()
    assert "1 run has failed" in capsys.readouterr().out
    assert pd.read_csv(failures)["trial"].tolist() == [2]
    said = run()
    assert not failures.exists()
    assert "best" in said
    assert load_config(search.directory / "best.yaml").optimizer.lr == 1e-7


def test_a_search_whose_trials_have_all_failed_names_no_best(store, tmp_path):
    table, failures = run_search(search_of(store, tmp_path), ScoringPool(lambda _: None), silent)
    assert table["val_dice"].isna().all()
    assert len(failures) == 2
    assert not (tmp_path / "search" / "best.yaml").exists()


def test_progress_has_the_score_and_the_time_left(store, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "medseg_reg.study.runner.time.monotonic", iter(range(0, 10**6, 30)).__next__
    )
    lines: list[str] = []
    run_search(search_of(store, tmp_path, seeds=2), ScoringPool(nearness), lines.append)
    assert lines[0].endswith("search: 4 runs, 4 to do")
    assert lines[1] == (
        "[1/4] trial0000 seed0: optimizer.lr: 1e-07: val_dice 0.5500, 30 s; about 2 min left"
    )
    assert lines[4] == "[4/4] trial0001 seed1: optimizer.lr: 0.01: val_dice 0.9500, 30 s"


@pytest.mark.parametrize("last", [False, True])
def test_a_stop_is_obeyed_and_one_after_the_last_run_is_too_late(store, tmp_path, last):
    search = search_of(store, tmp_path)
    pool = ScoringPool(nearness, signal_at=GOOD if last else BAD)
    if last:
        assert run_search(search, pool, silent)[0]["trial"].tolist() == [1, 0]
        assert (search.directory / "best.yaml").exists()
        return
    with pytest.raises(Interrupted, match="1 of 2 runs have ended.*The same command goes on"):
        run_search(search, pool, silent)
    assert not (search.directory / "best.yaml").exists()
    table = pd.read_csv(search.directory / "trials.csv")
    assert table.loc[table["val_dice"].notna(), "trial"].tolist() == [0]
    again = ScoringPool(nearness)
    run_search(search, again, silent)
    assert again.started == [GOOD]


def test_runs_of_other_settings_or_missing_data_are_told_before_anything_runs(store, tmp_path):
    run_search(search_of(store, tmp_path), ScoringPool(nearness), silent)
    pool = ScoringPool(nearness)
    with pytest.raises(MedsegError, match="holds a run with other settings.*optimizer.lr"):
        run_search(search_of(store, tmp_path, parameters={"optimizer.lr": [1]}), pool, silent)
    search = search_of(tmp_path / "gone", tmp_path, run=str(tmp_path / "other"))
    with pytest.raises(MedsegError, match="gone"):
        run_search(search, pool, silent)
    assert pool.started == []


def test_trials_of_optuna_share_several_workers_and_go_on_as_they_began(store, tmp_path):
    pytest.importorskip("optuna", reason="Optuna is not installed (the extra 'search')")

    def optuna(name):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        spec = {"method": "optuna", "trials": 13, "workers": 3, "parameters": LR}
        return search_of(store, folder, **spec)

    pool = ScoringPool(nearness, size=3)
    whole, _ = run_search(optuna("a"), pool, silent)
    assert pool.most == 3
    # The newest first, and stopped on the way; then one at a time.
    stopped = ScoringPool(nearness, 3, lambda going: len(going) - 1, "trial0006/seed0")
    with pytest.raises(Interrupted):
        run_search(optuna("b"), stopped, silent)
    again = ScoringPool(nearness)
    parted, _ = run_search(optuna("b"), again, silent)
    assert 3 < len(again.started) < 13
    pd.testing.assert_frame_equal(parted, whole)
    assert math.log10(whole["optimizer.lr"].iloc[0]) == pytest.approx(-2.5, abs=0.5)

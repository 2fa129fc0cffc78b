"""A study that is killed, stopped or has failing runs ends with the results of one that has not."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from medseg_reg.errors import Interrupted, MedsegError
from medseg_reg.study.grid import expand
from medseg_reg.study.results import COLUMNS, write_results
from medseg_reg.study.runner import check_existing, is_finished, run_cells
from medseg_reg.study.spec import StudySpec
from tests.stores import make_store
from tests.study.studies import ForkPool, study_of

# Imported before the children are forked, so that they need not.
import medseg_reg.train  # noqa: F401  isort: skip
import albumentations  # noqa: F401  isort: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("data") / "store", cases=6, slices=6, size=32).path


def run(study: StudySpec, pool: ForkPool, lines: list[str] | None = None) -> Any:
    study.directory.mkdir(parents=True, exist_ok=True)
    cells = expand(study)
    return run_cells(study, cells, pool, (lines if lines is not None else []).append)


def results(study: StudySpec) -> bytes:
    return write_results(study, expand(study)).read_bytes()


@pytest.fixture(scope="module")
def straight(store: Path, tmp_path_factory: pytest.TempPathFactory) -> StudySpec:
    study = study_of(store, tmp_path_factory.mktemp("straight"))
    lines: list[str] = []
    assert run(study, ForkPool(), lines) == []
    assert len(lines) == 4
    assert lines[-1].startswith("[4/4] blobs unet")
    assert "DICE" in lines[-1]
    assert "left" in lines[0]
    return study


def test_every_run_is_in_the_results_once_and_as_it_was_evaluated(straight):
    results(straight)
    table = pd.read_csv(straight.directory / "results.csv")
    assert tuple(table.columns) == COLUMNS
    keys = ["dataset", "network", "method", "seed", "case", "class", "metric"]
    assert not table.duplicated(keys).any()
    assert set(zip(table["method"], table["seed"], strict=True)) == {
        (method, seed) for method in ("none", "dropout") for seed in (0, 1)
    }
    assert table["split"].nunique() == 1
    assert len(table) == 4 * 2 * len(straight.metrics)  # two test cases, one class
    one = table[(table["run"] == "runs/blobs/unet/dropout/seed1") & (table["metric"] == "iou")]
    own = pd.read_csv(straight.directory / one["run"].iloc[0] / "evaluation" / "per_case.csv")
    assert one["value"].tolist() == own.sort_values("case")["iou"].tolist()


def test_the_methods_and_seeds_give_different_networks(straight):
    results(straight)
    table = pd.read_csv(straight.directory / "results.csv")
    errors = table[table["metric"] == "ece"].groupby("run")["value"].mean()
    assert errors.nunique() == 4


def test_a_finished_study_runs_nothing_again(straight):
    pool = ForkPool()
    assert run(straight, pool) == []
    assert pool.started == []


def test_runs_that_were_killed_go_on_to_the_same_results(straight, store, tmp_path):
    study = study_of(store, tmp_path)
    # Just begun, in the training, and while it is evaluated.
    kills = {0: "config.yaml", 1: "checkpoints/*.ckpt", 2: "weights.safetensors"}
    pool = ForkPool(kill=kills)
    failures = run(study, pool)
    assert len(pool.killed) == len(kills)
    assert {failure.spot.path for failure in failures} == set(pool.killed)
    for number, sign in kills.items():
        assert any((study.directory / "runs" / pool.started[number]).glob(sign))
    assert {c.path for c in expand(study) if not is_finished(c, study)} == set(pool.killed)
    table = pd.read_csv(study.directory / "failures.csv")
    assert table["error"].str.startswith("killed by SIGKILL").all()
    again = ForkPool()
    assert run(study, again) == []
    assert sorted(again.started) == sorted(pool.killed)
    assert not (study.directory / "failures.csv").exists()
    assert results(study) == results(straight)


def test_a_signal_stops_all_runs_and_the_same_study_goes_on(straight, store, tmp_path):
    study = study_of(store, tmp_path)
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    began = time.monotonic()
    with pytest.raises(Interrupted, match="of 4 runs have ended.*goes on"):
        run(study, ForkPool(1))
    assert time.monotonic() - began < 60
    assert not (study.directory / "failures.csv").exists()
    assert run(study, ForkPool()) == []
    assert results(study) == results(straight)


def test_a_run_that_fails_is_told_and_does_not_stop_the_others(straight, store, tmp_path):
    # A place that the network does not have is found when the run begins.
    wrong = [{"name": "dropout", "places": "encoder.7", "p": 0.3}]
    methods = {"none": [], "wrong": wrong, "dropout": [{"name": "dropout", "p": 0.3}]}
    study = study_of(store, tmp_path, methods=methods)
    lines: list[str] = []
    failures = run(study, ForkPool(), lines)
    assert {failure.spot.method for failure in failures} == {"wrong"}
    table = pd.read_csv(study.directory / "failures.csv")
    assert table["seed"].tolist() == [0, 1]
    assert table["error"].str.contains("encoder.7").all()
    assert all((study.directory / log).exists() for log in table["log"])
    assert sum("FAILED" in line for line in lines) == 2
    assert results(study) == results(straight)


def test_a_study_with_other_settings_does_not_take_over_old_runs(straight, store):
    changed = straight.model_copy(update={"overrides": {**straight.overrides, "optimizer.lr": 0.5}})
    with pytest.raises(MedsegError, match="holds a run with other settings.*optimizer.lr"):
        check_existing(expand(changed))


def test_a_study_can_be_made_larger(straight, store):
    larger = straight.model_copy(update={"seeds": (0, 1, 2)})
    todo = [cell for cell in expand(larger) if not is_finished(cell, larger)]
    assert {cell.spot.seed for cell in todo} == {2}
    check_existing(expand(larger))

"""A search finds the planted best value by the validation part, and does not see the test part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from medseg_reg.config import load_config
from medseg_reg.data.splits import make_splits
from medseg_reg.data.store import SliceStore
from medseg_reg.errors import Interrupted, MedsegError
from medseg_reg.study import search as search_module
from medseg_reg.study.search import (
    SearchSpec,
    grid_trials,
    load_search,
    optuna_trials,
    run_search,
)
from tests.stores import make_store
from tests.study.studies import ForkPool, MadePool
from tests.training import tiny_config, write_config

import medseg_reg.train  # noqa: F401  isort: skip
import albumentations  # noqa: F401  isort: skip


def search_of(store: Path, folder: Path, **changes) -> SearchSpec:
    file = write_config(folder / "base.yaml", tiny_config(store, folder / "run"))
    content = {
        "name": "tiny",
        "run": str(folder / "search"),
        "config": str(file),
        "overrides": {"training.epochs": 8, "regularization.architecture": []},
        "parameters": {"optimizer.lr": [1e-7, 1e-2]},
        **changes,
    }
    return SearchSpec.model_validate(content)


def test_the_better_value_is_found_whatever_the_test_part_holds(tmp_path):
    tables = []
    for name in ("whole", "spoilt"):
        folder = tmp_path / name
        folder.mkdir()
        store = make_store(folder / "store", cases=6, slices=6, size=32)
        search = search_of(store.path, folder)
        if name == "spoilt":
            split = load_config(search.config).data.split
            for case in make_splits(store, split).test:
                for path in (store.path / "images", store.path / "masks"):
                    array = np.load(path / f"{case}.npy")
                    np.save(path / f"{case}.npy", np.zeros_like(array))
        search.directory.mkdir(parents=True)
        tables.append(run_search(search, ForkPool()))
        assert not list(search.directory.rglob("evaluation"))
        assert not list(search.directory.rglob("summary.json"))
        again = ForkPool()
        pd.testing.assert_frame_equal(run_search(search, again), tables[-1])
        assert again.started == []
    assert tables[0]["optimizer.lr"].tolist() == [1e-2, 1e-7]
    pd.testing.assert_frame_equal(*tables)
    best = load_config(tmp_path / "whole" / "search" / "best.yaml")
    assert best.optimizer.lr == 1e-2
    assert best.run == "runs/{name}/seed{seed}"
    SliceStore(best.data.store)


@pytest.mark.parametrize("last", [False, True])
def test_a_stop_between_two_rounds_is_obeyed_and_one_after_the_last_is_too_late(
    tmp_path, monkeypatch, last
):
    search = search_of(tmp_path / "store", tmp_path)
    search.directory.mkdir(parents=True)
    (trials,) = grid_trials(search)
    monkeypatch.setattr(search_module, "grid_trials", lambda _: ([one] for one in trials))
    monkeypatch.setattr(search_module, "score_of", lambda trial, _: 0.5 + trial.number)
    pool = MadePool(signal_at=f"trial{int(last):04d}/seed0")
    if last:
        assert run_search(search, pool)["trial"].tolist() == [1, 0]
        assert (search.directory / "best.yaml").exists()
    else:
        with pytest.raises(Interrupted, match="1 trials have ended"):
            run_search(search, pool)
        assert not (search.directory / "best.yaml").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("parameters.a={low: 0.1, high: 0.5}", "a grid needs lists, or set method: optuna"),
        ("parametrs={}", "Did you mean 'parameters'"),
        ("method=bayes", "'method'"),
        ("parameters.seed=[1, 2]", r"parameters: 'seed' is set .* search itself. .*'seeds'"),
        ("overrides={run: runs/a}", r"overrides: 'run' is set .* search itself. Set 'run' of"),
        ("trials=3", r"trials does nothing with method: grid"),
        ("together=1", r"together does nothing with method: grid"),
        ("sampler_seed=0", r"sampler_seed does .* Leave it out, or set method: optuna"),
    ],
)
def test_a_mistake_is_told(tmp_path, change, message):
    search = search_of(tmp_path / "store", tmp_path)
    path = tmp_path / "search.yaml"
    content = search.model_dump(mode="json", exclude_unset=True)
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(MedsegError, match=message):
        load_search(path, [change])


@pytest.mark.filterwarnings("ignore")
def test_optuna_draws_the_same_trials_again_and_comes_near_the_best(tmp_path):
    pytest.importorskip("optuna", reason="Optuna is not installed (the extra 'search')")
    search = search_of(
        tmp_path / "store",
        tmp_path,
        method="optuna",
        trials=25,
        parameters={"optimizer.lr": {"low": 1e-5, "high": 1.0, "log": True}},
    )

    def drawn() -> list[float]:
        scores: dict[int, float] = {}
        values = []
        for (trial,) in optuna_trials(search, scores):
            rate = trial.parameters["optimizer.lr"]
            values.append(rate)
            scores[trial.number] = -abs(np.log10(rate) + 2.5)
        return values

    first = drawn()
    assert first == drawn()
    assert min(abs(np.log10(rate) + 2.5) for rate in first) < 0.2
    assert len(set(first)) == 25

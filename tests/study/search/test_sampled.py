"""Searches by a sampler: rounds, failures, stops, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from medseg_reg.config import Config
from medseg_reg.errors import Interrupted, MedsegError
from medseg_reg.study.samplers import SAMPLERS
from medseg_reg.study.search.__main__ import run_search
from medseg_reg.study.search.checks import check_values
from medseg_reg.study.search.sampled import Sampled
from medseg_reg.study.search.spec import SearchSpec, load_search
from medseg_reg.study.spec import MethodSpec
from tests.stores import make_store
from tests.study.search.made_patterns import LAYER, content_of
from tests.study.search.made_search import ScoringPool
from tests.training import write_config


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("sampled") / "store", cases=6, slices=1).path


def search_of(store: Path, folder: Path, **changes: Any) -> SearchSpec:
    search = SearchSpec.model_validate(content_of(store, folder, **changes))
    search.directory.mkdir(parents=True, exist_ok=True)
    return search


def worth(config: Config) -> list[float]:
    """Return a score that the pattern decides."""
    parameters = config.regularization.architecture[0].parameters
    return [0.5 + parameters["p"] + 0.1 * (parameters["size"] == 2)]


def quiet(search: SearchSpec, pool: ScoringPool) -> pd.DataFrame:
    return run_search(search, pool, lambda _: None)[0]


@pytest.mark.parametrize("method", SAMPLERS)
def test_stopped_and_started_again_it_makes_the_same_proposals(store, tmp_path, method):
    whole = quiet(search_of(store, tmp_path / "whole", method=method), ScoringPool(worth, size=2))
    search = search_of(store, tmp_path / "cut", method=method)
    began: list[str] = []
    for stop_at in ("trial0001/seed0", "trial0003/seed0", ""):
        pool = ScoringPool(worth, size=2, signal_at=stop_at)
        if stop_at:
            with pytest.raises(Interrupted):
                quiet(search, pool)
        else:
            table = quiet(search, pool)
        began += pool.started
    pd.testing.assert_frame_equal(table, whole)
    assert len(whole) == len({*began}) == 6


def test_a_round_waits_for_all_of_the_one_before(store, tmp_path):
    search, ended = search_of(store, tmp_path, method="random", trials=10, together=3), set[int]()
    drawn: list[int] = []
    for trial in Sampled(search).trials(lambda trial: trial.number in ended, lambda _: 0.5):
        if trial is None:
            ended.add(min({*drawn} - ended))
        else:
            assert ended >= set(range(3 * (trial.number // 3)))
            drawn.append(trial.number)
    assert drawn == list(range(10))


def test_a_failure_that_has_a_score_now_leaves_what_was_drawn_as_it_was(store, tmp_path):
    search = search_of(store, tmp_path, trials=8)

    def drawn(score):
        trials = Sampled(search).trials(lambda _: True, score)
        return [trial.parameters for trial in trials if trial is not None]

    def half_failed(trial):
        return math.nan if trial.number % 2 else 0.1 * trial.number

    before = drawn(half_failed)
    assert drawn(lambda trial: -float(trial.number)) == before
    assert [trial.parameters for trial in Sampled(search).known()] == before


def test_other_settings_of_what_learns_are_refused_where_a_search_goes_on(store, tmp_path):
    quiet(search_of(store, tmp_path, method="evolution"), ScoringPool(worth))
    for changes, message in (
        ({"evolution": {"population": 5, "sample": 3}}, r"other evolution \(.*'population': 4"),
        ({"together": 3}, r"other together \(2, now 3\)"),
    ):
        with pytest.raises(MedsegError, match=message):
            Sampled(search_of(store, tmp_path, method="evolution", **changes))
    with pytest.raises(MedsegError, match=r"other method \(evolution, now controller\)"):
        Sampled(search_of(store, tmp_path))
    # The settings of another method, and a larger number of trials, change no draw.
    other = search_of(store, tmp_path, method="evolution", trials=9, controller={"lr": 0.1})
    assert len(Sampled(other).known()) == 6


def test_random_search_may_go_on_in_rounds_of_another_size(store, tmp_path):
    whole = quiet(search_of(store, tmp_path / "a", method="random"), ScoringPool(worth))
    part = {"method": "random", "trials": 3, "together": 1}
    quiet(search_of(store, tmp_path / "b", **part), ScoringPool(worth))
    rest = quiet(search_of(store, tmp_path / "b", method="random", together=4), ScoringPool(worth))
    pd.testing.assert_frame_equal(rest, whole)


@pytest.mark.parametrize(
    "drawn",
    [{f"{LAYER}.p": 4}, {f"{LAYER}.p": "x"}, {f"{LAYER}.p": -1}, {}, {"other": 0}, None],
)
def test_a_damaged_file_of_what_was_drawn_is_told(store, tmp_path, drawn):
    search = search_of(store, tmp_path, method="random", parameters={f"{LAYER}.p": [0.1, 0.2]})
    Sampled(search).keep({f"{LAYER}.p": 1})
    assert len(Sampled(search).known()) == 1
    Sampled(search).keep(drawn)
    with pytest.raises(MedsegError, match=r"drawn.json: is damaged. Delete it to draw anew"):
        Sampled(search)


def test_no_value_is_null_in_the_table_as_in_the_file(store, tmp_path):
    search = search_of(store, tmp_path, parameters={f"{LAYER}.repeat": [None, 2]}, method="random")
    table = quiet(search, ScoringPool(lambda _: [0.5]))
    assert set(table[f"{LAYER}.repeat"]) == {"null", 2}
    text = (search.directory / "trials.csv").read_text("utf-8")
    assert ",null," in text
    assert ",2," in text


@pytest.mark.parametrize("method", SAMPLERS)
def test_failures_do_not_end_a_search(store, tmp_path, method):
    def half(config):
        fails = config.regularization.architecture[0].parameters["repeat"] is None
        return None if fails else worth(config)

    search = search_of(store, tmp_path, method=method)
    table, failures = run_search(search, ScoringPool(half, size=2), lambda _: None)
    assert 0 < len(failures) == table["val_dice"].isna().sum() < 6
    assert table["val_dice"].iloc[0] == table["val_dice"].max()


def test_the_best_is_a_method_of_a_study(store, tmp_path):
    search = search_of(store, tmp_path, method="evolution", seeds=[3, 5])
    pool = ScoringPool(worth, size=2)
    best = quiet(search, pool).iloc[0]
    assert sorted({name.split("/")[1] for name in pool.started}) == ["seed3", "seed5"]
    found = yaml.safe_load((search.directory / "method.yaml").read_text("utf-8"))
    (layer,) = MethodSpec.model_validate(found).architecture
    assert (layer.name, layer.places) == ("auto_dropout", ("after_norm",))
    assert layer.parameters["p"] == best[f"{LAYER}.p"]
    assert str(layer.parameters["size"]) == str(best[f"{LAYER}.size"])


def test_a_value_that_makes_no_configuration_is_told_before_anything_runs(store, tmp_path):
    search = search_of(store, tmp_path, parameters={f"{LAYER}.size": [2, [4, 3, 1]]})
    with pytest.raises(MedsegError, match=r"size: \[4, 3, 1\]: .*size must be one number"):
        check_values(search)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameters": {"optimizer.lr": {"low": 0.1, "high": 0.5}}},
         "optimizer.lr is a range: method: controller needs lists"),
        ({"controller": {"widht": 8}}, "Did you mean 'width'"),
        ({"controller": {"lr": 0}}, "controller.lr"),
        ({"controller": {"width": 9}}, "width 9 is not divisible by 2 heads"),
        ({"evolution": {"population": 2}}, "a sample of 6 is larger than the population of 2"),
        ({"trials": 0}, "'trials'"),
        ({"method": "optuna"}, "evolution does nothing with method: optuna"),
        ({"method": "optuna", "controller": {"lr": 0.1}}, "controller does nothing with"),
        ({"method": "evolution", "trials": 4}, "4 trials and a population of 4: all would"),
    ],
)  # fmt: skip
def test_a_mistake_is_told(store, tmp_path, changes, message):
    path = write_config(tmp_path / "search.yaml", content_of(store, tmp_path, **changes))
    with pytest.raises(MedsegError, match=message):
        load_search(path)

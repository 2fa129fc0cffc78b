"""A search refuses what would do nothing, and what would make its scores say nothing."""

from __future__ import annotations

import pytest
import yaml

from medseg_reg.errors import MedsegError
from medseg_reg.study.search.spec import SearchSpec, load_search
from medseg_reg.study.search.trials import grid_trials
from tests.study.search.made_search import search_of

CASES = "it decides what is validated on, so the scores could not be compared"
SCORE = "it decides how the score is taken, so the scores could not be compared"
NOTHING = "it says how a training is carried out, not what is trained"


def refusal(tmp_path, *changes: str) -> str:
    search = search_of(tmp_path / "store", tmp_path)
    path = tmp_path / "search.yaml"
    content = search.model_dump(mode="json", exclude_unset=True)
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(MedsegError) as error:
        load_search(path, changes)
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("parameters.a={low: 0.1, high: 0.5}", "a grid needs lists, or set method: optuna"),
        ("parametrs={}", "Did you mean 'parameters'"),
        ("parameters={a: []}", "'parameters.a.values': the list is empty"),
        ("parameters={a: [1, 2, 1]}", "'parameters.a.values': 1 stands there twice"),
        ("parameters={a: 0.1}", "'parameters.a': give a list of values, or a range as {low: 0.1"),
        ("parameters={a: {low: 0.1}}", "'parameters.a.high' is missing. Add it"),
        ("parameters={a: {low: 2, high: 1}}", "'parameters.a': low must be below high"),
        ("parameters={a: {low: 2, hihg: 1}}", "'parameters.a.hihg'. Did you mean 'high'"),
        ("method=bayes", "'method'"),
        ("parameters.seed=[1, 2]", "parameters: 'seed' is set for each run by the search itself"),
        ("overrides={run: runs/a}", "'run' is set for each run by the search itself. Set 'run' of"),
        ("trials=3", "trials does nothing with method: grid"),
        ("together=1", "together does nothing with method: grid"),
        ("sampler_seed=0", "sampler_seed does nothing with method: grid, which"),
        ("overrides={optimizer: {lr: 1}}", "'optimizer.lr' would do nothing: it is searched"),
        ("seeds=[1, 1]", "seeds: one number stands there twice"),
    ],
)
def test_a_mistake_is_told(tmp_path, change, message):
    assert message in refusal(tmp_path, change)


@pytest.mark.parametrize(
    ("parameter", "key", "why"),
    [
        ("{data.split.seed: [0, 1]}", "data.split.seed", CASES),
        ("{data.split: [{kind: kfold, fold: 1}]}", "data.split.kind", CASES),
        ("{data: [{split: {seed: 1}}]}", "data.split.seed", CASES),
        ("{data.store: [a, b]}", "data.store", CASES),
        ("{data.image.window: [[0, 1]]}", "data.image.window", CASES),
        ("{data.phantom.cases: [8, 12]}", "data.phantom.cases", CASES),
        ("{evaluation.empty: [one, nan]}", "evaluation.empty", SCORE),
        ("{regularization.optimization.select: [best, last]}", "optimization.select", SCORE),
        ("{training.validate_every: [1, 2]}", "training.validate_every", SCORE),
        ("{evaluation: [{bins: 5}]}", "evaluation.bins", SCORE),
        ("{data.ignore_label: [254, 255]}", "data.ignore_label", SCORE),
        ("{data.resident: [true, false]}", "data.resident", NOTHING),
        ("{training.devices: [1, 2]}", "training.devices", NOTHING),
        ("{name: [a, b]}", "name", "it is a name"),
    ],
)
def test_what_is_no_hyper_parameter_is_not_searched(tmp_path, parameter, key, why):
    said = refusal(tmp_path, f"parameters={parameter}")
    assert f"{key}' is no parameter to be searched: {why}. Set it in 'overrides'" in said


def test_such_keys_may_be_set_for_all_trials(tmp_path):
    search = search_of(
        tmp_path / "store", tmp_path, overrides={"data.split.seed": 3, "evaluation.empty": "nan"}
    )
    assert {
        cell.config.data.split.seed for trial in grid_trials(search) for cell in trial.cells
    } == {3}


def test_what_decides_the_training_may_be_searched(tmp_path):
    parameters = {
        "data.batch_size": [1, 2],
        "data.sampling.foreground_share": [0.25, 0.5],
        "training.epochs": [2, 3],
        "regularization.optimization.early_stopping": [None, {"patience": 2}],
        "network.channels": [[4, 8], [8, 16]],
    }
    search = search_of(tmp_path / "store", tmp_path, overrides={}, parameters=parameters)
    assert len(list(grid_trials(search))) == 2**5


def test_a_group_may_be_set_where_a_key_in_it_is_searched(tmp_path):
    search = search_of(
        tmp_path / "store",
        tmp_path,
        overrides={"regularization.architecture": [{"name": "dropout", "p": 0.5}]},
        parameters={"regularization.architecture.0.p": [0.1, 0.2]},
    )
    rates = [
        trial.cells[0].config.regularization.architecture[0].parameters["p"]
        for trial in grid_trials(search)
    ]
    assert rates == [0.1, 0.2]


@pytest.mark.parametrize(
    ("workers", "gpus", "seeds", "wanted"), [(4, 0, 1, 4), (4, 0, 3, 2), (1, 2, 1, 2), (2, 0, 5, 1)]
)
def test_as_many_trials_go_on_as_there_is_room_for(workers, gpus, seeds, wanted):
    content = {"name": "x", "config": "x.yaml", "parameters": {"seed_": [0]}, "method": "optuna"}
    search = SearchSpec(**content, workers=workers, gpus=gpus, seeds=seeds)
    assert search.trials_at_a_time == wanted
    assert SearchSpec(**content, workers=workers, together=7).trials_at_a_time == 7


def test_a_last_epoch_without_a_score_is_refused_where_its_weights_are_kept(tmp_path):
    overrides = {
        "training.epochs": 5,
        "training.validate_every": 2,
        "regularization.optimization.select": "last",
    }
    search = search_of(tmp_path / "store", tmp_path, overrides=overrides)
    with pytest.raises(MedsegError, match=r"trial 0: .*the last of 5 epochs is not validated"):
        next(grid_trials(search))
    next(
        grid_trials(
            search_of(tmp_path / "store", tmp_path, overrides={**overrides, "training.epochs": 6})
        )
    )

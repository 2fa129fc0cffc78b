"""Optuna's draws depend on the scores and on nothing else, and are kept."""

from __future__ import annotations

import json
import math
import random

import pytest

from medseg_reg.errors import MedsegError
from medseg_reg.study.search.draws import Draws
from tests.study.search.made_search import LR, search_of

pytest.importorskip("optuna", reason="Optuna is not installed (the extra 'search')")


@pytest.fixture
def search(tmp_path):
    def make(name="a", **changes):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        changes = {"method": "optuna", "trials": 25, "parameters": LR, "together": 1, **changes}
        return search_of(tmp_path / "store", folder, **changes)

    return make


def score(trial) -> float:
    return -abs(math.log10(trial.parameters["optimizer.lr"]) + 2.5)


def drawn(search, *, judge=score, failed=(), late=0, seed=0, stop_after=10**9) -> list[float]:
    """Return the values drawn.

    Args:
        search: what is drawn for.
        judge: returns the score of a trial.
        failed: numbers of trials without a score.
        late: how many of the trials that go on end after each draw, at most; in any order.
        seed: of that order.
        stop_after: so many draws.
    """
    rng, ended, values, going = random.Random(seed), set(), [], []
    source = Draws(search).trials(
        lambda trial: trial.number in ended,
        lambda trial: math.nan if trial.number in failed else judge(trial),
    )
    for trial in source:
        if trial is not None:
            values.append(trial.parameters["optimizer.lr"])
            going.append(trial.number)
            if len(values) == stop_after:
                break
        assert len(values) - min(set(range(30)) - ended) <= search.trials_at_a_time
        # One ends at least where nothing else can happen.
        for _ in range(1 if trial is None else rng.randint(0, late)):
            if going:
                ended.add(going.pop(rng.randrange(len(going))))
    return values


def test_the_best_value_is_come_near_to_by_the_scores(search):
    values = drawn(search(trials=20))
    assert len(set(values)) == 20
    assert min(abs(math.log10(value) + 2.5) for value in values) < 0.2
    # The first ten are random.
    against = drawn(search("b", trials=20), judge=lambda trial: -score(trial))
    assert values[:10] == against[:10]
    assert not set(values[10:]) & set(against[10:])


def test_the_order_in_which_trials_end_changes_nothing(search):
    first = drawn(search("a", together=3, trials=14))
    for number in (1, 2):
        assert drawn(search(f"b{number}", together=3, trials=14), late=3, seed=number) == first
    assert drawn(search("c", together=3, trials=14, sampler_seed=1)) != first


def test_a_search_that_goes_on_draws_what_it_would_have_drawn(search):
    whole = drawn(search("a", together=2, trials=14))
    part = search("b", together=2, trials=14)
    assert drawn(part, stop_after=12) == whole[:12]
    assert [trial.parameters["optimizer.lr"] for trial in Draws(part).known()] == whole[:12]
    assert drawn(part) == whole
    assert drawn(search("b", together=2, trials=16))[:14] == whole


def test_a_trial_that_had_failed_and_has_a_score_now_leaves_the_others_as_they_were(search):
    one = search(trials=14)
    before = drawn(one, failed=(3, 4, 11), stop_after=13)
    after = drawn(one)
    assert after[:13] == before
    assert after[13] != drawn(search("b", trials=14), failed=(3, 4, 11))[13]


def test_lists_are_chosen_from_and_whole_numbers_are_whole(search):
    parameters = {
        "network.channels": [[4, 8], [8, 16]],
        "data.batch_size": {"low": 1, "high": 4, "integer": True},
    }
    one = search(parameters=parameters, trials=6)
    trials = list(Draws(one).trials(lambda _: True, lambda trial: trial.number))
    assert {type(trial.parameters["data.batch_size"]) for trial in trials} == {int}
    assert {tuple(trial.parameters["network.channels"]) for trial in trials} == {(4, 8), (8, 16)}
    assert Draws(one).known() == trials


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"sampler_seed": 5}, "sampler_seed"),
        ({"parameters": {"optimizer.lr": {"low": 1e-4, "high": 1.0}}}, "parameters"),
    ],
)
def test_draws_of_another_search_are_refused(search, change, key):
    drawn(search(), stop_after=2)
    with pytest.raises(MedsegError, match=f"drawn.json: its trials were drawn with other {key}"):
        Draws(search(**change))


@pytest.mark.parametrize("content", [[], {"trials": []}])
def test_a_damaged_file_of_draws_is_told(search, content):
    one = search()
    (one.directory / "drawn.json").write_text(json.dumps(content))
    with pytest.raises(MedsegError, match="drawn.json: is damaged"):
        Draws(one)

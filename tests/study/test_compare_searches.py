"""Samplers side by side have equal budgets, and their figure shows the best so far."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from medseg_reg.study import compare_searches
from medseg_reg.study.search.__main__ import run_search
from tests.stores import make_store
from tests.study.search.made_patterns import content_of
from tests.study.search.made_search import ScoringPool
from tests.training import write_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Compare with trainings that only end; return the folder of the search."""
    folder = tmp_path_factory.mktemp("compared")
    store = make_store(folder / "store", cases=6, slices=1).path

    def score(config):
        p = config.regularization.architecture[0].parameters["p"]
        return None if p == 0.4 else [p]

    def search_made(search, ray):
        search.directory.mkdir(parents=True, exist_ok=True)
        return run_search(search, ScoringPool(score), lambda _: None)

    path = write_config(folder / "search.yaml", content_of(store, folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_searches, "search_in_directory", search_made)
        with pytest.raises(SystemExit, match="1"):  # some have failed
            compare_searches.main(["--config", str(path), "--sampler-seeds", "2"])
    return folder / "search"


@pytest.fixture
def compared(folder):
    """The numbers of the figure."""
    return pd.read_csv(folder / "best_so_far.csv")


def test_each_method_and_sampler_seed_has_the_same_trials(compared, folder):
    counts = compared.groupby(["method", "sampler_seed"])["trial"].agg(list)
    assert len(counts) == 6
    assert all(trials == list(range(6)) for trials in counts)
    for method in ("controller", "random", "evolution"):
        one = folder / method / "sampler1"
        assert len(pd.read_csv(one / "trials.csv")) == 6
        assert (one / "method.yaml").exists()
    assert (folder / "best_so_far.png").stat().st_size > 1000


def test_the_best_so_far_never_falls_and_no_failure_counts(compared):
    assert compared["reward"].isna().any()
    for _, rows in compared.groupby(["method", "sampler_seed"]):
        best = -math.inf
        for reward, shown in zip(rows["reward"], rows["best"], strict=True):
            best = max(best, -math.inf if math.isnan(reward) else reward)
            assert shown == best or (math.isnan(shown) and best == -math.inf)


def test_evolution_begins_with_the_random_sequences_of_the_same_seed(compared):
    keys = [key for key in compared if key.startswith("regularization")]
    for seed in (0, 1):
        one, other = (
            compared[(compared["method"] == method) & (compared["sampler_seed"] == seed)]
            for method in ("random", "evolution")
        )
        begun = [rows[keys].head(4).reset_index(drop=True) for rows in (one, other)]
        pd.testing.assert_frame_equal(*begun)


@pytest.mark.parametrize("count", ["0", "-1", "two"])
def test_a_number_of_sampler_seeds_that_is_none_is_told(tmp_path, capsys, count):
    with pytest.raises(SystemExit, match="2"):
        compare_searches.main(["--config", str(tmp_path / "no.yaml"), "--sampler-seeds", count])
    assert "--sampler-seeds" in capsys.readouterr().err

"""What is wrong with the values of a search is told before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from medseg_reg.engine.network import build_run_network
from medseg_reg.engine.run_directory import DataFacts
from medseg_reg.errors import MedsegError
from medseg_reg.study.search.__main__ import run_search
from medseg_reg.study.search.checks import check_networks, check_values, first_values
from medseg_reg.study.search.spec import SearchSpec
from medseg_reg.study.search.trials import configured
from tests.stores import make_store
from tests.study.search.made_search import ScoringPool, search_of

ROOT = Path(__file__).parents[3]
PLACES = "regularization.architecture.0.places"
RESIDUAL = {PLACES: [["after_norm"], ["after_norm", "residual"]]}
PATTERN = {"regularization.architecture": [{"name": "auto_dropout", "p": 0.2, "size": 2}]}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory):
    return make_store(tmp_path_factory.mktemp("checks") / "store", cases=6, slices=1)


def of_places(store, folder: Path, **network: Any) -> SearchSpec:
    return search_of(
        store.path, folder, parameters=RESIDUAL, overrides={**PATTERN, "network": network}
    )


def test_the_residual_token_is_refused_in_a_network_without_residual_branches(store, tmp_path):
    pool = ScoringPool(lambda _: [0.5])
    with pytest.raises(MedsegError) as error:
        run_search(of_places(store, tmp_path, channels=[4, 8]), pool, lambda _: None)
    said = str(error.value)
    assert said.startswith(f'{PLACES}: ["after_norm", "residual"]: regularizer ')
    assert "no place matches 'residual'" in said
    assert "after_norm (" in said  # what there is
    assert pool.started == []


def test_the_residual_token_puts_the_pattern_on_the_branch_of_each_residual_block(store, tmp_path):
    size = {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]}
    search = of_places(store, tmp_path, name="monai.SegResNet", **size)
    check_networks(search)
    facts = DataFacts.of(store, 1)
    placed = []
    for value in RESIDUAL[PLACES]:
        _, (entry,) = build_run_network(configured(search, {PLACES: value}, {}), facts)
        placed.append({one.place: one for one in entry.placements})
    without, with_branch = placed
    added = with_branch.keys() - without.keys()
    # Three blocks: two of the encoder, one of the decoder.
    assert added == {"encoder.0.residual", "bottleneck.residual", "decoder.0.residual"}
    assert all("after_norm" in place for place in without)
    assert without.keys() < with_branch.keys()
    for place in added:
        assert with_branch[place].path.endswith("conv2.conv.regularizer")  # the branch's last
        assert 0.0 < with_branch[place].measured_rate < 0.5


def test_the_ready_search_for_patterns_has_all_eight_tokens_and_can_be_built(store):
    content = yaml.safe_load((ROOT / "configs/searches/autodropout_small.yaml").read_text("utf-8"))
    content["config"] = ROOT / content["config"]
    content["overrides"] |= {"data.store": str(store.path), "data.phantom": None}
    search = SearchSpec.model_validate(content)
    tokens = {key.rsplit(".", 1)[1] for key in search.parameters}
    paper = {"size", "stride", "repeat", "rotate", "shear_x", "shear_y", "share_c"}
    assert tokens == paper | {"places", "p"}
    assert list(search.lists[PLACES]) == RESIDUAL[PLACES]
    check_values(search)
    check_networks(search)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"optimizer.lr": [0.1, -1]}, "optimizer.lr: -1: "),
        ({"optimizer.lr": {"low": -1.0, "high": 1.0}}, "the first value of each parameter: "),
        ({"data.batch_size": {"low": 0, "high": 2, "integer": True}}, "data.batch_size"),
        ({"optimizer.lr": [0.1], "optimizer.lrr": [0.1]}, "Did you mean 'lr'"),
    ],
)
def test_a_value_or_an_end_of_a_range_that_is_none_is_told(tmp_path, parameters, message):
    search = search_of(tmp_path / "store", tmp_path, parameters=parameters, method="optuna")
    with pytest.raises(MedsegError, match=message):
        check_values(search)


def test_the_first_values_are_those_of_lists_and_the_low_ends_of_ranges(tmp_path):
    parameters = {
        "optimizer.lr": {"low": 0.1, "high": 0.5},
        "data.batch_size": {"low": 2, "high": 4, "integer": True},
        "network.channels": [[4, 8], [8, 16]],
    }
    search = search_of(tmp_path / "store", tmp_path, parameters=parameters, method="optuna")
    first = first_values(search)
    assert first == {"optimizer.lr": 0.1, "data.batch_size": 2, "network.channels": [4, 8]}
    assert isinstance(first["data.batch_size"], int)

"""A transformer trains with its layers by a configuration, and goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from medseg_reg.config import parse_config
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.fit import fit
from medseg_reg.engine.layer_memory import memory_of
from medseg_reg.engine.module import SegmentationModule
from medseg_reg.engine.network import load_run_network
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.networks import TokenSelection
from tests.stores import make_store
from tests.training import interrupted_at, same_weights, tiny_config, tiny_unetr

pytest.importorskip("einops")

NETWORK = tiny_unetr(32)
LAYERS = [
    {"name": "drop_head", "p": 0.3, "schedule": {"name": "v_shape", "turn": 0.25}},
    {"name": "drop_key", "p": 0.2, "depth_ramp": {"first": 1.0, "last": 0.0}},
    {"name": "guided_key_dropout", "p": 0.2, "beta": -1.0},
    {"name": "guided_residual_dropout", "p": 0.1},
    {"name": "drop_path", "places": "encoder.4.residual", "p": 0.1, "depth_ramp": True},
    {"name": "patch_dropout", "p": 0.5, "protect_foreground": True},
]
LAYER = "vit.blocks.0.regularizer"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SliceStore:
    return make_store(tmp_path_factory.mktemp("data") / "store", cases=6, slices=4, size=32)


def train(store: SliceStore, path: Path, layers: list[dict[str, Any]]) -> RunDirectory:
    content = tiny_config(store.path, path, network=NETWORK, training__epochs=2)
    content["regularization"]["architecture"] = layers
    return fit(parse_config(content, path.name))


def test_every_layer_of_tokens_trains_by_a_configuration_and_resumes(
    store: SliceStore, tmp_path: Path
) -> None:
    straight = train(store, tmp_path / "straight", LAYERS)
    placed = json.loads((straight.path / "placement.json").read_text())
    counts = {one["regularizer"]: 0 for one in placed}
    for one in placed:
        counts[one["regularizer"]] += 1
    assert counts == {
        "DropHead": 12,
        "DropKey": 12,
        "GuidedKeyDropout": 12,
        "GuidedResidualDropout": 12,
        "DropPath": 24,
        "PatchDropout": 1,
    }
    rates = [one["p"] for one in placed if one["regularizer"] == "DropKey"]
    assert rates == sorted(rates, reverse=True)
    assert (rates[0], rates[-1]) == (0.2, 0.0)

    table = pd.read_csv(straight.path / "metrics.csv")
    steps = 12 // 2  # three cases of four slices, two at a time
    ends = [(epoch * steps - 1) / (2 * steps) for epoch in (1, 2)]
    wanted = [0.3 * (1 - t / 0.25 if t < 0.25 else (t - 0.25) / 0.75) for t in ends]
    assert table["regularization.architecture.0.p"].tolist() == pytest.approx(wanted)
    with interrupted_at(1, 2):
        train(store, tmp_path / "resumed", LAYERS)
    resumed = train(store, tmp_path / "resumed", LAYERS)
    assert same_weights(straight.path, resumed.path)
    assert straight.memory.read_bytes() == resumed.memory.read_bytes()


def test_the_mask_token_is_learned_and_loaded_with_the_run(
    store: SliceStore, tmp_path: Path
) -> None:
    run = train(store, tmp_path / "run", LAYERS[-1:])
    network = load_run_network(run)
    (memory,) = memory_of(network).values()
    fresh = type(network.get_submodule(path_of(network)))()
    fresh.prepare(12)
    assert not torch.equal(memory["mask_token"], fresh.mask_token)
    plain = train(store, tmp_path / "plain", [])
    assert list(load_run_network(plain).state_dict()) == list(network.state_dict())


def test_token_merging_trains_by_a_configuration_and_acts_in_evaluation_if_asked_to(
    store: SliceStore, tmp_path: Path
) -> None:
    merging = {"name": "token_merging", "p": 0.5, "in_evaluation": True, "schedule": "linear"}
    run = train(store, tmp_path / "run", [merging])
    network = load_run_network(run)
    layer = network.get_submodule(path_of(network))
    x = torch.rand(1, 1, 32, 32)
    ours = network(x)
    layer.in_evaluation = False
    assert not torch.equal(network(x), ours)


def test_predictors_of_chosen_tokens_learn_by_a_configuration_and_are_built_again(
    store: SliceStore, tmp_path: Path
) -> None:
    content = tiny_config(store.path, tmp_path / "run", network={**NETWORK, "token_selection": {}})
    content["network"]["token_selection"] = {"keep": 0.6, "first": 8, "stages": 2, "weight": 10.0}
    content["regularization"]["architecture"] = [{"name": "drop_key", "p": 0.1}]
    given: list[int] = []
    original = SegmentationModule.with_penalties

    def noted(self: SegmentationModule, loss: torch.Tensor) -> torch.Tensor:
        given.append(sum(one.penalty is not None for one in self.penalized))
        return original(self, loss)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SegmentationModule, "with_penalties", noted)
        run = fit(parse_config(content, "run"))
    assert set(given) == {4}
    network = load_run_network(run)
    found = [one for one in network.modules() if isinstance(one, TokenSelection)]
    assert [one.keep for one in found] == pytest.approx([0.6, 0.6, 0.36, 0.36])
    for one in found:
        fresh = TokenSelection(12, one.keep)
        assert not torch.equal(one.predictor[-1].bias, fresh.predictor[-1].bias)
    x = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(network(x)[:1], network(x[:1]), atol=1e-5, rtol=1e-4)


def path_of(network: torch.nn.Module) -> str:
    """Where the layer is: networks of other packages are wrapped."""
    return next(path for path, _ in network.named_modules() if path.endswith(LAYER))

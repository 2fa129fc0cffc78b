"""A run with a mixture of experts trains, resumes, is evaluated and exported as any other."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from medseg_reg.config import parse_config
from medseg_reg.engine.fit import fit
from medseg_reg.engine.module import SegmentationModule
from medseg_reg.engine.network import load_run_network
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.errors import MedsegError
from medseg_reg.inference.evaluation import evaluate
from medseg_reg.inference.export import export_run
from medseg_reg.losses import MixedLoss
from medseg_reg.networks import HierarchicalMixture, SparseExperts
from medseg_reg.regularizers import GatingDropout, TreeDropout
from tests.stores import make_store
from tests.test_resume import kill_again_and_again
from tests.training import command, same_weights, tiny_config, write_config

TREE = {"name": "unet", "channels": [4, 8], "tree_depth": 2}
FOREIGN_TREE = {"name": "monai.BasicUNet", "features": [4, 4, 8, 8, 8, 4], "tree_depth": 2}
EXPERTS = {
    "name": "monai.UNETR",
    "img_size": 32,
    "hidden_size": 24,
    "mlp_dim": 48,
    "num_heads": 2,
    "feature_size": 4,
    "experts": {"count": 3, "every": 4, "balance": 0.1},
}
DROPPED = [{"name": "tree_dropout", "p": 0.4, "schedule": "linear"}]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "store"
    make_store(path, slices=2, size=(21, 26))
    return path


def train(store: Path, run: Path, network: dict[str, Any], **changes: Any) -> RunDirectory:
    changes = {"training__epochs": 2, "regularization__architecture": DROPPED, **changes}
    changes["evaluation"] = {"resamples": 100}
    return fit(parse_config(tiny_config(store, run, network=network, **changes), "test"))


@pytest.mark.parametrize("network", [TREE, FOREIGN_TREE], ids=lambda one: one["name"])
def test_a_run_with_a_tree_is_built_again_from_its_directory_alone(
    store: Path, tmp_path: Path, network: dict[str, Any]
) -> None:
    run = train(store, tmp_path / "run", network)
    (placed,) = json.loads((run.path / "placement.json").read_text())
    assert placed["map_size"][0] == 3
    again = load_run_network(run)
    layer = again.get_submodule(placed["path"])
    assert isinstance(layer, TreeDropout)
    assert any(isinstance(one, HierarchicalMixture) for one in again.modules())
    assert evaluate(run)["network"]["parameters"] == sum(p.numel() for p in again.parameters())


def test_the_rate_in_evaluation_is_that_of_the_epoch_that_was_kept(
    store: Path, tmp_path: Path
) -> None:
    run = train(store, tmp_path / "run", TREE, training__epochs=3)
    layer = next(m for m in load_run_network(run).modules() if isinstance(m, TreeDropout))
    logged = pd.read_csv(run.path / "metrics.csv")
    best = logged.loc[logged["val_dice"].idxmax(), "regularization.architecture.0.p"]
    assert layer.p == pytest.approx(best, abs=1e-6)
    assert 0 < layer.p < 0.4


def test_the_same_seed_trains_a_tree_to_the_same_weights(store: Path, tmp_path: Path) -> None:
    for name in "ab":
        train(store, tmp_path / name, TREE)
    assert same_weights(tmp_path / "a", tmp_path / "b")


def test_tree_dropout_without_a_tree_is_an_error(store: Path, tmp_path: Path) -> None:
    with pytest.raises(MedsegError, match="no place matches 'tree_gates'"):
        train(store, tmp_path / "run", {"name": "unet", "channels": [4, 8]})
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_tree_is_exported_as_it_is_in_evaluation(store: Path, tmp_path: Path) -> None:
    run = train(store, tmp_path / "run", TREE, training__epochs=1)
    for form, name in (("pt2", "n.pt2"), ("onnx", "n.onnx"), ("torchscript", "n.ts")):
        done = export_run(run, form, tmp_path / name)
        assert done.path.exists()
        assert done.size == ("any, from 3 rows and columns" if form == "pt2" else "any")
        assert done.difference < 1e-4


# Sparsely gated experts


def train_experts(store: Path, run: Path, **changes: Any) -> RunDirectory:
    layers = [{"name": "gating_dropout", "p": 0.5, "schedule": "cosine"}]
    changes = {"regularization__architecture": layers, "training__epochs": 1, **changes}
    return train(store, run, EXPERTS, data__image={"size": [32, 32]}, **changes)


def test_a_run_with_sparse_experts_is_built_again_and_evaluated(
    store: Path, tmp_path: Path
) -> None:
    run = train_experts(store, tmp_path / "run")
    again = load_run_network(run)
    blocks = [m for m in again.modules() if isinstance(m, SparseExperts)]
    assert [(len(b.experts), b.balance) for b in blocks] == [(3, 0.1)] * 3
    assert all(isinstance(b.routing[0], GatingDropout) for b in blocks)
    placed = json.loads((run.path / "placement.json").read_text())
    assert [one["map_size"] for one in placed] == [[3, 4]] * 3
    assert evaluate(run)["network"]["parameters"] == sum(p.numel() for p in again.parameters())


def test_the_same_seed_trains_sparse_experts_to_the_same_weights(
    store: Path, tmp_path: Path
) -> None:
    for name in "ab":
        train_experts(store, tmp_path / name)
    assert same_weights(tmp_path / "a", tmp_path / "b")


def test_what_experts_ask_for_is_added_to_the_loss_once() -> None:
    network, x = SparseExperts(nn.Linear(4, 4), 4, balance=0.5), torch.rand(2, 6, 4)
    content = tiny_config(Path("s"), Path("r"))
    owner = SegmentationModule(network, MixedLoss(), parse_config(content, "test"), ["a"], 2)
    network(x)
    loss, asked = torch.tensor(1.0), network.penalty
    assert asked is not None
    assert torch.equal(owner.with_penalties(loss), loss + asked)
    assert network.penalty is None
    assert torch.equal(owner.with_penalties(loss), loss)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.slow
def test_sparse_experts_are_exported(store: Path, tmp_path: Path) -> None:
    run = train_experts(store, tmp_path / "run")
    for form, name in (("pt2", "n.pt2"), ("onnx", "n.onnx"), ("torchscript", "n.ts")):
        done = export_run(run, form, tmp_path / name)
        assert done.size == (32, 32)
        assert done.difference < 1e-4


def test_gating_dropout_without_experts_is_an_error(store: Path, tmp_path: Path) -> None:
    layers = [{"name": "gating_dropout"}]
    plain = {key: value for key, value in EXPERTS.items() if key != "experts"}
    with pytest.raises(MedsegError, match="no place matches 'routing'"):
        train(
            store,
            tmp_path / "run",
            plain,
            regularization__architecture=layers,
            data__image={"size": [32, 32]},
        )
    assert not (tmp_path / "run").exists()


def test_all_blocks_of_a_step_get_one_coin_from_the_engine(store: Path, tmp_path: Path) -> None:
    coins: list[list[bool]] = []
    layers = [{"name": "gating_dropout", "p": 0.5}]
    original = GatingDropout.decide

    def noted(layer: GatingDropout, device: torch.device) -> bool:
        acting = original(layer, device)
        if layer.training:
            assert layer.taking_part is not None or not torch.is_grad_enabled()
            if torch.is_grad_enabled():
                coins.append([acting])
        return acting

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GatingDropout, "decide", noted)
        train_experts(
            store, tmp_path / "run", regularization__architecture=layers, training__epochs=4
        )
    steps = [coins[i : i + 3] for i in range(0, len(coins), 3)]  # three blocks
    assert all(step[0] == step[1] == step[2] for step in steps)
    assert {step[0][0] for step in steps} == {True, False}


GATED = {
    "network": EXPERTS,
    "data__image": {"size": [32, 32]},
    "regularization__architecture": [
        {"name": "gating_dropout", "p": 0.5, "schedule": "linear"},
        {"name": "spatial_dropout", "places": "head", "p": 0.2},
    ],
}


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "changes",
    [GATED, {"network": TREE, "regularization__architecture": DROPPED}],
    ids=["experts", "tree"],
)
def test_a_killed_run_with_a_mixture_goes_on_bit_for_bit(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    changes = {**changes, "training__checkpoint_minutes": 1e-6}
    kill_again_and_again(tmp_path, kills=2, number=signal.SIGKILL, seed=3, changes=changes)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_train_alike_with_and_without_the_exchange(
    store: Path, tmp_path: Path
) -> None:
    for name, exchange in (("home", False), ("away", True)):
        network = {**EXPERTS, "experts": {"count": 4, "every": 6, "exchange": exchange}}
        changes = {**GATED, "network": network, "training__devices": 2, "training__epochs": 2}
        changes["training__precision"] = "32"
        content = tiny_config(store, tmp_path / name, **changes)
        done = command(
            "medseg_reg.train", "--config", write_config(tmp_path / f"{name}.yaml", content)
        )
        assert done.returncode == 0, done.stderr
    home, away = (load_file(tmp_path / name / "weights.safetensors") for name in ("home", "away"))
    for key, value in home.items():
        torch.testing.assert_close(away[key], value, atol=1e-4, rtol=1e-3, msg=key)

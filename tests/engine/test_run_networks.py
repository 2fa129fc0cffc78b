"""A run trains any network of a configuration, and its directory is enough to build it again."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from medseg_reg.config import load_config, parse_config
from medseg_reg.engine.fit import fit
from medseg_reg.engine.module import SegmentationModule
from medseg_reg.engine.network import load_run_network
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.errors import MedsegError
from medseg_reg.inference.evaluation import evaluate
from medseg_reg.losses import MixedLoss
from medseg_reg.networks import GuidedLogits, UNet, presence_loss
from tests.stores import make_store
from tests.training import same_weights, tiny_config

FOREIGN = {"name": "monai.UNet", "channels": [4, 8], "strides": [2], "num_res_units": 2}
CONFIGS = Path(__file__).parents[2] / "configs"
PLUS = {"name": "unet3plus", "channels": [4, 8], "cat_channels": 3}
LAYERS = [{"name": "heuristic_dropout", "places": "between_convs", "p": 0.3}]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "store"
    make_store(path, slices=2, size=(21, 26))
    return path


def train(store: Path, run: Path, network: dict[str, Any], **changes: Any) -> RunDirectory:
    changes = {"training__epochs": 1, "regularization__architecture": LAYERS, **changes}
    changes["evaluation"] = {"resamples": 100}
    content = tiny_config(store, run, network=network, **changes)
    torch.manual_seed(99)  # nothing may depend on what was drawn before
    return fit(parse_config(content, "test"))


@pytest.mark.parametrize(
    "network",
    [
        {"name": "attention_unet", "channels": [4, 6, 8]},
        {**PLUS, "classification_guided": True, "deep_supervision": True},
        FOREIGN,
    ],
    ids=lambda network: network["name"],
)
def test_a_run_is_built_again_from_its_directory_alone(
    store: Path, tmp_path: Path, network: dict[str, Any]
) -> None:
    run = train(store, tmp_path / "run", network)
    again, x = load_run_network(run), torch.rand(2, 1, 21, 26)
    kept = load_file(run.weights)
    assert all(torch.equal(value, kept[key]) for key, value in again.state_dict().items())
    assert again(x).shape == (2, 2, 21, 26)
    placed = json.loads((run.path / "placement.json").read_text())
    layers = [m for m in again.modules() if type(m).__name__ == "HeuristicDropout"]
    assert len(placed) == len(layers) > 0
    for placement in placed:
        assert again.get_submodule(placement["path"]) in layers
        assert placement["measured_rate"] is not None
    summary = evaluate(run)
    assert summary["network"]["name"] == network["name"]
    assert summary["network"]["parameters"] == sum(p.numel() for p in again.parameters())
    assert summary["network"]["input"] == [1, 1, 21, 26]
    assert summary["network"]["multiply_adds"] > 1000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "placed"),
    [("convnext", {}), ("swin", {"DropPath": 16}), ("vit", {"DropPath": 24, "DropKey": 12})],
)
def test_the_ready_backbones_train(tmp_path: Path, name: str, placed: dict[str, int]) -> None:
    make_store(tmp_path / "store", cases=3, slices=3, size=(96, 128))
    changes = (
        f"data.store={tmp_path / 'store'}",
        "data.split={kind: counts, train: 1, val: 1, test: 1}",
        f"run={tmp_path / 'run'}",
        "training.epochs=1",
        "training.progress=false",
    )
    run = fit(load_config(CONFIGS / f"bagls_small_{name}.yaml", changes))
    counts = Counter(
        one["regularizer"] for one in json.loads((run.path / "placement.json").read_text())
    )
    assert counts == placed
    assert load_run_network(run)(torch.rand(1, 1, 128, 128)).shape == (1, 2, 128, 128)


def test_the_same_seed_trains_a_foreign_network_to_the_same_weights(
    store: Path, tmp_path: Path
) -> None:
    for name in "ab":
        train(store, tmp_path / name, FOREIGN)
    assert same_weights(tmp_path / "a", tmp_path / "b")


def test_a_rate_may_change_over_the_places_of_a_foreign_network(
    store: Path, tmp_path: Path
) -> None:
    layers = [{"name": "dropout", "places": "after_norm", "p": 0.4, "depth_ramp": {}}]
    layers[0]["schedule"] = "linear"
    run = train(store, tmp_path / "run", FOREIGN, regularization__architecture=layers)
    rates = [one["p"] for one in json.loads((run.path / "placement.json").read_text())]
    assert (min(rates), max(rates)) == (0.0, 0.4)


def test_a_place_that_a_foreign_network_lacks_is_an_error(store: Path, tmp_path: Path) -> None:
    layers = [{"name": "dropout", "places": "gate"}]
    with pytest.raises(MedsegError, match="no place matches 'gate'"):
        train(store, tmp_path / "run", FOREIGN, regularization__architecture=layers)
    assert not (tmp_path / "run").exists()


def test_a_size_that_a_network_cannot_take_is_refused_before_training(
    store: Path, tmp_path: Path
) -> None:
    network = {"name": "smp.PAN", "encoder_name": "resnet18"}
    layers = [{"name": "dropout", "places": "head"}]
    changes = {"regularization__architecture": layers, "data__image": {"size": [32, 32]}}
    with pytest.raises(MedsegError, match="32x32 is no size for .* at least 128x128"):
        train(store, tmp_path / "run", network, **changes)
    assert not (tmp_path / "run").exists()


# Pretrained weights


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(5)
    path = tmp_path / "w.safetensors"
    save_file(UNet(2, 1, 2, channels=(4, 8)).state_dict(), path)
    return path


def test_a_training_starts_from_pretrained_weights_and_says_so(
    store: Path, tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = {"channels": [4, 8], "pretrained": str(weights)}
    # At a rate of almost 0 the weights stay those of the file; statistics follow the data.
    run = train(store, tmp_path / "run", network, optimizer__lr=1e-12)
    said = capsys.readouterr().out
    assert f"pretrained: {weights}: " in said
    assert "tensors of the network taken" in said
    begun, ended = load_file(weights), load_file(run.weights)
    for key in begun:
        if "running" not in key and "num_batches" not in key:
            assert torch.allclose(begun[key], ended[key], atol=1e-6), key
    report = json.loads((run.path / "pretrained.json").read_text())
    assert (report["part"], report["left_out"], report["new"]) == ("network", [], [])
    assert len(report["sha256"]) == 64


def test_a_finished_run_does_not_need_the_file_any_more(
    store: Path, tmp_path: Path, weights: Path
) -> None:
    network = {"channels": [4, 8], "pretrained": str(weights)}
    run = train(store, tmp_path / "run", network)
    weights.unlink()
    assert load_run_network(run)(torch.rand(1, 1, 8, 8)).shape == (1, 2, 8, 8)
    assert train(store, tmp_path / "run", network).finished


def test_a_file_that_does_not_fit_is_refused_before_a_directory_is_made(
    store: Path, tmp_path: Path, weights: Path
) -> None:
    network = {"channels": [4, 10], "pretrained": str(weights)}
    with pytest.raises(MedsegError, match="does not fit the network"):
        train(store, tmp_path / "run", network)
    assert not (tmp_path / "run").exists()
    run = train(store, tmp_path / "run", {**network, "pretrained_strict": False})
    assert json.loads((run.path / "pretrained.json").read_text())["new"]


# What a network returns in training


def module(network: dict[str, Any]) -> SegmentationModule:
    content = tiny_config(Path("s"), Path("r"), network=network)
    return SegmentationModule(
        torch.nn.Identity(), MixedLoss(ce=1.0), parse_config(content, "test"), ["a"], 2
    )


def test_the_presence_of_classes_is_added_to_the_loss() -> None:
    own = module(PLUS)
    logits, labels = torch.randn(2, 2, 4, 4), torch.zeros(2, 4, 4, dtype=torch.uint8)
    labels[0, 1, 2] = 1
    presence = torch.tensor([[0.3], [-2.0]])
    found = own._loss_of(GuidedLogits(logits, presence), labels)
    expected = own.loss(logits, labels) + presence_loss(presence, labels)
    assert torch.allclose(found, expected)
    assert torch.equal(own._loss_of(logits, labels), own.loss(logits, labels))
    levels = [logits, torch.randn(2, 2, 4, 4)]
    found = own._loss_of(GuidedLogits(levels, presence), labels)
    expected = own.loss(levels, labels) + presence_loss(presence, labels)
    assert torch.allclose(found, expected)
    assert not torch.allclose(own.loss(levels, labels), own.loss(logits, labels))


def test_a_guided_network_learns_which_slices_show_anything(tmp_path: Path) -> None:
    make_store(tmp_path / "store", slices=6, size=32, empty=0.5)
    network = {**PLUS, "classification_guided": True, "norm": "instance"}
    run = train(
        tmp_path / "store",
        tmp_path / "run",
        network,
        regularization__architecture=[],
        training__epochs=12,
        optimizer__lr=0.01,
    )
    losses = (run.path / "metrics.csv").read_text().splitlines()
    first, last = (float(line.split(",")[1]) for line in (losses[1], losses[-1]))
    assert last < 0.8 * first

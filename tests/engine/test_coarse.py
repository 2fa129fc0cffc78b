"""A run takes in the answer of a finished coarse one, which it keeps and which stays as it was."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from medseg_reg.config import parse_config
from medseg_reg.data.splits import make_splits
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.coarse import takes_in
from medseg_reg.engine.fit import fit
from medseg_reg.engine.network import build_run_network, load_run_network
from medseg_reg.engine.run_directory import DataFacts, RunDirectory
from medseg_reg.errors import MedsegError
from medseg_reg.files import read_json, sha256_of, write_json
from medseg_reg.inference.evaluation import evaluate
from medseg_reg.networks.reuse import coarse_of
from medseg_reg.summary import main as summary
from tests.inference.made_runs import PLAIN, make_run
from tests.stores import make_store
from tests.training import interrupted_at, same_weights, tiny_config

KEY = "network__reuse"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SliceStore:
    return make_store(tmp_path_factory.mktemp("data") / "store", slices=2, size=(24, 32))


@pytest.fixture(scope="module")
def coarse(store: SliceStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of smaller images, with the split of `train`."""
    path = tmp_path_factory.mktemp("runs") / "coarse"
    make_run(path, store, seed=3, data__image={"size": [12, 16]}, **PLAIN)
    make_splits(store, RunDirectory(path).config().data.split).write(path / "splits.json")
    return path


def train(store: SliceStore, path: Path, coarse: Path | None, **changes: Any) -> RunDirectory:
    changes = {"training__epochs": 1, **changes}
    if coarse is not None:
        changes.setdefault(KEY, {"run": str(coarse)})
    return fit(parse_config(tiny_config(store.path, path, **changes), path.name))


@pytest.fixture(scope="module")
def origin(coarse: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the coarse run, which is gone after the training."""
    return tmp_path_factory.mktemp("gone") / "coarse"


@pytest.fixture(scope="module")
def run(
    store: SliceStore, coarse: Path, origin: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunDirectory:
    """A finished run, and beside it one that was interrupted."""
    shutil.copytree(coarse, origin)
    folder = tmp_path_factory.mktemp("fine")
    found = train(store, folder / "straight", origin, training__epochs=2)
    with interrupted_at(1, 0):
        train(store, folder / "resumed", origin, training__epochs=2)
    shutil.rmtree(origin)
    return found


def test_a_run_goes_on_where_it_stopped_without_the_coarse_one(
    store: SliceStore, origin: Path, run: RunDirectory
) -> None:
    resumed = train(store, run.path.with_name("resumed"), origin, training__epochs=2)
    assert same_weights(run.path, resumed.path)
    assert train(store, run.path, origin, training__epochs=2).finished


def test_a_finished_run_is_enough_to_predict_and_to_evaluate(
    coarse: Path, run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    network = load_run_network(run)
    inner = coarse_of(network)
    x = torch.rand(2, 1, 24, 32, generator=torch.Generator().manual_seed(0))
    told = load_run_network(RunDirectory(coarse))(functional.avg_pool2d(x, 2))
    told = functional.interpolate(told, scale_factor=2.0, mode="bilinear")
    torch.testing.assert_close(inner(x), told)
    assert torch.equal(network(x), network(x))
    assert torch.equal(network(x), network(torch.cat([x, inner(x).softmax(1)], dim=1)))
    assert 0 <= evaluate(run)["dice"]["mean"] <= 1
    summary(["--run", str(run.path)])
    assert "coarse (Coarse)" in capsys.readouterr().out


def test_weights_and_checkpoints_hold_the_finer_network_alone(
    coarse: Path, origin: Path, run: RunDirectory
) -> None:
    digest = sha256_of(coarse / "weights.safetensors")
    note = read_json(run.path / "coarse.json")
    assert (note["run"], note["sha256"]) == (str(origin), digest)
    (learned,) = evaluate(run)["learned_from"]
    assert (learned["kind"], learned["test"]) == ("coarse", [])
    assert "is a coarse run whose answer is taken in" in learned["said"]
    assert sha256_of(run.coarse.weights) == digest
    assert takes_in(run, RunDirectory(coarse))
    weights = load_file(run.weights)
    assert weights["encoder.0.conv1.weight"].shape[1] == 1 + 2
    assert not any("coarse" in name for name in weights)
    kept = torch.load(run.checkpoints / "last.ckpt", weights_only=True)
    assert {f"network.{name}" for name in weights} == set(kept["state_dict"])
    assert all("coarse" not in one["path"] for one in read_json(run.path / "placement.json"))


@pytest.mark.parametrize(
    "network",
    [
        {"name": "monai.UNet", "channels": [4, 8], "strides": [2]},
        {"name": "attention_unet", "channels": [4, 6, 8]},
    ],
)
def test_any_network_takes_a_coarse_one_in_and_layers_of_its_own(
    store: SliceStore, coarse: Path, tmp_path: Path, network: dict[str, Any]
) -> None:
    reuse = {"run": str(coarse), "what": "logits"}
    layers = [{"name": "dropout", "places": "bottleneck", "p": 0.5}]
    content = tiny_config(
        store.path,
        tmp_path / "run",
        network={**network, "reuse": reuse},
        regularization__architecture=layers,
    )
    built, entries = build_run_network(parse_config(content, "test"), DataFacts.of(store, 1))
    assert [one.path for entry in entries for one in entry.placements]
    assert built(torch.rand(2, 1, 24, 32)).shape == (2, 2, 24, 32)
    assert coarse_of(built).what == "logits"


# What cannot be


def test_a_coarse_run_that_knows_the_cases_of_the_test_is_refused(
    store: SliceStore, coarse: Path, tmp_path: Path
) -> None:
    split = {"kind": "counts", "train": 3, "val": 1, "test": 2, "seed": 5}
    with pytest.raises(MedsegError, match=r"network\.reuse\.run: .* has learned from case_"):
        train(store, tmp_path / "run", coarse, data__split=split)
    # So is one that has not seen them itself, but reads another which has.
    third = tmp_path / "third"
    make_run(third, store, network__reuse={"run": str(coarse)}, **PLAIN)
    with pytest.raises(MedsegError, match=r"third/coarse: has learned from case_"):
        train(store, tmp_path / "run", third, data__split=split)
    assert not (tmp_path / "run").exists()


def test_a_coarse_run_that_would_see_other_images_is_refused(
    store: SliceStore, coarse: Path, tmp_path: Path
) -> None:
    for image, said in (
        ({"size": [24, 32], "fit": "letterbox"}, "12x16, fit resize, .* Train both with one fit"),
        ({"size": [16, 16], "fit": "crop"}, "one fit and one shape"),
        ({"window": [0, 100]}, r"was trained with data.image.window None"),
    ):
        with pytest.raises(MedsegError, match=f"network.reuse.run: .*{said}"):
            train(store, tmp_path / "run", coarse, data__image=image)
    own = tmp_path / "own"
    make_run(own, store, **PLAIN)
    with pytest.raises(MedsegError, match="own: was trained on slices of their own resolution"):
        train(store, tmp_path / "run", own, data__image={"size": [24, 32]})
    assert not (tmp_path / "run").exists()


def test_what_was_kept_must_not_change(
    store: SliceStore, origin: Path, run: RunDirectory, tmp_path: Path
) -> None:
    changed = RunDirectory(Path(shutil.copytree(run.path, tmp_path / "run")))
    changed.weights.unlink()
    write_json(changed.path / "coarse.json", {"run": str(origin), "sha256": "0" * 64})
    with pytest.raises(MedsegError, match=r"coarse/weights.safetensors has changed since"):
        train(store, changed.path, origin, training__epochs=2)


def test_a_coarse_run_that_is_none_is_refused(store: SliceStore, tmp_path: Path) -> None:
    with pytest.raises(MedsegError, match=r"network\.reuse\.run: .*is not a run directory"):
        train(store, tmp_path / "run", tmp_path / "no")

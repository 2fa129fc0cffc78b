"""A run tells what it has learned elsewhere, and refuses labels of cases by which it is judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from medseg_reg.config import parse_config
from medseg_reg.data.splits import Splits, make_splits
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.fit import fit
from medseg_reg.engine.origins import Origin, origin_of_file, require_unlearned, weights_origin
from medseg_reg.engine.run_directory import DataFacts, RunDirectory
from medseg_reg.engine.seen import Seen
from medseg_reg.errors import MedsegError
from medseg_reg.files import sha256_of, write_json
from medseg_reg.inference.evaluation import evaluate
from medseg_reg.networks import UNet
from tests.stores import make_store
from tests.training import interrupted_at, tiny_config


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SliceStore:
    return make_store(tmp_path_factory.mktemp("data") / "store", slices=2, size=16)


def config(store: SliceStore, path: Path, weights: Path | None = None, **network: Any) -> Any:
    """Return a training on three cases, validated on one and tested on two."""
    network = {"channels": [4, 8], "pretrained": weights and str(weights), **network}
    content = tiny_config(store.path, path, network=network, training__epochs=2)
    content["regularization"]["architecture"] = []
    content["evaluation"] = {"resamples": 100, "metrics": []}
    return parse_config(content, "test")


def own_split(store: SliceStore) -> Splits:
    return make_splits(store, config(store, Path("r")).data.split)


def source(path: Path, store: SliceStore, splits: Splits, *, labels: bool, epochs: int = 5) -> Path:
    """Write what a finished run leaves for others, and return its weights."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("name: made\n" if labels else "masking: {}\n")
    (path / "metrics.csv").write_text(f"epoch,train_loss\n1,2.0\n{epochs},1.0\n")
    RunDirectory(path).begin(DataFacts.of(store, 1), store)
    Seen.of(store, splits, 8).write(path)
    torch.manual_seed(3)
    weights = path / "weights.safetensors"
    save_file(UNet(2, 1, 2, channels=(4, 8)).state_dict(), weights)
    return weights


def all_seen(store: SliceStore) -> Splits:
    """Return a split that trains on one of the two test cases and on the one of the validation."""
    own = own_split(store)
    return own.model_copy(
        update={"train": (*own.val, own.test[0]), "val": own.train[:1], "test": own.train[1:]}
    )


# What is told


def test_images_of_test_cases_in_a_pre_training_are_told_and_noted(store, tmp_path, capsys):
    splits = own_split(store)
    weights = source(tmp_path / "mae", store, all_seen(store), labels=False)
    with interrupted_at(1, 0):
        fit(config(store, tmp_path / "run", weights))
    said = (
        f"{tmp_path / 'mae'} is a pre-training without labels (epochs: 5, slices in each: 8, "
        "cases: 2). It has seen the images of 1 of the 2 test cases, without labels "
        f"({splits.test[0]}), and 1 of the 1 validation cases: the scores hold for "
        "patients whose images are at hand before."
    )
    assert f"note: {said}\n" in capsys.readouterr().out
    # A run that goes on needs the file no more, and says the same.
    weights.unlink()
    run = fit(config(store, tmp_path / "run", weights))
    assert f"note: {said}\n" in capsys.readouterr().out
    summary = evaluate(run)
    environment = json.loads((run.path / "environment.json").read_text())
    for learned in (environment["learned_from"], summary["learned_from"]):
        (one,) = learned
        assert one["said"] == said
        assert (one["kind"], one["epochs"], one["slices"]) == ("pre-training", 5, 8)
        assert (one["test"], one["tested"]) == ([splits.test[0]], 2)
        assert (one["val"], one["validated"]) == (list(splits.val), 1)
        assert one["cases"] == [*splits.val, splits.test[0]]


def test_the_same_split_has_seen_none(store, tmp_path):
    weights = source(tmp_path / "mae", store, own_split(store), labels=False)
    found = weights_origin(config(store, tmp_path / "run", weights), own_split(store), store)
    assert (found.test, found.val) == ((), ())
    assert str(found).endswith("It has seen none of the 2 test cases.")


def test_of_a_file_nothing_is_known(store, tmp_path):
    found = origin_of_file(tmp_path / "resnet.pt", own_split(store), store)
    assert (found.kind, found.test, found.cases) == ("file", None, None)
    assert str(found) == (
        f"{tmp_path / 'resnet.pt'} is a file of which no more is known. Whether it has seen any of "
        "the 2 test cases is not known."
    )


def test_a_run_without_anything_from_elsewhere_has_nothing_to_tell(store, tmp_path, capsys):
    run = fit(config(store, tmp_path / "run"))
    assert "note:" not in capsys.readouterr().out
    assert json.loads((run.path / "environment.json").read_text())["learned_from"] == []


# What was before


def noted(run: Path, weights: Path, kind: str) -> None:
    """Note in a run that it has learned from another one."""
    note = {"sha256": sha256_of(weights)}
    if kind == "teacher":
        write_json(run / "teacher.json", {**note, "run": str(weights.parent)})
    else:
        write_json(run / "pretrained.json", {**note, "file": str(weights)})


@pytest.mark.parametrize("kind", ["teacher", "pretrained"])
def test_labels_are_found_behind_a_pre_training_too(store, tmp_path, kind):
    first = source(tmp_path / "first", store, all_seen(store), labels=True)
    second = source(tmp_path / "second", store, own_split(store), labels=False)
    noted(second.parent, first, kind)
    found = origin_of_file(second, own_split(store), store)
    assert [one.kind for one in found.all()] == [
        "pre-training",
        "teacher" if kind == "teacher" else "training",
    ]
    assert "Before that: " in str(found)
    with pytest.raises(
        MedsegError, match=f"{first.parent}: has learned from {found.before[0].test[0]}"
    ):
        require_unlearned(found)
    # What is there now is not what was learned from: nothing is known of that.
    first.write_bytes(b"another")
    (before,) = origin_of_file(second, own_split(store), store).before
    assert (before.path, before.test) == (str(first.parent if kind == "teacher" else first), None)


def test_runs_that_name_each_other_have_an_end(store, tmp_path):
    one = source(tmp_path / "one", store, own_split(store), labels=False)
    two = source(tmp_path / "two", store, own_split(store), labels=False)
    noted(one.parent, two, "pretrained")
    noted(two.parent, one, "pretrained")
    found = origin_of_file(one, own_split(store), store)
    assert [item.kind for item in found.all()] == ["pre-training", "pre-training", "file"]


# What is refused


def test_weights_that_have_learned_the_labels_of_test_cases_are_refused(store, tmp_path):
    weights = source(tmp_path / "other", store, all_seen(store), labels=True)
    with pytest.raises(
        MedsegError, match=r"network\.pretrained: .*other: has learned from .* keeps for 'test'"
    ):
        fit(config(store, tmp_path / "run", weights))
    assert not (tmp_path / "run").exists()
    # A pre-training is not judged by them.
    given = config(store, tmp_path / "run", weights)
    found = weights_origin(given, own_split(store), store, judged=False)
    assert "1 of the 2 test cases, with labels" in str(found)


@pytest.mark.parametrize(
    ("which", "said"),
    [
        ("seen", r"mae: has seen images of case_.*, which this run keeps for 'test'"),
        ("unknown", r"w.safetensors: whether it has seen test cases of this run is not known"),
        ("unseen", None),
    ],
)
def test_only_weights_that_have_seen_no_test_case_may_be_asked_for(store, tmp_path, which, said):
    splits = all_seen(store) if which == "seen" else own_split(store)
    weights = source(tmp_path / "mae", store, splits, labels=False)
    if which == "unknown":
        weights = weights.rename(tmp_path / "w.safetensors")
    given = config(store, tmp_path / "run", weights, pretrained_unseen=True)
    if said is None:
        assert isinstance(weights_origin(given, own_split(store), store), Origin)
        return
    with pytest.raises(MedsegError, match=rf"network\.pretrained: .*{said}.*pretrained_unseen is"):
        weights_origin(given, own_split(store), store)

"""The training of a slice classifier: its labels, its run, its teacher."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from medseg_reg.classify import main
from medseg_reg.config import main as check
from medseg_reg.config import parse_as, parse_config
from medseg_reg.config_classification import ClassificationConfig, load_classification
from medseg_reg.config_regularization import DistillationSpec
from medseg_reg.data.dataset import SliceDataset
from medseg_reg.data.preprocessing import ImageSpec
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.classification import (
    ClassificationDirectory,
    ClassificationModule,
    balance_weights,
    build_run_classifier,
    classify,
    load_run_classifier,
    presence_table,
)
from medseg_reg.engine.fit import fit
from medseg_reg.engine.network import load_run_network
from medseg_reg.engine.presence_distillation import PresenceDistillation, SegmentationTeacher
from medseg_reg.engine.run_directory import DataFacts, RunDirectory
from medseg_reg.errors import MedsegError
from medseg_reg.losses import presence_bce, presence_divergence
from tests.stores import make_store
from tests.training import interrupted_at, same_weights, tiny_config, write_config

TINY = {"patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3}
ALONE = {"name": "deit_tiny_patch16_224", **TINY}
TAUGHT = {"name": "deit_tiny_distilled_patch16_224", **TINY}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SliceStore:
    path = tmp_path_factory.mktemp("data") / "store"
    return make_store(path, slices=4, classes=3, empty=0.6)


def content(store: SliceStore, path: Path, **changes: Any) -> dict[str, Any]:
    given = {
        "network": ALONE,
        "data__image": {"size": [32, 32]},
        "regularization": {"data": [{"name": "Rotate", "limit": 20, "p": 0.5}]},
        "training__epochs": 2,
        "presence": {},
        "evaluation": {"resamples": 100},
    }
    return tiny_config(store.path, path, **{**given, **changes})


def config(store: SliceStore, path: Path, **changes: Any) -> ClassificationConfig:
    return parse_as(ClassificationConfig, content(store, path, **changes), path.name)


@pytest.fixture(scope="module")
def run(store: SliceStore, tmp_path_factory: pytest.TempPathFactory) -> ClassificationDirectory:
    return classify(config(store, tmp_path_factory.mktemp("runs") / "run"))


@pytest.fixture(scope="module")
def teacher(store: SliceStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "teacher"
    changes = {"training__epochs": 1, "regularization__architecture": []}
    return fit(parse_config(tiny_config(store.path, path, **changes), "teacher")).path


def dataset(store: SliceStore) -> SliceDataset:
    return SliceDataset(store, [row.name for row in store.manifest.cases], ImageSpec())


# Labels


def test_labels_are_those_of_the_masks_of_the_store(store: SliceStore) -> None:
    data = dataset(store)
    table = presence_table(data, pixels=60)
    for (case, number), row in zip(data.items, table, strict=True):
        mask = store.mask(data.cases[case])[number]
        assert row.tolist() == [(mask == label).sum() >= 60 for label in (1, 2)]
    assert 0 < table.mean() < 1


def test_with_its_weight_both_kinds_of_slices_weigh_the_same(store: SliceStore) -> None:
    table = presence_table(dataset(store))
    weights = balance_weights(dataset(store))
    torch.testing.assert_close(weights * (table == 1).sum(0), (table == 0).sum(0).float())
    assert balance_weights(dataset(store), pixels=10_000).tolist() == [1, 1]  # none has a class


def test_ignored_pixels_leave_labels_open(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", slices=3, empty=0.7, ignore_label=255)
    data = dataset(store)
    shown = [(store.mask(data.cases[case])[number] == 1).any() for case, number in data.items]
    found = presence_table(data)[:, 0].tolist()
    assert all(
        one == 1 if there else math.isnan(one) for one, there in zip(found, shown, strict=True)
    )
    assert math.isnan(sum(found))


# The run


def test_its_directory_has_what_a_training_has(run: ClassificationDirectory) -> None:
    assert {path.name for path in run.path.iterdir()} == {
        *("config.yaml", "environment.json", "data.json", "splits.json", "metrics.csv"),
        *("checkpoints", "tensorboard", "weights.safetensors", "seen.json"),
    }
    table = pd.read_csv(run.path / "metrics.csv")
    names = ["epoch", "train_loss", "val_loss", "val_auroc", "val_average_precision"]
    assert list(table.columns) == [*names, "lr", "seconds"]
    assert table.notna().to_numpy().all()


def test_the_weights_of_the_best_epoch_are_kept(
    store: SliceStore, run: ClassificationDirectory
) -> None:
    table = pd.read_csv(run.path / "metrics.csv")
    network = load_run_classifier(run)
    (case,) = json.loads((run.path / "splits.json").read_text())["val"]
    data = SliceDataset(store, [case], ImageSpec())
    with torch.no_grad():
        logits = network(torch.stack([data[n]["image"] for n in range(len(data))]))
    truth, train = presence_table(data), json.loads((run.path / "splits.json").read_text())["train"]
    weights = balance_weights(SliceDataset(store, train, ImageSpec()))
    best = table.loc[table["val_average_precision"].idxmax()]
    assert float(presence_bce(logits, truth, weights)) == pytest.approx(best["val_loss"], rel=1e-4)


@pytest.mark.parametrize("how", ["killed", pytest.param("terminated", marks=pytest.mark.slow)])
def test_a_run_that_was_stopped_ends_with_the_same_weights(
    store: SliceStore,
    run: ClassificationDirectory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    spec = config(store, tmp_path / "run")
    with interrupted_at(1, 2, module=ClassificationModule, how=how):
        classify(spec)
    classify(spec)
    assert same_weights(run.path, tmp_path / "run")


def test_the_command_scores_it_and_the_same_again_changes_nothing(
    store: SliceStore, run: ClassificationDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(run.path.parent / "again.yaml", content(store, run.path))
    main(["--config", str(path)])
    said = capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    main(["--config", str(path)])
    assert capsys.readouterr().out == said
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before
    assert "test: class_1 in " in said
    (run.path / "summary.json").unlink()


def test_the_configuration_is_checked_and_printed_by_the_same_command_as_any_other(
    store: SliceStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path / "classifier.yaml", content(store, tmp_path / "run"))
    check([str(path), "seed=3"])
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert load_classification(tmp_path / "printed.yaml") == load_classification(path, ["seed=3"])


def test_kinds_of_runs_are_told_apart(run: ClassificationDirectory) -> None:
    with pytest.raises(MedsegError, match="is a run of classification, no run of training"):
        RunDirectory(run.path).config()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data__image": {}}, "is made for one size of the image: give data.image.size"),
        ({"network": {"name": "unet"}}, "timm has no vision transformer 'unet'"),
        ({"presence": {"sensitivity": 1.5}}, "'presence.sensitivity': input should be less"),
        ({"regularization": {"architecture": []}}, "unknown key 'regularization.architecture'"),
    ],
)
def test_a_configuration_of_something_else_is_refused(
    store: SliceStore, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(MedsegError, match=said):
        config(store, tmp_path / "run", **changes)


# The teacher


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_labels_go_to_the_class_token_and_the_teacher_to_the_other(kind: str) -> None:
    torch.manual_seed(0)
    told, logits = torch.randn(4, 3), torch.randn(4, 3, requires_grad=True)
    taught, weights = torch.randn(4, 3, requires_grad=True), torch.tensor([0.5, 1.0, 3.0])
    targets = torch.randint(0, 2, (4, 3)).float()
    targets[1, 2] = torch.nan
    more = {"temperature": 2.0} if kind == "soft" else {}
    spec = DistillationSpec(teacher=Path("t"), kind=kind, weight=0.3, **more)
    part = PresenceDistillation(lambda _: told, spec, weights)
    loss = presence_bce(logits, targets, weights)
    found = part.mixed(loss, torch.rand(4, 1, 8, 8), targets, taught)
    known = ~targets.isnan()
    if kind == "soft":
        other = presence_divergence(taught, told, 2.0, known)
    else:
        theirs = (told > 0).float().masked_fill(~known, torch.nan)
        other = presence_bce(taught, theirs, weights)
    torch.testing.assert_close(found, 0.7 * loss + 0.3 * other)
    found.backward()
    assert taught.grad is not None
    assert taught.grad[1, 2] == 0
    assert taught.grad[0].abs().min() > 0
    torch.testing.assert_close(
        logits.grad, 0.7 * torch.autograd.grad(presence_bce(logits, targets, weights), logits)[0]
    )


def test_a_run_learns_from_a_segmentation_that_is_not_needed_afterwards(
    store: SliceStore, teacher: Path, tmp_path: Path
) -> None:
    given = {"teacher": str(teacher), "kind": "hard"}
    changes = {"network": TAUGHT, "regularization__error": {"distillation": given}}
    spec = config(store, tmp_path / "run", training__epochs=1, **changes)
    run = classify(spec)
    note = json.loads((run.path / "teacher.json").read_text())
    assert note["run"] == str(teacher)
    assert note["origin"]["said"].endswith("It has seen none of the 2 test cases.")
    names = set(load_run_classifier(run).state_dict())
    assert {"dist_token", "head_dist.weight"} <= names
    assert not any("teacher" in name for name in names)


def test_the_teacher_says_what_its_segmentation_shows(store: SliceStore, teacher: Path) -> None:
    network = load_run_network(RunDirectory(teacher))
    images = torch.stack([dataset(store)[n]["image"] for n in range(6)])
    with torch.no_grad():
        labels = network(images).argmax(1).flatten(1)
    found = SegmentationTeacher(network, pixels=3)(images) > 0
    assert found.tolist() == [[bool((one == k).sum() >= 3) for k in (1, 2)] for one in labels]
    assert not any(p.requires_grad for p in network.parameters())


def test_a_teacher_that_knows_the_test_cases_is_refused(
    store: SliceStore, teacher: Path, tmp_path: Path
) -> None:
    given = {
        "network": TAUGHT,
        "regularization__error": {"distillation": {"teacher": str(teacher)}},
    }
    spec = config(store, tmp_path / "run", **given, data__split__seed=5)
    with pytest.raises(MedsegError, match="has learned from .* keeps for '(test|val)'"):
        classify(spec)
    assert not (tmp_path / "run").exists()


def test_a_token_without_a_teacher_is_refused(store: SliceStore, tmp_path: Path) -> None:
    with pytest.raises(MedsegError, match="has a distillation token, but there is no teacher"):
        classify(config(store, tmp_path / "run", network=TAUGHT))
    assert not (tmp_path / "run").exists()


def test_other_weights_are_refused(
    store: SliceStore, run: ClassificationDirectory, tmp_path: Path
) -> None:
    spec = config(store, tmp_path / "run", network=TAUGHT)
    network = build_run_classifier(spec, DataFacts.of(store, 1))
    with pytest.raises(RuntimeError, match="dist_token"):
        network.load_state_dict(load_run_classifier(run).state_dict())


def test_a_teacher_lets_a_classifier_learn_what_labels_do_not_say(store: SliceStore) -> None:
    """With noise for labels the mean of both heads follows the teacher."""
    torch.manual_seed(0)
    image, truth = torch.rand(32, 1, 8, 8), (torch.arange(32)[:, None] % 2).float()
    image += truth[..., None, None]
    network = torch.nn.ModuleList([torch.nn.Linear(64, 1), torch.nn.Linear(64, 1)])
    spec = DistillationSpec(teacher=Path("t"), kind="hard")
    part = PresenceDistillation(lambda _: 2 * truth - 1, spec)
    noise = torch.randint(0, 2, (32, 1)).float()
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    for _ in range(100):
        logits, taught = (head(image.flatten(1)) for head in network)
        loss = part.mixed(presence_bce(logits, noise), image, noise, taught)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert ((network[1](image.flatten(1)) > 0).float() == truth).float().mean() > 0.95
    assert np.mean(((network[0](image.flatten(1)) > 0).float() == noise).numpy()) > 0.5

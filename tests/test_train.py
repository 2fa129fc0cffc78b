"""The training command, as a user runs it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from medseg_reg.data.store import SliceStore
from medseg_reg.errors import Interrupted, MedsegError
from medseg_reg.train import main
from tests.stores import make_store
from tests.training import same_weights, tiny_config, write_config


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SliceStore:
    return make_store(tmp_path_factory.mktemp("data") / "store", cases=6, slices=4, size=32)


@pytest.fixture
def train(store: SliceStore, tmp_path: Path) -> Callable[..., Path]:
    """Train in this process and return the run directory."""

    def run(name: str = "run", *overrides: str, **changes: object) -> Path:
        content = tiny_config(store.path, tmp_path / name, **changes)
        config = write_config(tmp_path / f"{name}.yaml", content)
        main(["--config", str(config), *overrides])
        return tmp_path / name

    return run


def test_a_run_directory_holds_all_that_later_steps_need(train, capsys):
    run = train()
    for name in (
        "config.yaml", "environment.json", "data.json", "splits.json", "placement.json",
        "metrics.csv", "weights.safetensors", "summary.json", "panels.png", "curves.png",
        "seen.json", "evaluation/per_case.csv", "evaluation/per_slice.csv", "checkpoints/last.ckpt",
    ):  # fmt: skip
        assert (run / name).stat().st_size > 0, name
    *_, where, score = capsys.readouterr().out.strip().split("\n")
    assert where == f"run {run}"
    assert (
        score == f"test DICE {json.loads((run / 'summary.json').read_text())['dice']['mean']:.2f}"
    )


def test_the_table_has_one_row_an_epoch(train):
    table = pd.read_csv(
        train("run", "training.epochs=4", "training.validate_every=2") / "metrics.csv"
    )
    assert table["epoch"].tolist() == [1, 2, 3, 4]
    assert table["val_dice"].notna().tolist() == [False, True, False, True]
    assert table["train_loss"].notna().all()


def test_placement_tells_the_rate_asked_for_and_the_rate_measured(train):
    placements = json.loads((train() / "placement.json").read_text())
    assert {p["regularizer"] for p in placements} == {"SpatialDropout", "HeuristicDropout"}
    assert {p["place"] for p in placements} >= {"encoder.0.between_convs", "bottleneck.after_block"}
    for placement in placements:
        assert placement["map_size"][0] in (4, 8)
        assert 0 <= placement["measured_rate"] <= 1


def test_a_finished_run_is_left_as_it_is(train):
    run = train()
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    assert train() == run
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == before


def test_other_settings_do_not_touch_a_run(train):
    train()
    with pytest.raises(MedsegError, match=r"optimizer\.lr: 0\.001, now 0\.1"):
        train("run", "optimizer.lr=0.1")


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(train):
    a, b, c = train("a"), train("b"), train("c", "seed=1")
    assert same_weights(a, b)
    assert not same_weights(a, c)


def test_loader_processes_change_nothing(train):
    assert same_weights(train("a"), train("b", "data.workers=2"))


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_training_learns_in_each_precision(train, precision):
    run = train(
        "run",
        f"training.precision={precision}",
        "training.epochs=12",
        "regularization.architecture=[]",
        "schedule.name=constant",
        "optimizer.lr=0.01",
    )
    assert json.loads((run / "summary.json").read_text())["dice"]["mean"] > 0.8


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer.name=adamw", "regularization.penalty.weight_decay=0.1"],
        ["optimizer.name=sgd", "training.accumulate=2", "training.deterministic=true"],
        ["network.head=sigmoid", "network.norm=instance", "network.upsample=nontrainable"],
        [
            "regularization.optimization.gradient_clip=0.5",
            "regularization.optimization.select=last",
        ],
        ["data.sampling.policy=foreground", "data.image.size=[24, 40]", "data.image.fit=letterbox"],
        ["schedule.name=step", "schedule.milestones=[1, 2]", "training.memory_format=contiguous"],
        ["regularization.error.ssim=0.5", "regularization.error.class_weights=[1, 3]"],
    ],
)
def test_each_setting_trains(train, overrides):
    assert (train("run", "training.epochs=1", *overrides) / "summary.json").exists()


def test_weight_decay_shrinks_the_weights_alone(train):
    plain, decayed = (
        train(name, "optimizer.name=adamw", f"regularization.penalty.weight_decay={decay}")
        for name, decay in (("plain", 0), ("decayed", 50))
    )
    from safetensors.torch import load_file

    a, b = (load_file(run / "weights.safetensors") for run in (plain, decayed))
    assert b["encoder.0.conv2.weight"].norm() < 0.9 * a["encoder.0.conv2.weight"].norm()
    assert b["encoder.0.norm2.weight"].norm() > 0.95 * a["encoder.0.norm2.weight"].norm()


def test_early_stopping_ends_a_run_that_does_not_improve(train):
    run = train(
        "run",
        "training.epochs=20",
        "optimizer.lr=1e-12",
        "regularization.optimization.early_stopping={patience: 2, monitor: val_dice}",
    )
    assert len(pd.read_csv(run / "metrics.csv")) == 3


def test_a_loss_that_is_not_a_number_names_the_slices(train):
    with pytest.raises(
        MedsegError, match=r"the loss is not a finite number on the slices case_0\d #\d"
    ):
        train("run", "optimizer.lr=1e30", "optimizer.name=sgd", "training.epochs=20")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_between_batches(train, monkeypatch, number, tmp_path):
    from medseg_reg.engine.module import SegmentationModule

    step, seen = SegmentationModule.training_step, []

    def interrupted(self, batch, index):
        seen.append(index)
        if len(seen) == 3:
            os.kill(os.getpid(), number)
        return step(self, batch, index)

    monkeypatch.setattr(SegmentationModule, "training_step", interrupted)
    with pytest.raises(Interrupted, match=r"epoch 1, batch 3\. .*run the same command again"):
        train()
    state = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 3
    monkeypatch.undo()
    assert same_weights(train(), train("straight"))


def test_a_signal_in_the_validation_waits_for_the_end_of_the_epoch(train, monkeypatch):
    from medseg_reg.engine.module import SegmentationModule

    step = SegmentationModule.validation_step

    def interrupted(self, batch, index):
        if self.current_epoch == 0 and index == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, index)

    monkeypatch.setattr(SegmentationModule, "validation_step", interrupted)
    with pytest.raises(Interrupted, match="after epoch 1"):
        train()
    monkeypatch.undo()
    assert same_weights(train(), train("straight"))


def test_a_signal_between_accumulated_batches_waits_for_the_step(train, monkeypatch):
    from medseg_reg.engine.module import SegmentationModule

    step = SegmentationModule.training_step

    def interrupted(self, batch, index):
        if self.current_epoch == 0 and index == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, index)

    monkeypatch.setattr(SegmentationModule, "training_step", interrupted)
    with pytest.raises(Interrupted, match="epoch 1, batch 2"):
        train("run", "training.accumulate=2")
    monkeypatch.undo()
    resumed = train("run", "training.accumulate=2")
    assert same_weights(resumed, train("straight", "training.accumulate=2"))


def test_a_damaged_checkpoint_gives_way_to_the_one_before(train, monkeypatch, tmp_path, capsys):
    from medseg_reg.engine.checkpoint import RunCheckpoint

    end, ends = RunCheckpoint.on_train_epoch_end, []

    def killed(self, trainer, module):
        end(self, trainer, module)
        ends.append(1)
        if len(ends) == 2:
            raise Interrupted("as if killed")

    monkeypatch.setattr(RunCheckpoint, "on_train_epoch_end", killed)
    with pytest.raises(Interrupted):
        train()
    monkeypatch.undo()
    last = tmp_path / "run/checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    run = train()
    assert "last.ckpt: cannot be read as a checkpoint" in capsys.readouterr().out
    assert same_weights(run, train("straight"))


def test_a_checkpoint_that_would_run_code_is_refused(train, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    content = tiny_config(tmp_path, tmp_path / "run")
    torch.save({"state_dict": Evil()}, folder / "last.ckpt")
    from medseg_reg.engine.checkpoint import usable_checkpoint

    with pytest.raises(MedsegError, match=r"last\.ckpt: cannot be read"):
        usable_checkpoint(folder)
    assert not (tmp_path / "ran").exists()
    assert content["name"] == "tiny"


def test_the_store_may_not_change_under_a_run(store, tmp_path):
    import shutil

    own = tmp_path / "store"
    shutil.copytree(store.path, own)
    config = write_config(tmp_path / "c.yaml", tiny_config(own, tmp_path / "run"))
    main(["--config", str(config)])
    manifest = json.loads((own / "manifest.json").read_text())
    manifest["description"]["licence"] = "another"
    (own / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(MedsegError, match="has changed since"):
        main(["--config", str(config)])


def test_the_resolved_configuration_is_complete(train):
    content = yaml.safe_load((train() / "config.yaml").read_text())
    assert content["optimizer"]["betas"] == [0.9, 0.999]
    assert list(content["regularization"]) == [
        "data", "mix_token", "architecture", "error", "penalty", "optimization",
    ]  # fmt: skip

"""While a network is trained, its layers get rates, coins and labels, each at the right moment."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from torch import nn

from medseg_reg.config import parse_config
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.fit import fit
from medseg_reg.engine.layer_memory import load_memory, memory_of, save_memory
from medseg_reg.engine.module import SegmentationModule
from medseg_reg.engine.network import load_run_network
from medseg_reg.engine.regularization import RegularizationControl, step_coin
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.errors import MedsegError
from medseg_reg.regularizers.focused_dropout import FocusedDropout
from medseg_reg.regularizers.nsdropout import NSDropout
from medseg_reg.regularizers.protocols import LabelReader, StepTaker
from tests.engine.probe import Probe, register_probe
from tests.stores import make_store
from tests.training import interrupted_at, same_weights, tiny_config

SCHEDULED = {"name": "spatial_dropout", "places": "encoder", "p": 0.4, "schedule": "linear"}
FOCUSED = {"name": "focused_dropout", "places": "encoder", "p": 0.5, "magnified_weight_decay": 0.01}
PROBE = {"name": "probe", "places": "bottleneck", "p": 0.3}
RATE = "regularization.architecture.0.p"
# 15 training slices, 7 batches, so 4 steps of 2 batches an epoch: the last has one batch.
EPOCHS, BATCHES, STEPS = 3, 7, 4


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SliceStore:
    return make_store(tmp_path_factory.mktemp("data") / "store", cases=6, slices=5, size=16)


@pytest.fixture
def train(
    store: SliceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., RunDirectory]:
    """Train with some layers, two batches a step, and return the run directory."""
    register_probe(monkeypatch)

    def run(name: str, *layers: dict[str, Any], **changes: Any) -> RunDirectory:
        changes = {"regularization__penalty__weight_decay": 1e-4, **changes}
        content = tiny_config(store.path, tmp_path / name, training__accumulate=2, **changes)
        content["regularization"]["architecture"] = list(layers)
        return fit(parse_config(content, name))

    return run


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Note the state of all layers at each training batch."""
    original, notes = SegmentationModule.training_step, []

    def watched(self: SegmentationModule, batch: Any, index: int) -> Any:
        layers = [m for m in self.network.modules() if hasattr(m, "p")]
        self.network(self._image(batch))  # a second pass over the batch must change nothing
        notes.append(
            {
                "step": self.trainer.global_step,
                "epoch": self.current_epoch,
                "rates": [layer.p for layer in layers],
                "taking_part": [m.taking_part for m in layers if isinstance(m, StepTaker)],
                "decays": [g["weight_decay"] for g in self.trainer.optimizers[0].param_groups],
            }
        )
        return original(self, batch, index)

    monkeypatch.setattr(SegmentationModule, "training_step", watched)
    return notes


def interrupted(
    train: Callable[..., RunDirectory], name: str, epoch: int, *layers: Any, **changes: Any
) -> None:
    """Stop a training in the middle of an epoch."""
    with interrupted_at(epoch, 2, f"epoch {epoch + 1}, batch 4"):
        train(name, *layers, **changes)


def table_of(run: RunDirectory) -> pd.DataFrame:
    return pd.read_csv(run.path / "metrics.csv").drop(columns="seconds")


# Rates


def test_a_rate_follows_the_optimizer_steps_not_the_batches_or_passes(train, steps):
    train("run", SCHEDULED)
    expected = [e * STEPS + b // 2 for e in range(EPOCHS) for b in range(BATCHES)]
    assert [note["step"] for note in steps] == expected
    for note in steps:
        assert note["rates"] == [pytest.approx(0.4 * note["step"] / (EPOCHS * STEPS))]


def test_the_rate_of_the_last_step_of_an_epoch_is_logged(train):
    run = train("run", {**SCHEDULED, "schedule": "v_shape"}, {**SCHEDULED, "schedule": "constant"})
    table = pd.read_csv(run.path / "metrics.csv")
    ends = [(e * STEPS - 1) / (EPOCHS * STEPS) for e in (1, 2, 3)]
    assert table[RATE].tolist() == pytest.approx([0.4 * (t - 0.1) / 0.9 for t in ends])
    assert not [name for name in table if name.startswith("regularization.architecture.1")]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    logged = [event.value for event in events.Scalars(RATE)]
    assert logged == pytest.approx(table[RATE].tolist())


def test_a_run_without_schedules_logs_no_rate(train):
    run = train("run", {**SCHEDULED, "schedule": "constant"}, training__epochs=1)
    assert list(pd.read_csv(run.path / "metrics.csv")) == [
        "epoch", "train_loss", "val_loss", "val_dice", "val_iou", "lr", "seconds",
    ]  # fmt: skip


def test_each_place_has_its_share_of_the_depth_ramp_at_each_step(train, steps):
    layer = {**SCHEDULED, "places": ["encoder", "bottleneck", "decoder"], "depth_ramp": {}}
    run = train("run", layer, training__epochs=1)
    report = json.loads((run.path / "placement.json").read_text())
    rates = {one["place"]: one["p"] for one in report}
    assert rates == {
        "encoder.0.after_block": 0.0,
        "bottleneck.after_block": 0.2,
        "decoder.0.after_block": 0.4,
    }
    assert [one["measured_rate"] for one in report if one["p"] == 0] == [0.0]
    for note in steps:
        shares = [factor * 0.4 * note["step"] / STEPS for factor in (0, 0.5, 1)]
        assert sorted(note["rates"]) == pytest.approx(shares)
    loaded = load_run_network(run)
    assert {p: loaded.get_submodule(f"{p}.0").p for p in rates} == rates


# Coins


def test_the_coin_of_a_step_is_uniform_and_its_seed_s_own():
    coins = [step_coin(3, step) for step in range(4000)]
    assert coins == [step_coin(3, step) for step in range(4000)]
    assert all(0 <= coin < 1 for coin in coins)
    for p in (0.1, 0.5, 0.9):
        assert sum(coin < p for coin in coins) / 4000 == pytest.approx(p, abs=0.025)
    assert not set(coins) & {step_coin(4, step) for step in range(4000)}


def test_one_coin_a_step_decides_for_all_layers_and_batches(train, steps, monkeypatch):
    between = []

    def after(self, *_):
        between.extend(m.taking_part for m in self.network.modules() if isinstance(m, StepTaker))

    monkeypatch.setattr(SegmentationModule, "on_train_batch_end", after)
    train("run", FOCUSED, {**FOCUSED, "places": "bottleneck"})
    assert between == [None] * 2 * EPOCHS * BATCHES
    for note in steps:
        assert note["taking_part"] == [step_coin(0, note["step"]) < 0.5] * 2
    assert {tuple(note["taking_part"]) for note in steps} == {(True, True), (False, False)}


def test_weight_decay_is_magnified_in_the_steps_that_take_part_alone(train, steps, monkeypatch):
    used = []

    def note(self, optimizer):
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        used.append((self.trainer.global_step, decays))

    monkeypatch.setattr(SegmentationModule, "on_before_optimizer_step", note)
    run = train("run", FOCUSED)
    expected = [
        (step, [0.01 if step_coin(0, step) < 0.5 else 1e-4, 0.0]) for step in range(EPOCHS * STEPS)
    ]
    assert used == expected
    assert {decays[0] for _, decays in used} == {0.01, 1e-4}
    checkpoint = torch.load(run.checkpoints / "last.ckpt", weights_only=True)
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [1e-4, 0.0]


def test_the_largest_of_several_magnified_decays_counts_and_none_changes_nothing(train, steps):
    layers = [{**FOCUSED, "magnified_weight_decay": decay} for decay in (0.02, None, 0.05)]
    train("run", *layers, training__epochs=1)
    wanted = {True: [0.05, 0.0], False: [1e-4, 0.0]}
    assert all(note["decays"] == wanted[note["taking_part"][0]] for note in steps)
    steps.clear()
    train("without", layers[1], training__epochs=1)
    assert {tuple(note["decays"]) for note in steps} == {(1e-4, 0.0)}


def test_a_layer_that_is_scheduled_takes_part_at_its_rate_in_force(train, steps):
    train("run", {**FOCUSED, "schedule": "linear", "p": 0.9})
    for note in steps:
        rate = 0.9 * note["step"] / (EPOCHS * STEPS)
        assert note["taking_part"] == [step_coin(0, note["step"]) < rate]


# Labels, held-out data, memory


def test_a_layer_gets_the_labels_of_each_batch_and_no_others(train, store, monkeypatch):
    probes: list[Probe] = []
    start = RegularizationControl.on_train_start

    def note(self, trainer, module):
        probes.extend(m for m in self.network.modules() if isinstance(m, Probe))
        for probe in probes:
            probe.seen.clear()  # measuring its rate came before
        start(self, trainer, module)

    batches, between = [], []
    step = SegmentationModule.training_step

    def watched(self, batch, index):
        batches.append(batch["mask"].clone())
        return step(self, batch, index)

    monkeypatch.setattr(RegularizationControl, "on_train_start", note)

    def after(self, *_):
        between.extend((probe.labels, probe.recording) for probe in probes)

    monkeypatch.setattr(SegmentationModule, "training_step", watched)
    monkeypatch.setattr(SegmentationModule, "on_train_batch_end", after)
    run = train("run", PROBE, training__epochs=2)
    (probe,) = probes
    trained = [labels for kind, labels in probe.seen if kind == "train"]
    assert len(trained) == len(batches) == 2 * BATCHES
    assert between == [(None, False)] * 2 * BATCHES
    assert all(torch.equal(a, b) for a, b in zip(trained, batches, strict=True))
    (held_out,) = json.loads((run.path / "splits.json").read_text())["val"]
    masks = torch.from_numpy(store.mask(held_out).copy())
    recorded = torch.cat([labels for kind, labels in probe.seen if kind == "record"])
    assert torch.equal(recorded, torch.cat([masks, masks]))
    assert {kind for kind, _ in probe.seen} == {"train", "record"}
    assert (probe.labels, probe.recording, probe.validation_sums) == (None, False, None)


def test_a_layer_for_another_number_of_classes_is_refused(train):
    with pytest.raises(
        MedsegError, match=r"0: Probe has classes 3, the data have 2 .*0\.classes=2"
    ):
        train("run", {**PROBE, "classes": 3})


def test_the_records_of_all_processes_are_added_before_a_layer_uses_them(monkeypatch):
    probe = Probe()
    control = RegularizationControl(nn.Sequential(probe), [], 0)
    trainer: Any = SimpleNamespace(world_size=2)
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda sums: sums.add_(torch.tensor([5.0, 3.0]))
    )
    control.on_validation_epoch_start(trainer, None)
    probe.eval()(torch.ones(1, 1, 1, 1))
    control.on_validation_epoch_end(trainer, None)
    assert probe.held_out.tolist() == [6.0 / 4.0]


def test_a_resumed_run_ends_as_one_that_was_never_stopped(train, steps):
    layers = [{**SCHEDULED, "schedule": {"name": "cosine", "start": 0.1}}, FOCUSED, PROBE]
    layers.append({"name": "nsdropout", "places": "decoder", "eval_mode": "mean_mask"})
    straight = train("straight", *layers)
    whole = list(steps)
    for epoch in (0, 2):
        steps.clear()
        interrupted(train, f"stopped_{epoch}", epoch, *layers)
        assert len(steps) == epoch * BATCHES + 4
        resumed = train(f"stopped_{epoch}", *layers)
        assert steps == whole
        assert same_weights(straight.path, resumed.path)
        assert straight.memory.read_bytes() == resumed.memory.read_bytes()
        pd.testing.assert_frame_equal(table_of(straight), table_of(resumed), check_exact=True)


def test_a_checkpoint_of_another_schedule_is_refused(train, tmp_path):
    interrupted(train, "run", 1, SCHEDULED)
    last = tmp_path / "run/checkpoints/last.ckpt"
    state = torch.load(last, weights_only=True)
    kept = state["regularization"]
    assert kept["progress"] == STEPS + 2
    assert kept["description"]["steps"] == EPOCHS * STEPS
    assert kept["description"]["entries"][0]["schedule"]["name"] == "linear"
    kept["description"]["entries"][0]["schedule"]["duration"] = 0.5
    torch.save(state, last)
    with pytest.raises(MedsegError, match=r"other schedules .*'duration': 0\.5.*run=DIR"):
        train("run", SCHEDULED)


def test_a_checkpoint_from_before_there_were_schedules_goes_on(train, tmp_path):
    plain = {**SCHEDULED, "schedule": "constant"}
    interrupted(train, "run", 1, plain)
    last = tmp_path / "run/checkpoints/last.ckpt"
    state = torch.load(last, weights_only=True)
    del state["regularization"]
    torch.save(state, last)
    assert same_weights(train("run", plain).path, train("straight", plain).path)


def test_a_finished_run_remembers_what_its_layers_knew_when_it_was_best(train, monkeypatch):
    from medseg_reg.engine.checkpoint import RunCheckpoint

    end, known = RunCheckpoint.on_train_epoch_end, []

    def note(self, trainer, module):
        end(self, trainer, module)
        memory = memory_of(module.network).get("bottleneck.after_block.0", {})
        known.append((self.best_epoch, memory.get("held_out")))

    monkeypatch.setattr(RunCheckpoint, "on_train_epoch_end", note)
    best = train("best", PROBE)
    epoch = known[-1][0]
    probe = load_run_network(best).get_submodule("bottleneck.after_block.0")
    assert torch.equal(probe.held_out, known[epoch][1])
    known.clear()
    last = train("last", PROBE, regularization__optimization__select="last")
    probe = load_run_network(last).get_submodule("bottleneck.after_block.0")
    assert torch.equal(probe.held_out, known[-1][1])
    assert not torch.equal(probe.held_out, known[0][1])
    assert not train("plain", SCHEDULED, training__epochs=1).memory.exists()


def test_a_run_that_was_killed_after_its_last_epoch_still_remembers(train, monkeypatch):
    last = {"regularization__optimization__select": "last", "training__epochs": 1}
    straight = train("straight", PROBE, **last)
    with monkeypatch.context() as patch:
        patch.setattr("medseg_reg.engine.fit.keep_weights", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train("run", PROBE, **last)
    run = train("run", PROBE, **last)
    assert run.memory.read_bytes() == straight.memory.read_bytes()


def test_a_run_from_before_there_were_schedules_is_still_its_own(train):
    plain = {**SCHEDULED, "schedule": "constant"}
    run = train("run", plain, training__epochs=1)
    written = yaml.safe_load((run.path / "config.yaml").read_text())
    del written["regularization"]["penalty"]["l1"]
    for key in ("schedule", "depth_ramp"):
        del written["regularization"]["architecture"][0][key]
    (run.path / "config.yaml").write_text(yaml.safe_dump(written))
    train("run", plain, training__epochs=1)
    with pytest.raises(MedsegError, match=r"0\.schedule\.name: constant, now linear"):
        train("run", SCHEDULED, training__epochs=1)


def test_a_memory_of_another_network_is_refused(tmp_path):
    probe = Probe()
    probe.held_out = torch.ones(3)
    path = tmp_path / "memory.safetensors"
    save_memory(nn.Sequential(nn.Conv2d(1, 1, 1), probe), path)
    with pytest.raises(MedsegError, match="memory of '1', where no layer is"):
        load_memory(nn.Sequential(nn.Conv2d(1, 1, 1)), path)
    with pytest.raises(MedsegError, match="memory of '1' does not fit: FocusedDropout remembers"):
        load_memory(nn.Sequential(nn.Conv2d(1, 1, 1), FocusedDropout()), path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(MedsegError, match=r"memory\.safetensors: cannot be read"):
        load_memory(nn.Sequential(nn.Conv2d(1, 1, 1), Probe()), path)


def test_the_layers_of_the_toolkit_are_served():
    assert isinstance(FocusedDropout(), StepTaker)
    assert not isinstance(FocusedDropout(), LabelReader)
    assert isinstance(NSDropout(), LabelReader)
    assert not isinstance(NSDropout(), StepTaker)
    assert isinstance(Probe(), LabelReader)

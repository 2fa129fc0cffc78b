"""The order of maps follows the normalization of the network, unless it is given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from medseg_reg.config import parse_config
from medseg_reg.engine.checkpoint import LAST as LAST_CHECKPOINT
from medseg_reg.engine.fit import fit
from medseg_reg.engine.memory_format import choose_memory_format
from medseg_reg.errors import MedsegError
from medseg_reg.files import read_json
from medseg_reg.inference.evaluation import evaluate
from medseg_reg.networks.build import build_network
from tests.stores import make_store
from tests.training import same_weights, tiny_config

LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format


def unet(norm: str) -> nn.Module:
    return build_network(
        in_channels=1, classes=2, head="softmax", name="unet", channels=[4, 8], norm=norm
    )


@pytest.mark.parametrize(
    ("wanted", "norm", "accelerator", "expected"),
    [
        ("auto", "batch", "cpu", LAST),
        ("auto", "batch", "cuda", LAST),
        ("auto", "batch", "mps", CONTIGUOUS),
        ("auto", "instance", "cpu", CONTIGUOUS),
        ("contiguous", "batch", "cpu", CONTIGUOUS),
        ("channels_last", "instance", "cpu", LAST),
    ],
)
def test_the_format_follows_norm_and_device_unless_given(wanted, norm, accelerator, expected):
    assert choose_memory_format(wanted, unet(norm), accelerator) == expected


def test_one_layer_that_needs_the_other_order_decides():
    mixed = nn.Sequential(unet("batch"), nn.GroupNorm(1, 2))
    assert choose_memory_format("auto", mixed, "cpu") == CONTIGUOUS


@pytest.mark.parametrize(("norm", "expected"), [("batch", LAST), ("instance", CONTIGUOUS)])
def test_a_run_computes_in_the_chosen_format_and_notes_it(tmp_path, monkeypatch, norm, expected):
    from medseg_reg.engine.module import SegmentationModule

    seen = []
    original = SegmentationModule.training_step

    def watched(self, batch, batch_idx):
        weight = self.network.get_parameter("encoder.0.conv2.weight")
        seen.append(weight.is_contiguous(memory_format=LAST) and not weight.is_contiguous())
        return original(self, batch, batch_idx)

    monkeypatch.setattr(SegmentationModule, "training_step", watched)
    store = make_store(tmp_path / "store", cases=6, slices=2, size=32)
    content = tiny_config(store.path, tmp_path / "run", network__norm=norm, training__epochs=1)
    run = fit(parse_config(content, "test"))
    assert set(seen) == {expected == LAST}
    said = str(expected).removeprefix("torch.")
    assert read_json(run.path / "environment.json")["memory_format"] == said
    assert evaluate(run)["training"]["memory_format"] == said


def test_a_configuration_of_before_keeps_its_format(tmp_path):
    for switch, expected in ((True, "channels_last"), (False, "contiguous")):
        content = tiny_config(tmp_path, tmp_path, training__channels_last=switch)
        assert parse_config(content, "test").training.memory_format == expected


def test_the_older_switch_beside_the_key_that_replaced_it_is_refused(tmp_path):
    content = tiny_config(
        tmp_path, tmp_path, training__channels_last=True, training__memory_format="auto"
    )
    with pytest.raises(MedsegError, match=r"training\.channels_last"):
        parse_config(content, "test")


def as_of_before(run: Path) -> None:
    """Make of a finished run one that was interrupted before there was `memory_format`."""
    (run / "weights.safetensors").unlink()
    (run / "checkpoints" / LAST_CHECKPOINT).unlink()
    content = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
    training = content["training"]
    training["channels_last"] = training.pop("memory_format") == "channels_last"
    del training["compile"], training["keep_memory"]
    (run / "config.yaml").write_text(yaml.safe_dump(content), "utf-8")


def test_a_run_of_before_goes_on_in_its_order_and_is_evaluated(tmp_path):
    store = make_store(tmp_path / "store", cases=6, slices=2, size=32)
    # `auto` would be contiguous for this network.
    changes = {"network__norm": "instance", "training__epochs": 2, "training__precision": "32"}
    runs = {}
    for name in ("straight", "older"):
        content = tiny_config(
            store.path, tmp_path / name, training__memory_format="channels_last", **changes
        )
        runs[name] = fit(parse_config(content, "test"))
    as_of_before(runs["older"].path)
    again = tiny_config(store.path, tmp_path / "older", **changes)
    run = fit(parse_config(again, "test"))
    assert read_json(run.path / "environment.json")["memory_format"] == "channels_last"
    assert same_weights(tmp_path / "straight", tmp_path / "older")
    assert evaluate(run)["dice"] == evaluate(runs["straight"])["dice"]


@pytest.mark.parametrize(
    ("name", "precision", "clip", "fused"),
    [
        ("adam", "32", None, True),
        ("adamw", "32", 1.0, True),
        ("sgd", "bf16", None, True),
        ("sgd", "bf16", 1.0, None),
    ],
)
def test_every_optimizer_steps_in_one_kernel(tmp_path, monkeypatch, name, precision, clip, fused):
    from medseg_reg.engine.module import SegmentationModule

    made = []
    original = SegmentationModule.configure_optimizers
    monkeypatch.setattr(
        SegmentationModule,
        "configure_optimizers",
        lambda self: made.append(original(self)) or made[0],
    )
    store = make_store(tmp_path / "store", cases=6, slices=2, size=32)
    content = tiny_config(
        store.path,
        tmp_path / "run",
        optimizer={"name": name},
        training__epochs=1,
        training__precision=precision,
        regularization__optimization={"gradient_clip": clip},
    )
    fit(parse_config(content, "test"))
    assert made[0].defaults["fused"] is fused

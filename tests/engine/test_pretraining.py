"""A pre-training without labels: its run, its weights, and that it goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from medseg_reg.config import main as check
from medseg_reg.config import parse_as, parse_config
from medseg_reg.config_pretraining import PretrainingConfig, load_pretraining
from medseg_reg.data.splits import make_splits
from medseg_reg.data.store import SliceStore
from medseg_reg.engine import pretraining
from medseg_reg.engine.fit import fit
from medseg_reg.engine.network import build_plain_network, load_run_pretrained
from medseg_reg.engine.origins import weights_origin
from medseg_reg.engine.pretraining import (
    PretrainingDirectory,
    PretrainingModule,
    build_autoencoder,
    pretrain,
    same_masks,
)
from medseg_reg.engine.run_directory import DataFacts, RunDirectory
from medseg_reg.engine.seen import Seen, read_seen
from medseg_reg.errors import MedsegError
from medseg_reg.networks.masked_autoencoder import reconstruction_loss
from medseg_reg.networks.pretrained import load_pretrained
from medseg_reg.pretrain import main
from tests.stores import make_store
from tests.training import interrupted_at, same_weights, tiny_config, tiny_unetr, write_config

NETWORK = tiny_unetr(64)
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SliceStore:
    return make_store(tmp_path_factory.mktemp("data") / "store", cases=6, slices=4, size=64)


def content(store: SliceStore, path: Path, **changes: Any) -> dict[str, Any]:
    masking = {"width": 12, "blocks": 1, "heads": 2}
    data = [{"name": "Rotate", "limit": 20, "p": 0.5}]
    given = {"network": NETWORK, "masking": masking, "regularization": {"data": data}}
    return tiny_config(store.path, path, **{**given, "training__epochs": 2, **changes})


def config(store: SliceStore, path: Path, **changes: Any) -> PretrainingConfig:
    return parse_as(PretrainingConfig, content(store, path, **changes), path.name)


@pytest.fixture(scope="module")
def run(store: SliceStore, tmp_path_factory: pytest.TempPathFactory) -> PretrainingDirectory:
    """Pre-train on the store without its labels; other runs that end alike cannot read them."""
    original = SliceStore.mask
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SliceStore, "mask", lambda *given: np.zeros_like(original(*given)))
        return pretrain(config(store, tmp_path_factory.mktemp("runs") / "run"))


# The run


def test_its_directory_has_weights_scores_and_a_picture(
    store: SliceStore, run: PretrainingDirectory
) -> None:
    assert {path.name for path in run.path.iterdir()} == {
        *("config.yaml", "environment.json", "data.json", "splits.json", "metrics.csv"),
        *("checkpoints", "tensorboard", "weights.safetensors", "summary.json"),
        *("reconstructions.png", "seen.json"),
    }
    table = pd.read_csv(run.path / "metrics.csv")
    names = ["epoch", "train_loss", "val_loss", "val_mean_patch", "lr", "seconds"]
    assert list(table.columns) == names
    assert table.notna().to_numpy().all()
    assert table["val_mean_patch"].nunique() == 1  # the same patches are hidden in each epoch
    summary = json.loads(run.summary.read_text())
    assert (summary["patches"], summary["visible"], summary["epoch"]) == (16, 4, 2)
    assert summary["val_loss"] == pytest.approx(table["val_loss"].iloc[-1])
    seen = read_seen(run, store)
    splits = run.splits(store)
    assert splits is not None
    assert seen == Seen.of(store, splits, slices_per_epoch=12)
    picture = np.asarray(Image.open(run.path / "reconstructions.png").convert("RGB"))
    blue = (picture == (0x3B, 0x6E, 0xA5)).all(-1).mean()
    assert 0.1 < blue < 0.3  # three quarters of one of three columns


def test_the_same_command_again_changes_nothing(
    store: SliceStore, run: PretrainingDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    path = write_config(run.path.parent / "again.yaml", content(store, run.path))
    main(["--config", str(path)])
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before
    said = capsys.readouterr().out
    assert "4 of 16 patches visible; error on the others" in said
    assert said.endswith(f"Train with network.pretrained={run.weights}\n")


def test_the_validation_score_is_the_error_on_the_hidden_patches_of_held_out_slices(
    store: SliceStore, run: PretrainingDirectory
) -> None:
    spec = load_pretraining(run.path / "config.yaml")
    network, _ = build_autoencoder(spec, DataFacts.of(store, 1), (64, 64))
    state = torch.load(run.checkpoints / "last.ckpt", weights_only=True)["state_dict"]
    network.load_state_dict({key.removeprefix("network."): one for key, one in state.items()})
    (case,) = json.loads((run.path / "splits.json").read_text())["val"]
    images = torch.from_numpy(store.image(case) / np.float32(255))[:, None]
    errors, constant = [], []
    for number, batch in enumerate(images.split(2)):
        with same_masks(torch.device("cpu"), number), torch.no_grad():
            prediction, hidden = network.eval()(batch)
        target = network.targets(batch)
        errors.append(float(reconstruction_loss(prediction, target, hidden)))
        constant.append(float(target[hidden].var(0, unbiased=False).mean()))
    summary = json.loads(run.summary.read_text())
    assert summary["val_loss"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert summary["val_mean_patch"] == pytest.approx(np.mean(constant), rel=1e-4)


def test_masks_of_a_validation_leave_the_training_s_random_numbers_alone() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    draws = []
    for _ in range(2):
        with same_masks(torch.device("cpu"), 5):
            draws.append(torch.rand(4))
    assert torch.equal(*draws)
    assert torch.equal(torch.rand(2), wanted)


@pytest.mark.parametrize("how", ["killed", pytest.param("terminated", marks=pytest.mark.slow)])
def test_a_run_that_was_stopped_or_that_has_labels_ends_with_the_same_weights(
    store: SliceStore,
    run: PretrainingDirectory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    spec = config(store, tmp_path / "run")
    with interrupted_at(1, 2, module=PretrainingModule, how=how):
        pretrain(spec)
    assert not (tmp_path / "run" / "weights.safetensors").exists()
    pretrain(spec)
    assert same_weights(run.path, tmp_path / "run")
    paths = (run.path, tmp_path / "run")
    tables = [pd.read_csv(path / "metrics.csv").drop(columns="seconds") for path in paths]
    pd.testing.assert_frame_equal(*tables, check_exact=True)


# Its weights


def test_its_weights_are_the_encoder_s_and_change_the_features_of_a_network(
    store: SliceStore, run: PretrainingDirectory
) -> None:
    spec = load_pretraining(run.path / "config.yaml").network
    torch.manual_seed(1)
    network = build_plain_network(spec, DataFacts.of(store, 1))
    names = {name for name in network.state_dict() if name.startswith("network.vit.")}
    weights = load_file(run.weights)
    assert weights.keys() == names
    image = torch.rand(1, 1, 64, 64)
    decoder = {k: v.clone() for k, v in network.state_dict().items() if k not in names}
    before = [one.detach() for one in network.network.vit(image)[1]]
    report = load_pretrained(network, run.weights)
    assert (report.part, set(report.taken), report.new) == ("encoder", names, ())
    after = [one.detach() for one in network.network.vit(image)[1]]
    assert all(not torch.allclose(a, b) for a, b in zip(before, after, strict=True))
    found = network.state_dict()
    assert all(torch.equal(found[name], weights[name]) for name in names)
    assert all(torch.equal(found[name], value) for name, value in decoder.items())


def test_a_training_begins_with_them_at_another_size_too(
    store: SliceStore, run: PretrainingDirectory, tmp_path: Path
) -> None:
    changes = {"img_size": 32, "pretrained": str(run.weights)}
    content = tiny_config(store.path, tmp_path / "run", network={**NETWORK, **changes})
    spec = parse_config(content, "test")
    network = build_plain_network(spec.network, DataFacts.of(store, 1))
    report = load_run_pretrained(network, spec)
    assert report is not None
    origin = weights_origin(spec, make_splits(store, spec.data.split), store)
    assert origin is not None
    # All four slices of three cases in both epochs; the split of the training is the same.
    told = (origin.kind, origin.path, origin.epochs, origin.slices, origin.test, origin.val)
    assert told == ("pre-training", str(run.path), 2, 12, (), ())
    positions = "network.vit.patch_embedding.position_embeddings"
    assert (report.part, report.resized) == ("encoder", (positions,))
    found, weights = network.state_dict(), load_file(run.weights)
    assert all(torch.equal(found[name], weights[name]) for name in weights.keys() - {positions})


@pytest.mark.parametrize("beside", ["token_labels", "token_selection"])
def test_what_stands_beside_the_blocks_is_new_then(
    store: SliceStore, run: PretrainingDirectory, tmp_path: Path, beside: str
) -> None:
    changes = {beside: {}, "pretrained": str(run.weights)}
    content = tiny_config(store.path, tmp_path / "run", network={**NETWORK, **changes})
    spec = parse_config(content, "test")
    network = build_plain_network(spec.network, DataFacts.of(store, 1))
    report = load_run_pretrained(network, spec)
    assert report is not None
    assert (report.part, set(report.taken)) == ("encoder", load_file(run.weights).keys())
    assert report.new
    name = {"token_labels": ".token_labels.head.", "token_selection": ".selection.predictor."}
    assert all(name[beside] in one for one in report.new)
    assert f"{len(report.new)} not in the file" in str(report)
    # Nothing else may be missing.
    weights = load_file(run.weights)
    weights.pop("network.vit.norm.weight")
    save_file(weights, tmp_path / "less.safetensors")
    with pytest.raises(MedsegError, match=r"1 are not in the file \(network\.vit\.norm\.weight\)"):
        load_pretrained(network, tmp_path / "less.safetensors", part="encoder")


def test_a_pre_training_may_begin_with_weights_of_a_file(
    store: SliceStore, run: PretrainingDirectory, tmp_path: Path
) -> None:
    spec = config(store, tmp_path / "run", network={**NETWORK, "pretrained": str(run.weights)})
    facts, weights = DataFacts.of(store, 1), load_file(run.weights)
    network, report = build_autoencoder(spec, facts, (64, 64))
    assert report is not None
    found = network.encoder.weights()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    # One that goes on has them in its checkpoint: the file is not needed any more.
    assert build_autoencoder(spec, facts, (64, 64), begun=True)[1] is None


@pytest.mark.slow
def test_the_vit_of_timm_inside_dpt_is_pre_trained_too(store: SliceStore, tmp_path: Path) -> None:
    network = {
        "name": "smp.DPT",
        "encoder_name": "tu-vit_tiny_patch16_224",
        "dynamic_img_size": True,
        "decoder_fusion_channels": 8,
        "decoder_intermediate_channels": [4, 4, 4, 4],
    }
    done = pretrain(config(store, tmp_path / "run", network=network, training__epochs=1))
    spec = load_pretraining(done.path / "config.yaml").network
    report = load_pretrained(build_plain_network(spec, DataFacts.of(store, 1)), done.weights)
    assert (report.part, len(report.taken), report.new) == ("encoder", 152, ())


# Its configuration


def test_the_configuration_is_checked_and_printed_by_the_same_command_as_any_other(
    store: SliceStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path / "pretraining.yaml", content(store, tmp_path / "run"))
    check([str(path), "seed=3"])
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert load_pretraining(tmp_path / "printed.yaml") == load_pretraining(path, ["seed=3"])


# What cannot be


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"network": {"name": "unet"}}, "'network.name': input should be 'monai.UNETR'"),
        ({"network": {**NETWORK, "experts": {}}}, "experts is for the training with labels"),
        ({"network": {**NETWORK, "token_labels": {}}}, "token_labels is for the training with la"),
        ({"masking": {"ratio": 1}}, "'masking.ratio': input should be less than 1"),
        ({"masking": {"width": 20, "heads": 3}}, "width 20 cannot be shared by 3 heads"),
        ({"evaluation": {}}, "unknown key 'evaluation'"),
        ({"regularization": {"error": {"ce": 1.0}}}, "unknown key 'regularization.error'"),
    ],
)
def test_a_configuration_of_something_else_is_refused(
    store: SliceStore, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(MedsegError, match=said):
        config(store, tmp_path / "run", **changes)


def test_a_run_that_cannot_begin_leaves_nothing_behind(store: SliceStore, tmp_path: Path) -> None:
    network = {**NETWORK, "pretrained": str(tmp_path / "nothing.safetensors")}
    with pytest.raises(MedsegError, match="nothing.safetensors: does not exist"):
        pretrain(config(store, tmp_path / "run", network=network))
    assert not (tmp_path / "run").exists()


def test_ignored_pixels_need_no_key_but_a_wrong_one_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path / "store", slices=1, ignore_label=255)

    def begins(*given: Any) -> None:
        raise MedsegError("it begins")

    monkeypatch.setattr(pretraining, "build_autoencoder", begins)
    for label, said in ((None, "it begins"), (255, "it begins"), (254, "--ignore-label 255")):
        with pytest.raises(MedsegError, match=said):
            pretrain(config(store, tmp_path / "run", data__ignore_label=label))
    with pytest.raises(MedsegError, match=r"Set data\.ignore_label=255"):
        fit(parse_config(tiny_config(store.path, tmp_path / "run"), "test"))


def test_the_two_kinds_of_runs_are_told_apart(
    store: SliceStore, run: PretrainingDirectory, tmp_path: Path
) -> None:
    with pytest.raises(MedsegError, match="is a run of pre-training, no run of training"):
        RunDirectory(run.path).config()
    labelled = tmp_path / "labelled"
    labelled.mkdir()
    (labelled / "config.yaml").write_text(
        parse_config(tiny_config(store.path, labelled), "test").to_yaml()
    )
    with pytest.raises(MedsegError, match="is a run of training with labels, no run of pre-tr"):
        pretrain(config(store, labelled))


# On real frames


@pytest.mark.slow
def test_on_frames_of_bagls_it_beats_the_mean_patch(
    shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    from data_prep.bagls import main as convert

    convert(["--source", str(shared_data("bagls")), "--out", str(tmp_path / "store")])
    spec = load_pretraining(
        CONFIGS / "pretraining" / "bagls_small_unetr.yaml",
        [
            f"data.store={tmp_path / 'store'}",
            f"run={tmp_path / 'run'}",
            "data.image.size=[64, 64]",
            "network.img_size=64",
            "data.batch_size=16",
            "training.epochs=8",
            "training.accelerator=cpu",
            "training.progress=false",
            "schedule.warmup_epochs=1",
            "masking.normalize=false",
        ],
    )
    summary = json.loads(pretrain(spec).summary.read_text())
    assert summary["val_loss"] < summary["val_mean_patch"]

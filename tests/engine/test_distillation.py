"""A run learns from a finished one, which stays as it was and is not needed afterwards."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from medseg_reg.config import parse_config
from medseg_reg.config_regularization import DistillationSpec
from medseg_reg.data.mix_token import MixToken
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.distillation import Distillation, check_teacher_size
from medseg_reg.engine.fit import fit
from medseg_reg.engine.module import SegmentationModule
from medseg_reg.engine.network import load_run_network
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.errors import MedsegError
from medseg_reg.losses import MixedLoss, distillation_loss
from medseg_reg.networks import GuidedLogits
from medseg_reg.networks.build import build_network
from tests.stores import make_store
from tests.training import interrupted_at, same_weights, tiny_config, trained

KEY = "regularization__error__distillation"
PLUS = {"name": "unet3plus", "channels": [4, 8], "cat_channels": 3}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SliceStore:
    return make_store(tmp_path_factory.mktemp("data") / "store", slices=2, size=(21, 26))


@pytest.fixture(scope="module")
def teacher(store: SliceStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "teacher"
    return train(store, path, seed=3, network={"channels": [4, 8], "head": "sigmoid"}).path


def train(store: SliceStore, path: Path, **changes: Any) -> RunDirectory:
    changes = {"training__epochs": 1, "regularization__architecture": [], **changes}
    return fit(parse_config(tiny_config(store.path, path, **changes), path.name))


def part(kind: str = "soft", weight: float = 0.3, **more: Any) -> Distillation:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Dropout(0.5), nn.BatchNorm2d(3))
    spec = DistillationSpec(teacher=Path("t"), kind=kind, weight=weight, **more)
    return Distillation(network.train(), spec, "halving")


# The loss


@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("form", ["one", "levels", "guided"])
def test_labels_and_teacher_share_the_loss(kind: str, form: str) -> None:
    torch.manual_seed(0)
    own = part(kind, **({"temperature": 3.0} if kind == "soft" else {}))
    image, labels = torch.rand(2, 1, 6, 5), torch.randint(0, 3, (2, 6, 5))
    logits = torch.randn(2, 3, 6, 5, requires_grad=True)
    output: Any = {
        "one": logits,
        "levels": [logits, 2 * logits],
        "guided": GuidedLogits([logits, 2 * logits], torch.zeros(2, 2)),
    }[form]
    loss_of = module()._loss_of
    told = own.teacher(image)
    if kind == "hard":
        expected = 0.7 * loss_of(output, labels) + 0.3 * loss_of(output, told.argmax(1))
    else:
        levels = output.logits if form == "guided" else output
        distance = distillation_loss(levels, told, 3.0, "halving")
        expected = 0.7 * loss_of(output, labels) + 0.3 * distance
    found = own.mixed(loss_of(output, labels), image, labels, output, loss_of)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad != 0).any()
    assert all(p.grad is None and not p.requires_grad for p in own.teacher.parameters())
    assert own.teacher[2].num_batches_tracked == 0


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_ignored_pixels_count_in_no_part(kind: str) -> None:
    own, loss = part(kind, weight=1.0), MixedLoss(ce=1.0, ignore=255)
    own.ignored = 255
    image, labels = torch.rand(1, 1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8)
    labels[:, :, 2:] = 255
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    found = own.mixed(torch.tensor(0.0), image, labels, logits, loss)
    half = own.teacher(image)[..., :2]
    left = logits[..., :2]
    expected = distillation_loss(left, half) if kind == "soft" else loss(left, half.argmax(1))
    torch.testing.assert_close(found, expected)
    found.backward()
    assert torch.equal((logits.grad != 0).any(1), labels == 0)


@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("how", ["compiled", "recomputed"])
def test_a_compiled_or_recomputed_network_learns_the_same_from_mixed_images(
    kind: str, how: str
) -> None:
    taught, mix, loss = part(kind), MixToken(1.0, patch=(4, 4)), MixedLoss(ce=1.0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Dropout(0.5), nn.Conv2d(4, 3, 1))
    ways = {
        "compiled": torch.compile(network, backend="eager", fullgraph=True),
        "recomputed": partial(checkpoint, network, use_reentrant=False),
    }
    found = []
    for forward in (network, ways[how]):
        network.zero_grad()
        torch.manual_seed(4)
        batch = mix({"image": torch.rand(2, 1, 8, 8), "mask": torch.randint(3, (2, 8, 8))})
        image, labels = batch["image"], batch["mask"]
        logits = forward(image)
        taught.mixed(loss(logits, labels), image, labels, logits, loss).backward()
        found.append([weight.grad.clone() for weight in network.parameters()])
    assert all(map(torch.equal, *found))
    assert all(grad.abs().max() > 0 for grad in found[0])


def test_a_weight_of_nothing_asks_no_teacher() -> None:
    own, loss, labels = part(weight=0.0), torch.tensor(2.0), torch.zeros(1, 2, 2)
    own.teacher = None  # type: ignore[assignment]
    logits = torch.zeros(1, 3, 2, 2)
    assert own.mixed(loss, torch.rand(1, 1, 2, 2), labels, logits, module()._loss_of) is loss


def module(**more: Any) -> SegmentationModule:
    config = parse_config(tiny_config(Path("s"), Path("r")), "test")
    loss = MixedLoss(ce=1.0, supervision="halving")
    return SegmentationModule(nn.Conv2d(1, 3, 1), loss, config, ["a"], 3, **more)


def test_the_teacher_is_no_part_of_what_is_trained_or_kept() -> None:
    own, plain = module(distillation=part()), module()
    assert own.state_dict().keys() == plain.state_dict().keys()
    assert len(list(own.parameters())) == len(list(plain.parameters()))
    own.train()
    assert not any(m.training for m in own.distillation.teacher.modules())


# Runs


def test_a_run_learns_from_another_and_goes_on_where_it_stopped(
    store: SliceStore, teacher: Path, tmp_path: Path
) -> None:
    changes = {KEY: {"teacher": str(teacher), "temperature": 2.0}, "training__epochs": 2}
    straight = train(store, tmp_path / "straight", **changes)
    plain = train(store, tmp_path / "plain", training__epochs=2)
    assert not same_weights(straight.path, plain.path)
    note = json.loads((straight.path / "teacher.json").read_text())
    assert (note["run"], len(note["sha256"])) == (str(teacher), 64)
    (learned,) = json.loads((straight.path / "environment.json").read_text())["learned_from"]
    assert learned == note["origin"]
    # One epoch of two slices from each of three cases.
    assert (learned["epochs"], learned["slices"], len(learned["cases"])) == (1, 6, 3)
    assert learned["said"].startswith(f"{teacher} is a teacher (epochs: 1, slices in each: 6, ")
    assert learned["said"].endswith("It has seen none of the 2 test cases.")
    assert not (plain.path / "teacher.json").exists()
    assert load_file(straight.weights).keys() == load_file(plain.weights).keys()
    kept, other = (
        torch.load(run.checkpoints / "last.ckpt", weights_only=True) for run in (straight, plain)
    )
    assert kept["state_dict"].keys() == other["state_dict"].keys()
    with interrupted_at(1, 0):
        train(store, tmp_path / "resumed", **changes)
    resumed = train(store, tmp_path / "resumed", **changes)
    assert same_weights(straight.path, resumed.path)


def test_a_weight_of_nothing_trains_the_same_weights(
    store: SliceStore, teacher: Path, tmp_path: Path
) -> None:
    train(store, tmp_path / "none", **{KEY: {"teacher": str(teacher), "weight": 0}})
    train(store, tmp_path / "plain")
    assert same_weights(tmp_path / "none", tmp_path / "plain")


def test_hard_labels_train_a_guided_network_in_bfloat16_and_the_teacher_is_not_needed_then(
    store: SliceStore, teacher: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    before = moved.joinpath("weights.safetensors").read_bytes()
    network = {**PLUS, "deep_supervision": True, "classification_guided": True}
    seen: list[torch.Tensor] = []
    original = Distillation.mixed

    def noted(self: Distillation, loss: Any, image: torch.Tensor, *more: Any) -> torch.Tensor:
        seen.append(image)
        return original(self, loss, image, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Distillation, "mixed", noted)
        changes: dict[str, Any] = {"network": network, "training__epochs": 1}
        changes |= {KEY: {"teacher": str(moved), "kind": "hard"}, "training__precision": "bf16"}
        content = tiny_config(store.path, tmp_path / "run", **changes)
        trained(tmp_path / "run.yaml", content)
    run = RunDirectory(tmp_path / "run")
    assert (run.path / "summary.json").exists()
    assert len(seen) == 3
    assert seen[0].shape == (2, 1, 21, 26)
    assert moved.joinpath("weights.safetensors").read_bytes() == before
    shutil.rmtree(moved)
    assert fit(parse_config(content, "run")).finished
    assert load_run_network(run)(torch.rand(1, 1, 21, 26)).shape == (1, 2, 21, 26)


# What cannot be


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"kind": "firm"}, "'soft' or 'hard'"),
        ({"weight": 1.5}, "weight"),
        ({"temperature": 0}, "temperature"),
        ({"kind": "hard", "temperature": 2}, "'temperature' belongs to kind 'soft'"),
        ({"tempreature": 2}, "temperature"),
    ],
)
def test_a_wrong_key_is_refused(store: SliceStore, spec: dict[str, Any], said: str) -> None:
    content = tiny_config(store.path, Path("r"), **{KEY: {"teacher": "t", **spec}})
    with pytest.raises(MedsegError, match=said):
        parse_config(content, "test")


def test_a_teacher_that_is_no_finished_run_is_refused(
    store: SliceStore, teacher: Path, tmp_path: Path
) -> None:
    for path, said in ((tmp_path / "no", "is not a run directory"), (None, "is not finished")):
        if path is None:
            path = Path(shutil.copytree(teacher, tmp_path / "half"))
            (path / "weights.safetensors").unlink()
        with pytest.raises(MedsegError, match=rf"distillation\.teacher: .*{said}"):
            train(store, tmp_path / "run", **{KEY: {"teacher": str(path)}})
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_other_images_or_classes_is_refused(
    store: SliceStore, teacher: Path, tmp_path: Path
) -> None:
    three = make_store(tmp_path / "three", slices=2, size=(21, 26), classes=3)
    colour = make_store(tmp_path / "colour", slices=2, size=(21, 26), channels=3)
    distilled = {KEY: {"teacher": str(teacher)}}
    for one, more, said in (
        (
            three,
            {},
            r"classes \['background', 'class_1'\], this run has \['background', 'class_1',",
        ),
        (colour, {}, "channels 1, this run has 3"),
        (
            store,
            {"data__image": {"window": [0, 100]}},
            r"data.image.window None, .* \(0.0, 100.0\)",
        ),
    ):
        with pytest.raises(MedsegError, match=f"was trained with {said}"):
            train(one, tmp_path / "run", **distilled, **more)
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_knows_the_cases_of_the_test_is_refused(
    store: SliceStore, teacher: Path, tmp_path: Path
) -> None:
    split = {"kind": "counts", "train": 3, "val": 1, "test": 2, "seed": 5}
    distilled = {KEY: {"teacher": str(teacher)}}
    with pytest.raises(MedsegError, match=r"has learned from case_.* with the same data\.split"):
        train(store, tmp_path / "run", data__split=split, **distilled)
    # Converted anew, with another licence, it is another store with the same images.
    anew = Path(shutil.copytree(store.path, tmp_path / "anew"))
    manifest = (anew / "manifest.json").read_text().replace('"licence": "none"', '"licence": "x"')
    (anew / "manifest.json").write_text(manifest)
    with pytest.raises(MedsegError, match="has learned from case_"):
        train(SliceStore(anew), tmp_path / "run", data__split=split, **distilled)
    other = make_store(tmp_path / "other", slices=2, size=(21, 26), seed=1)
    train(other, tmp_path / "run", data__split=split, **distilled)


def test_a_teacher_that_reads_the_labels_of_its_test_is_refused(
    store: SliceStore, tmp_path: Path
) -> None:
    layers = [{"name": "nsdropout", "eval_mode": "true_label"}]
    cheat = train(store, tmp_path / "cheat", regularization__architecture=layers)
    with pytest.raises(MedsegError, match="a layer that reads the labels of what it is tested on"):
        train(store, tmp_path / "run", **{KEY: {"teacher": str(cheat.path)}})


def test_a_teacher_that_takes_another_size_alone_is_refused() -> None:
    pytest.importorskip("einops")
    network = build_network(
        in_channels=1, classes=2, head="softmax", name="monai.UNETR", img_size=32,
        feature_size=4, hidden_size=12, mlp_dim=16, num_heads=3,
    )  # fmt: skip
    own = Distillation(network, DistillationSpec(teacher=Path("runs/unetr")))
    check_teacher_size(own.teacher, own.spec, 1, (32, 30))
    with pytest.raises(MedsegError, match=r"teacher: runs/unetr: .* 48x48 is no size .* 32x32"):
        check_teacher_size(own.teacher, own.spec, 1, (48, 48))


def test_a_teacher_that_changed_in_the_meantime_is_refused(
    store: SliceStore, teacher: Path, tmp_path: Path
) -> None:
    run = train(store, tmp_path / "run", **{KEY: {"teacher": str(teacher)}})
    run.weights.unlink()
    note = json.loads((run.path / "teacher.json").read_text())
    (run.path / "teacher.json").write_text(json.dumps({**note, "sha256": "0" * 64}))
    with pytest.raises(MedsegError, match="has changed since .* began to learn from it"):
        train(store, tmp_path / "run", **{KEY: {"teacher": str(teacher)}})

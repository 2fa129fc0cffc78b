"""Weight decay, L1, label smoothing and early stopping do what their formulas say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from medseg_reg.config import Config, parse_config
from medseg_reg.engine.fit import _loss, fit
from medseg_reg.engine.module import SegmentationModule
from medseg_reg.losses import MixedLoss
from tests.stores import make_store
from tests.training import tiny_config

LR, DECAY = 0.1, 0.5


def config(**changes: Any) -> Config:
    return parse_config(tiny_config(Path("store"), Path("run"), **changes), "test")


def module(**changes: Any) -> SegmentationModule:
    """Return a training module around one convolution and one normalization."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3))
    return SegmentationModule(network, MixedLoss(), config(**changes), ["case"], 2)


def step(name: str, decay: float = DECAY, **more: Any) -> tuple[Tensor, Tensor, SegmentationModule]:
    """Take one step with every gradient 0.3; return the weight before and after."""
    own = module(
        optimizer={"name": name, "lr": LR, **more}, regularization__penalty__weight_decay=decay
    )
    optimizer = own.configure_optimizers()
    for parameter in own.network.parameters():
        parameter.grad = torch.full_like(parameter, 0.3)
    before = own.network[0].weight.detach().clone()
    optimizer.step()
    return before, own.network[0].weight.detach(), own


def test_the_decay_of_sgd_is_an_l2_penalty():
    before, after, _ = step("sgd", momentum=0.0)
    torch.testing.assert_close(after, before - LR * (0.3 + DECAY * before))


def test_the_decay_of_adam_is_an_l2_penalty_which_adam_scales():
    before, after, _ = step("adam")
    gradient = 0.3 + DECAY * before
    # In the first step both moments are corrected to g and g^2, so only the sign of g is left.
    torch.testing.assert_close(after, before - LR * gradient / (gradient.abs() + 1e-8))


def test_the_decay_of_adamw_is_decoupled():
    before, after, _ = step("adamw")
    torch.testing.assert_close(after, before * (1 - LR * DECAY) - LR * 0.3 / (0.3 + 1e-8))


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_biases_and_normalization_are_exempt(name: str):
    _, _, decayed = step(name)
    _, _, plain = step(name, decay=0.0)
    for (key, a), b in zip(
        decayed.network.named_parameters(), plain.network.parameters(), strict=True
    ):
        assert torch.equal(a, b) == (key != "0.weight"), key


def test_positions_and_class_tokens_of_transformers_are_exempt():
    timm = pytest.importorskip("timm")
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=4, depth=1, num_heads=1, num_classes=2
    )
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=16, embed_dim=4, depths=(1,), num_heads=(1,),
        window_size=2, num_classes=2,
    )  # fmt: skip
    for network in (vit, swin):
        own = module(regularization__penalty__weight_decay=DECAY)
        own.network = network
        optimizer = own.configure_optimizers()
        decayed, others = (set(group["params"]) for group in optimizer.param_groups)
        exempt = {name for name, p in network.named_parameters() if p in others}
        assert network.no_weight_decay() & dict(network.named_parameters()).keys() <= exempt
        assert {name for name in exempt if name.endswith(".weight")} == {
            name for name in exempt if name.endswith(".weight") and "norm" in name
        }
        assert len(decayed) + len(others) == len(list(network.parameters()))


def test_the_l1_penalty_adds_the_absolute_weights_of_convolutions_to_the_loss():
    batch = {"image": torch.randn(2, 1, 4, 4), "mask": torch.ones(2, 4, 4, dtype=torch.uint8)}
    plain, penalized = module(), module(regularization__penalty__l1=0.25)
    with torch.no_grad():
        penalized.network[0].weight[0] = plain.network[0].weight[0] = 0
    losses = [own.training_step(batch, 0) for own in (plain, penalized)]
    weight = plain.network[0].weight
    torch.testing.assert_close(losses[1] - losses[0], 0.25 * weight.abs().sum())
    for loss in losses:
        loss.backward()
    for (name, a), b in zip(
        plain.network.named_parameters(), penalized.network.parameters(), strict=True
    ):
        change = 0.25 * weight.sign() if name == "0.weight" else torch.zeros_like(a)
        torch.testing.assert_close(b.grad - a.grad, change)
    # The logged training loss stays comparable with that of the validation.
    assert torch.equal(plain.train_loss, penalized.train_loss)


def test_accumulated_batches_are_penalized_once():
    """Two halves of a batch give the step of the whole batch, penalty included."""
    image, mask = torch.randn(4, 1, 4, 4), torch.randint(0, 2, (4, 4, 4), dtype=torch.uint8)
    whole, halves = (module(regularization__penalty__l1=0.25) for _ in range(2))
    whole.network[1], halves.network[1] = nn.Identity(), nn.Identity()
    whole.training_step({"image": image, "mask": mask}, 0).backward()
    for part in (slice(0, 2), slice(2, 4)):
        # As Lightning does: each of the accumulated losses is divided by their number.
        (halves.training_step({"image": image[part], "mask": mask[part]}, 0) / 2).backward()
    torch.testing.assert_close(whole.network[0].weight.grad, halves.network[0].weight.grad)


def test_label_smoothing_moves_the_target_of_each_class():
    # Two classes with probabilities 1/4 and 3/4; the second is true, s = 0.2.
    logits = torch.tensor([0.0, math.log(3)]).view(1, 2, 1, 1)
    loss = _loss(config(regularization__error={"ce": 1, "label_smoothing": 0.2}), 2)
    expected = -(0.1 * math.log(1 / 4) + 0.9 * math.log(3 / 4))
    assert loss(logits, torch.ones(1, 1, 1).long()).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("monitor", "scores", "epochs"),
    [
        # Patience 2, min_delta 0.05. Best 0.6 in epoch 2; 0.64 is no improvement of more than 0.05.
        ("val_dice", [0.5, 0.6, 0.62, 0.64, 0.9, 0.9], 4),
        ("val_dice", [0.5, 0.56, 0.5, 0.62, 0.6, 0.6], 6),
        ("val_loss", [0.5, 0.4, 0.36, 0.42, 0.1, 0.1], 4),
    ],
)
def test_early_stopping_waits_for_its_patience(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    monitor: str,
    scores: list[float],
    epochs: int,
):
    def scripted(self: SegmentationModule) -> None:
        self.epoch_scores = {"val_dice": 0.5, monitor: scores[self.current_epoch]}
        for name, value in self.epoch_scores.items():
            self.log(name, value)

    monkeypatch.setattr(SegmentationModule, "on_validation_epoch_end", scripted)
    store = make_store(tmp_path / "store", cases=4, slices=1, size=16)
    content = tiny_config(
        store.path,
        tmp_path / "run",
        data__split={"kind": "counts", "train": 2, "val": 1, "test": 1},
        training__epochs=len(scores),
        regularization__optimization__early_stopping={
            "monitor": monitor,
            "patience": 2,
            "min_delta": 0.05,
        },
    )
    run = fit(parse_config(content, "test"))
    assert len(pd.read_csv(run.path / "metrics.csv")) == epochs


def test_the_l1_penalty_of_each_epoch_is_logged(tmp_path: Path):
    store = make_store(tmp_path / "store", cases=6, slices=2, size=16)
    content = tiny_config(
        store.path,
        tmp_path / "run",
        regularization__penalty__l1=0.1,
        regularization__optimization__select="last",
        optimizer__lr=0.01,
    )
    run = fit(parse_config(content, "test"))
    logged = pd.read_csv(run.path / "metrics.csv")["l1"]
    assert (logged.diff().dropna() < 0).all()
    weights = [w for w in load_file(run.weights).values() if w.ndim > 1]
    assert logged.iloc[-1] == pytest.approx(0.1 * sum(float(w.abs().sum()) for w in weights))

"""Maps before the output layer are taken away, correlated, and left as they were."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from medseg_reg.config import parse_config
from medseg_reg.engine.fit import fit
from medseg_reg.engine.network import load_run_network
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.errors import MedsegError
from medseg_reg.inference.evaluation import evaluate
from medseg_reg.networks.build import build_network
from medseg_reg.study import coadaptation as module
from medseg_reg.study.coadaptation import (
    channel_correlation,
    coadaptation,
    gaps,
    generalization_gap,
    loss_gap,
)
from medseg_reg.study.output_layer import OutputLayer, output_layer
from tests.stores import make_store
from tests.training import tiny_config

NETWORKS = {
    "unet": {"name": "unet", "channels": [4, 8]},
    "attention": {"name": "attention_unet", "channels": [4, 8, 8]},
    "guided": {
        "name": "unet3plus",
        "channels": [4, 8, 8],
        "cat_channels": 4,
        "classification_guided": True,
    },
    "monai": {"name": "monai.BasicUNet", "features": [4, 4, 4, 8, 8, 4]},
}


def trained(folder, **changes) -> RunDirectory:
    store = make_store(folder / "store", cases=8, slices=3, size=(32, 40),
                       groups=["a", "a", "b", "c", "d", "e", "f", "g"])  # fmt: skip
    base = {"training__epochs": 8, "optimizer__lr": 0.01, "regularization__architecture": []}
    return fit(parse_config(tiny_config(store.path, folder / "run", **base | changes), "test"))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunDirectory:
    return trained(tmp_path_factory.mktemp("coadaptation"))


def plainly(run: RunDirectory, masks: torch.Tensor) -> list[pd.Series]:
    """Score each mask by a network whose weights of the maps taken away are 0."""
    found = []
    for mask in masks:
        subject = module._Subject(run, None)
        with torch.no_grad():
            subject.output_layer().module.weight.mul_(mask.view(1, -1, 1, 1))
        counts = {
            case: module.count_slices(subject.labels(case), subject.store.mask(case), 2).sum(dim=0)
            for case in subject.cases("test")
        }
        found.append(subject.group_dice(counts))
    return found


def test_without_a_map_less_the_scores_are_those_of_the_evaluation(run):
    table = coadaptation(run, rates=(0.0,), draws=3)
    assert list(table.columns) == ["rate", "draw", "group", "dice"]
    assert set(table["draw"]) == {0}
    assert table["dice"].mean() == pytest.approx(evaluate(run)["dice"]["mean"])
    assert table["dice"].mean() > 0.3  # it learned something that can be lost


@pytest.mark.parametrize("name", ["unet", "attention", "guided"])
def test_taking_maps_away_is_setting_their_weights_to_zero(tmp_path, name):
    changed = trained(tmp_path, network=NETWORKS[name], training__epochs=2)
    table = coadaptation(changed, rates=(0.0, 0.25, 0.5), draws=2, seed=1)
    width = module._Subject(changed, None).output_layer().width
    asked, masks = module._masks(width, (0.0, 0.25, 0.5), 2, 1)
    for (rate, draw), wanted in zip(asked, plainly(changed, masks), strict=True):
        rows = table[(table["rate"] == rate) & (table["draw"] == draw)]
        assert rows["group"].tolist() == wanted.index.tolist()
        np.testing.assert_allclose(rows["dice"], wanted)


def test_a_tail_that_takes_no_batch_of_masks_gives_the_same_one_by_one(run, monkeypatch):
    together = coadaptation(run, draws=2)
    monkeypatch.setattr(module, "_same_together", lambda *_: False)
    pd.testing.assert_frame_equal(coadaptation(run, draws=2), together)


def test_a_tail_that_mixes_the_batch_is_noticed():
    masks = torch.ones(3, 4)
    mixed = iter([torch.zeros(1, 2, 4, 4), torch.ones(3, 2, 4, 4)])
    assert not module._same_together(lambda _: next(mixed), masks)
    assert not module._same_together(lambda some: torch.zeros(1, 2, 4, 4), masks)
    assert module._same_together(lambda some: torch.zeros(len(some), 2, 4, 4), masks)


def test_the_curve_falls_is_seeded_and_leaves_the_random_state_alone(run):
    state = torch.get_rng_state()
    table = coadaptation(run, draws=4, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    pd.testing.assert_frame_equal(table, coadaptation(run, draws=4, seed=5))
    assert not table.equals(coadaptation(run, draws=4, seed=6))
    means = table.groupby("rate")["dice"].mean()
    assert means[0.5] < means[0.0]


def test_a_higher_rate_takes_the_maps_of_a_lower_one_and_more():
    asked, masks = module._masks(10, (0.0, 0.1, 0.25, 0.5, 0.99), 3, 0)
    assert asked[0] == (0.0, 0)
    assert len(asked) == 1 + 4 * 3
    taken = {key: set(np.flatnonzero(mask == 0)) for key, mask in zip(asked, masks, strict=True)}
    assert [len(taken[rate, 1]) for rate in (0.1, 0.25, 0.5, 0.99)] == [1, 3, 5, 9]
    for draw in range(3):
        assert taken[0.1, draw] < taken[0.25, draw] < taken[0.5, draw] < taken[0.99, draw]
    assert taken[0.5, 0] != taken[0.5, 1]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_output_layer_makes_the_logits_and_is_restored(name):
    settings = dict(NETWORKS[name])
    network = build_network(in_channels=1, classes=2, head="softmax", **settings).eval()
    x = torch.rand(1, 1, 48, 48)
    with torch.no_grad():
        before = network(x)
        layer = output_layer(network, 1, (48, 48))
        masks = torch.ones(3, layer.width)
        masks[1], masks[2, 0] = 0, 0
        with layer.masked(masks):
            found = network(x)
        after = network(x)
    assert found.shape == (3, *before.shape[1:])
    torch.testing.assert_close(found[:1], before)
    assert torch.equal(before, after)
    assert not torch.equal(found[2], found[0])
    # Nothing but the bias is left without any map.
    assert found[1].flatten(1).std(dim=1).max() < 1e-6
    assert not any(m._forward_hooks for m in network.modules() if isinstance(m, nn.Conv2d))


def test_a_named_argument_is_changed_too():
    class Named(nn.Module):
        def forward(self, scale: float, *, maps: torch.Tensor) -> torch.Tensor:
            return scale * maps.sum(dim=1, keepdim=True)

    host = Named()
    with OutputLayer(host, "maps", 3).masked(torch.tensor([[1.0, 1, 1], [0, 1, 0]])):
        found = host(2.0, maps=torch.ones(1, 3, 1, 1))
    assert found.flatten().tolist() == [6.0, 2.0]


def test_a_network_of_another_package_is_tested_as_well(tmp_path):
    foreign = trained(tmp_path, network=NETWORKS["monai"], training__epochs=2)
    table = coadaptation(foreign, rates=(0.0, 0.5), draws=1)
    whole = table[table["rate"] == 0]["dice"].mean()
    assert whole == pytest.approx(evaluate(foreign)["dice"]["mean"])
    assert channel_correlation(foreign)["correlation"].between(0, 1).all()


@pytest.mark.parametrize("part", ["test", "val", "train"])
def test_correlation_is_that_of_numpy_over_all_pixels_of_a_patient(run, part):
    network, subject = load_run_network(run), module._Subject(run, None)
    maps: dict[str, list[torch.Tensor]] = {}
    seen: list[torch.Tensor] = []
    network.classify.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    predictor = module.run_predictor(run, network)
    for case in subject.cases(part):
        predictor.labels(subject.store.image(case), case)
        maps.setdefault(subject.group(case), []).extend(seen)
        seen.clear()
    wanted = {}
    for group, some in maps.items():
        flat = torch.cat(some).transpose(0, 1).flatten(1).double().numpy()
        r = np.abs(np.corrcoef(flat[flat.std(axis=1) > 0]))
        wanted[group] = r[np.triu_indices(len(r), 1)].mean()
    found = channel_correlation(run, part)
    assert found["group"].tolist() == sorted(wanted)
    assert dict(found.to_numpy()) == pytest.approx(wanted, abs=1e-6)


def test_maps_that_repeat_each_other_are_correlated_by_one_and_constant_ones_are_left_out():
    one = torch.randn(2, 1, 4, 5, generator=torch.Generator().manual_seed(0))
    constant = torch.full_like(one, 5.0)
    moments, alone = module._Moments(3), module._Moments(2)
    moments.add(torch.cat([one, 3 - 2 * one, constant], dim=1))
    assert moments.correlation() == pytest.approx(1)
    alone.add(torch.cat([one, constant], dim=1))
    assert np.isnan(alone.correlation())


def test_gaps_are_differences_of_scores(run):
    gap = generalization_gap(run)
    assert gap["val"] == pytest.approx(evaluate(run, "val")["dice"]["mean"])
    assert gap["train"] == pytest.approx(evaluate(run, "train")["dice"]["mean"])
    assert gap["gap"] == gap["train"] - gap["val"]
    losses, table = loss_gap(run), pd.read_csv(run.path / "metrics.csv")
    row = table[table["epoch"] == losses["epoch"]].iloc[0]
    assert row["val_dice"] == table["val_dice"].max()
    assert losses["gap"] == pytest.approx(row["val_loss"] - row["train_loss"])
    (both,) = gaps(run).to_dict("records")
    assert both.pop("gap") == gap["gap"]
    assert both.pop("loss_gap") == losses["gap"]
    assert both == {
        **{"train_dice": gap["train"], "val_dice": gap["val"], "epoch": losses["epoch"]},
        **{key: losses[key] for key in ("train_loss", "val_loss")},
    }


@pytest.mark.parametrize(
    ("select", "scores", "epoch"),
    [("best", (0.3, 0.6, 0.6), 2), ("last", (0.3, 0.6, 0.5), 3), ("best", (np.nan,) * 3, 1)],
)
def test_losses_are_those_of_the_epoch_that_was_kept(tmp_path, select, scores, epoch):
    changes = {"regularization__optimization": {"select": select}}
    content = tiny_config(tmp_path / "store", tmp_path, **changes)
    (tmp_path / "config.yaml").write_text(parse_config(content, "test").to_yaml())
    table = pd.DataFrame({"epoch": [1, 2, 3], "train_loss": 1.0, "val_loss": [4.0, 3.0, 2.0]})
    table.assign(val_dice=scores).to_csv(tmp_path / "metrics.csv", index=False, na_rep="nan")
    found = loss_gap(RunDirectory(tmp_path))
    assert (found["epoch"], found["val_loss"], found["gap"]) == (epoch, 5 - epoch, 4 - epoch)


def test_a_run_that_was_never_validated_has_no_loss_gap(run, monkeypatch):
    monkeypatch.setattr(module, "loss_gap", lambda _: (_ for _ in ()).throw(MedsegError("none")))
    (both,) = gaps(run).to_dict("records")
    assert np.isnan([both["epoch"], both["train_loss"], both["loss_gap"]]).all()
    assert both["gap"] == pytest.approx(both["train_dice"] - both["val_dice"])


def test_bad_numbers_and_unfinished_runs_are_refused(run, tmp_path):
    with pytest.raises(MedsegError, match="rate 1.0: expected shares"):
        coadaptation(run, rates=(0.5, 1.0))
    with pytest.raises(MedsegError, match="0 draws"):
        coadaptation(run, draws=0)
    with pytest.raises(MedsegError, match="is not a run directory"):
        coadaptation(RunDirectory(tmp_path))
    with pytest.raises(MedsegError, match="metrics.csv: is missing"):
        loss_gap(RunDirectory(tmp_path))

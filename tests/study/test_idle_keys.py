"""A key of a study that something else in it would replace is refused; what is left counts."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from medseg_reg.study.grid import expand
from tests.study.studies import study_of
from tests.training import tiny_config, write_config

LAYERS = [{"name": "dropout", "p": 0.3}]


@pytest.fixture
def study(tmp_path):
    """Give studies whose data set has a file; `of_data` are the overrides of the data set."""
    base = tiny_config(tmp_path / "store", tmp_path / "run", data__split__train_frames=2)
    file = str(write_config(tmp_path / "base.yaml", base))

    def make(of_data=None, **changes):
        data = {"config": file, "overrides": of_data or {}}
        changes = {"overrides": {}, "budget": {}, **changes}
        return study_of(tmp_path / "store", tmp_path, datasets={"blobs": data}, **changes)

    return make


@pytest.mark.parametrize(
    "overrides",
    [
        {"regularization.architecture": LAYERS},
        {"regularization.architecture.0.p": 0.5},
        {"regularization": {"architecture": []}},
    ],
)
def test_layers_belong_to_the_methods(study, overrides):
    message = r"'regularization.architecture.*' would do nothing: .* Write them in 'methods'"
    with pytest.raises(ValidationError, match=rf"overrides: {message}"):
        study(overrides=overrides)
    with pytest.raises(ValidationError, match=rf"datasets.blobs.overrides: {message}"):
        study(overrides)


@pytest.mark.parametrize(
    ("key", "name"), [("training.epochs", "epochs"), ("data.batch_size", "batch_size")]
)
def test_the_budget_is_said_once(study, key, name):
    message = rf"overrides: '{key}' would do nothing: 'budget.{name}' sets it for all runs"
    for group in ({"overrides": {key: 2}}, {"of_data": {key: 2}}):
        with pytest.raises(ValidationError, match=message):
            study(**group, budget={name: 1})
        other = {"epochs": "batch_size", "batch_size": "epochs"}[name]
        config = expand(study(**group, budget={other: 1}))[0].config
        assert {"epochs": config.training.epochs, "batch_size": config.data.batch_size} == {
            name: 2,
            other: 1,
        }


@pytest.mark.parametrize("overrides", [{"network.channels": [4, 8]}, {"network": {"channels": []}}])
def test_what_a_network_sets_is_no_override(study, overrides):
    networks = {"plain": {}, "wide": {"channels": [8, 16]}}
    with pytest.raises(ValidationError, match=r"'networks.wide.channels' sets it. Change it there"):
        study(overrides=overrides, networks=networks)
    # Those of a data set lie below the networks: they hold for the others.
    cells = expand(study({"network.channels": [2, 4]}, networks=networks))
    found = {cell.spot.network: cell.config.network.channels for cell in cells}
    assert found == {"plain": (2, 4), "wide": (8, 16)}
    other = expand(study(overrides={"network.head": "sigmoid"}, networks=networks))
    assert {cell.config.network.head for cell in other} == {"sigmoid"}


@pytest.mark.parametrize(
    "overrides",
    [{"data.split.train": 4}, {"data.split": {"kind": "counts", "train": 3, "val": 1, "seed": 1}}],
)
def test_folds_take_the_place_of_a_split(study, overrides):
    message = r"'data.split.(train|kind)' would do nothing: 'folds' replaces the split"
    for group in ({"overrides": overrides}, {"of_data": overrides}):
        with pytest.raises(ValidationError, match=message):
            study(**group, folds=3)
        expand(study(**group))


def test_seed_and_frames_of_a_split_hold_for_folds_wherever_they_are_given(study):
    def split(**changes):
        found = {cell.config.data.split for cell in expand(study(folds=3, **changes))}
        assert {one.fold for one in found} == {0, 1, 2}
        (kept,) = {(one.kind, one.seed, one.train_frames) for one in found}
        return kept

    assert split() == ("kfold", 0, 2)
    assert split(overrides={"data.split.seed": 7}) == ("kfold", 7, 2)
    both = {"data.split.seed": 7, "data.split.train_frames": 5}
    assert split(of_data=both) == ("kfold", 7, 5)
    assert split(of_data=both, overrides={"data.split.seed": 9}) == ("kfold", 9, 5)
    with pytest.raises(ValidationError, match=r"'data.split.seed' would do nothing: 'splits' has"):
        study(splits=[1, 2], overrides={"data.split.seed": 7})


def test_a_grid_over_the_rate_is_refused_beside_equal_rates(study):
    def grid(**values):
        return {"none": [], "hd": {"architecture": [{"name": "heuristic_dropout"}], "grid": values}}

    with pytest.raises(ValidationError, match=r"methods.hd.grid.p would do nothing beside equal_r"):
        study(methods=grid(k=[1, 2], p=[0.1, 0.2]), equal_rates=0.1)
    assert set(study(methods=grid(k=[1, 2]), equal_rates=0.1).methods) == {"none", "hd-k1", "hd-k2"}

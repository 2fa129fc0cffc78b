"""The runs of a study are ordinary runs, each with what its cell says and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from medseg_reg.config import load_config
from medseg_reg.config_file import with_overrides
from medseg_reg.errors import MedsegError
from medseg_reg.study.grid import expand, flow, require_splits, require_stores, spots
from medseg_reg.study.spec import StudySpec
from tests.stores import make_store
from tests.study.studies import study_of
from tests.training import tiny_config, write_config


def by_path(study):
    return {cell.path: cell.config for cell in expand(study)}


def test_every_cell_has_a_run_in_its_place(tmp_path):
    networks = {"small": {}, "attention": {"name": "attention_unet", "channels": [4, 8, 8]}}
    study = study_of(tmp_path / "store", tmp_path, networks=networks)
    cells = by_path(study)
    assert len(cells) == 2 * 2 * 2
    one = cells["blobs/attention/dropout/seed1"]
    assert one.seed == 1
    assert one.network.name == "attention_unet"
    assert one.run_path == study.directory / "runs/blobs/attention/dropout/seed1"
    assert [layer.name for layer in one.regularization.architecture] == ["dropout"]
    assert cells["blobs/small/none/seed0"].regularization.architecture == ()
    assert cells["blobs/small/none/seed0"].network.channels == (4, 8)


def test_a_run_of_a_file_can_be_repeated_by_hand(tmp_path):
    file = write_config(tmp_path / "base.yaml", tiny_config(tmp_path / "store", tmp_path / "run"))
    study = study_of(tmp_path / "store", tmp_path, datasets={"blobs": str(file)})
    for cell in expand(study):
        assert load_config(file, cell.overrides) == cell.config


def test_a_data_set_may_take_some_of_the_networks(tmp_path):
    study = study_of(tmp_path / "store", tmp_path)
    blobs = study.datasets["blobs"]
    study = study_of(
        tmp_path / "store",
        tmp_path,
        datasets={"a": blobs, "b": blobs.model_copy(update={"networks": ("wide",)})},
        networks={"unet": None, "wide": {"channels": [8, 16]}},
        seeds=1,
    )
    assert {path.rsplit("/", 2)[0] for path in by_path(study)} == {"a/unet", "a/wide", "b/wide"}


def test_equal_rates_reach_every_layer_of_every_method(tmp_path):
    methods = {
        "none": [],
        "two": [{"name": "dropout", "p": 0.3}, {"name": "spatial_dropout", "places": "encoder"}],
        "smoothing": {"overrides": {"regularization.error.label_smoothing": 0.1}},
    }
    study = study_of(tmp_path / "store", tmp_path, methods=methods, equal_rates=0.25)
    cells = by_path(study)
    two = cells["blobs/unet/two/seed0"].regularization.architecture
    assert [layer.parameters["p"] for layer in two] == [0.25, 0.25]
    assert two[1].places == ("encoder",)
    assert cells["blobs/unet/smoothing/seed0"].regularization.error.label_smoothing == 0.1


def test_an_infinite_parameter_of_a_layer_reaches_the_run(tmp_path):
    layer = {"name": "corrdrop_channel", "temperature": float("inf")}
    study = study_of(tmp_path / "store", tmp_path, methods={"none": [], "far": [layer]})
    (found,) = by_path(study)["blobs/unet/far/seed0"].regularization.architecture
    assert found.parameters["temperature"] == float("inf")


def test_folds_and_splits_give_each_seed_all_parts(tmp_path):
    folds = by_path(study_of(tmp_path / "store", tmp_path, folds=3))
    assert len(folds) == 3 * 4
    assert folds["blobs/unet/none/fold2/seed1"].data.split.fold == 2
    assert folds["blobs/unet/none/fold2/seed1"].data.split.folds == 3
    splits = by_path(study_of(tmp_path / "store", tmp_path, splits=[4, 7]))
    assert splits["blobs/unet/none/split7/seed0"].data.split.seed == 7
    assert splits["blobs/unet/none/split7/seed0"].data.split.train == 3


def test_draws_of_a_split_that_is_read_from_a_file_are_refused(tmp_path):
    read = {"kind": "file", "file": "mine.json"}
    base = tiny_config(tmp_path / "store", tmp_path / "run", data__split=read)
    file = str(write_config(tmp_path / "base.yaml", base))

    def study(**changes):
        return study_of(tmp_path / "store", tmp_path, datasets={"blobs": file}, **changes)

    message = (
        r"run blobs/unet/none/split4/seed0: splits: the study asks for the draws \[4, 7\], but "
        r"data.split.kind is 'file' \(mine.json\).*Leave out 'splits'"
    )
    with pytest.raises(MedsegError, match=message):
        expand(study(splits=[4, 7]))
    # One split for all is no mistake, nor are folds, which take its place.
    assert len(expand(study())) == 4
    assert {cell.config.data.split.kind for cell in expand(study(folds=2))} == {"kfold"}
    # What is drawn of it, or instead of it, differs.
    for more in ({"data.split.train_frames": 3}, {"data.split": {"kind": "fractions"}}):
        cells = expand(study(splits=[4, 7], overrides=more))
        assert {cell.config.data.split.seed for cell in cells} == {4, 7}


@pytest.mark.parametrize("parts", [{}, {"folds": 2}, {"splits": [3, 5]}])
def test_the_runs_can_be_counted_without_any_file(tmp_path, parts):
    study = study_of(tmp_path / "store", tmp_path, networks={"unet": None, "other": {}}, **parts)
    listed = list(spots(study))
    assert listed == [cell.spot for cell in expand(study)]
    assert [spot.seed for spot in listed] == sorted(spot.seed for spot in listed)
    none = StudySpec.model_validate(
        {**study.model_dump(mode="json"), "datasets": {"gone": str(tmp_path / "gone.yaml")}}
    )
    assert len(list(spots(none))) == len(listed)


def test_a_foreign_network_takes_nothing_from_the_network_of_the_data_set(tmp_path):
    foreign = {"name": "monai.BasicUNet", "features": [4, 4, 8, 8, 8, 4]}
    cells = by_path(study_of(tmp_path / "store", tmp_path, networks={"basic": foreign}))
    assert cells["blobs/basic/none/seed0"].network.arguments == {"features": [4, 4, 8, 8, 8, 4]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"networks": {"unet": {"chanels": [4]}}}, "run blobs/unet/none/seed0: .*'channels'"),
        ({"overrides": {"training.epoch": 3}}, "run blobs/unet/none/seed0: .*'epochs'"),
        (
            {"methods": {"none": [], "bad": {"overrides": {"regularization.error.ce": -1}}}},
            "run blobs/unet/bad/seed0: .*'regularization.error.ce'",
        ),
    ],
)
def test_a_mistake_is_told_with_its_cell(tmp_path, changes, message):
    with pytest.raises(MedsegError, match=message):
        expand(study_of(tmp_path / "store", tmp_path, **changes))


def test_missing_data_are_told_before_anything_runs(tmp_path):
    cells = expand(study_of(tmp_path / "no_store", tmp_path))
    with pytest.raises(MedsegError, match="run blobs/unet/none/seed0: .*no_store"):
        require_stores(cells)


def test_a_split_that_the_data_do_not_allow_is_told_before_anything_runs(tmp_path):
    store = make_store(tmp_path / "store", cases=6, slices=2, size=16).path
    require_splits(expand(study_of(store, tmp_path, folds=3)))
    with pytest.raises(MedsegError, match="run blobs/unet/none/fold0/seed0: .*7.*6"):
        require_splits(expand(study_of(store, tmp_path, folds=7)))


@pytest.mark.parametrize(
    "value",
    [
        *(0.1, 1e-7, 3, True, None, "on", "1e-3", "a: b", "größe", [1, [2.5, "x"]]),
        *({"a": {"b": []}}, float("inf"), -float("inf"), {"path": ["{name}", "#no comment"]}),
    ],
)
def test_a_value_survives_the_way_through_an_override(value):
    assert with_overrides({}, [f"key={flow(value)}"]) == {"key": value}
    assert yaml.safe_load(flow(str(Path("a/b")))) == "a/b"

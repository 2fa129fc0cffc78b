"""Runs that vote together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from medseg_reg.data.preprocessing import ImageSpec
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.network import load_run_network
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.errors import MedsegError
from medseg_reg.files import read_json, write_json
from medseg_reg.inference.ensemble import Ensemble, Way, load_runs
from medseg_reg.inference.predictor import Predictor
from medseg_reg.inference.uncertainty import average
from tests.inference.made_runs import FIXED, NOISY, PLAIN, SPATIAL, make_run, predicted
from tests.stores import make_store

CPU = Way(device=torch.device("cpu"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SliceStore:
    folder = tmp_path_factory.mktemp("store")
    return make_store(folder / "store", cases=6, slices=5, size=(32, 40), classes=3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, store: SliceStore) -> list[RunDirectory]:
    folder = tmp_path_factory.mktemp("runs")
    sizes = ([32, 40], [24, 24], [16, 32])
    return [
        RunDirectory(
            make_run(
                folder / f"fold{seed}",
                store,
                seed,
                data__image={"size": size, "fit": "letterbox"},
                **NOISY,
            )
        )
        for seed, size in enumerate(sizes)
    ]


def everything(ensemble: Ensemble, images: np.ndarray) -> dict[str, np.ndarray]:
    """Predict with all maps there are, and put the parts together."""
    names = ensemble.map_names(uncertainty=True, probabilities=True)
    return predicted(ensemble, images, names)


def probabilities(run: RunDirectory, images: np.ndarray) -> torch.Tensor:
    """Of one run alone, by the older way."""
    image = run.config().data.image
    predictor = Predictor(load_run_network(run), image, 1, device="cpu")
    return torch.cat([p for _, p in predictor.batches(images, "case")])


def test_runs_vote_by_the_mean_of_their_probabilities(store, runs):
    images = store.image("case_00")
    found = everything(load_runs(runs, CPU).ensemble, images)
    expected = average(probabilities(run, images) for run in runs)
    np.testing.assert_array_equal(found["labels"], expected.mean.argmax(1))
    for name, values in (
        ("entropy", expected.entropy),
        ("mutual_information", expected.mutual_information),
        ("probability_1_class_1", expected.mean[:, 1]),
        ("probability_2_class_2", expected.mean[:, 2]),
    ):
        np.testing.assert_allclose(found[name], values, atol=1e-6)
    assert found["mutual_information"].max() > 1e-3


def test_one_run_alone_predicts_as_it_always_did(store, runs):
    images = store.image("case_01")
    ensemble = load_runs(runs[:1], CPU).ensemble
    assert ensemble.map_names(True, False) == ("entropy",)
    predictor = ensemble.predictors[0]
    found = everything(ensemble, images)
    np.testing.assert_array_equal(found["labels"], predictor.labels(images, "case"))


def test_the_size_of_the_batch_changes_nothing_without_draws(store, runs):
    images = store.image("case_00")
    one, five = (
        everything(load_runs(runs, replace(CPU, batch_size=n)).ensemble, images) for n in (1, 5)
    )
    np.testing.assert_array_equal(one["labels"], five["labels"])
    np.testing.assert_allclose(one["entropy"], five["entropy"], atol=1e-5)


def test_draws_of_equal_seeds_are_equal_whatever_came_before(store, runs):
    way = replace(CPU, draws=3, seed=7)
    images = store.image("case_02")
    fresh = everything(load_runs(runs[:1], way).ensemble, images)
    used = load_runs(runs[:1], way).ensemble
    everything(used, store.image("case_00"))
    torch.rand(3)
    again = everything(used, images)
    other = everything(load_runs(runs[:1], replace(way, seed=8)).ensemble, images)
    assert all(np.array_equal(fresh[name], again[name]) for name in fresh)
    assert not np.array_equal(fresh["entropy"], other["entropy"])
    assert fresh["mutual_information"].max() > 1e-3


def test_draws_and_runs_vote_together(store, runs):
    way = replace(CPU, draws=4)
    ensemble = load_runs(runs[:2], way).ensemble
    assert ensemble.votes == 8
    images = store.image("case_00")
    members = [
        p for predictor in ensemble.predictors for p in predictor.case(images, "case").members(0, 5)
    ]
    assert len(members) == 8
    found = everything(ensemble, images)
    np.testing.assert_allclose(found["entropy"], average(members).entropy, atol=1e-6)


def test_draws_leave_normalization_alone(store, runs):
    ensemble = load_runs(runs[:1], replace(CPU, draws=3)).ensemble
    network = ensemble.predictors[0].network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    everything(ensemble, store.image("case_00"))
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert not any(module.training for module in network.modules())


def test_what_no_network_saw_is_background_without_a_number():
    network = nn.Conv2d(1, 2, 1)
    predictor = Predictor(network, ImageSpec(size=(8, 8), fit="crop"), 1, device="cpu")
    found = everything(
        Ensemble([predictor], ("background", "box")), np.full((1, 12, 12), 200, np.uint8)
    )
    seen = np.zeros((12, 12), bool)
    seen[2:10, 2:10] = True
    assert np.isfinite(found["entropy"][0][seen]).all()
    assert np.isnan(found["entropy"][0][~seen]).all()
    assert (found["labels"][0][~seen] == 0).all()


def changed_facts(tmp_path: Path, store: SliceStore, **facts: object) -> RunDirectory:
    run = RunDirectory(make_run(tmp_path / "other", store, 5, **PLAIN))
    path = run.path / "data.json"
    write_json(path, {**read_json(path), **facts})
    return run


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"classes": ["background", "liver", "tumor"]}, "its list of classes is .*'liver'"),
        ({"unit": "HU"}, "its unit is HU, that of .* is gray value"),
        ({"modality": "MR"}, "its modality is MR"),
        ({"conversion": {"plane": "coronal"}}, "its plane is coronal, that of .* is None"),
        ({"conversion": {"erosion": 3}}, "its erosion is 3"),
    ],
)
def test_runs_that_do_not_speak_of_the_same_are_refused(tmp_path, store, runs, facts, message):
    with pytest.raises(MedsegError, match=message) as error:
        load_runs([runs[0], changed_facts(tmp_path, store, **facts)], CPU)
    assert str(runs[0].path) in str(error.value)
    assert str(tmp_path / "other") in str(error.value)


@pytest.mark.parametrize("image", [{"window": [0, 99]}, {"percentiles": [1, 99]}])
def test_runs_of_other_intensities_are_refused(tmp_path, store, runs, image):
    other = RunDirectory(make_run(tmp_path / "other", store, 5, data__image=image, **PLAIN))
    with pytest.raises(MedsegError, match=rf"its data.image.{next(iter(image))} is"):
        load_runs([runs[0], other], CPU)


def test_a_run_votes_once(runs):
    again = RunDirectory(runs[0].path.parent / "." / runs[0].path.name)
    with pytest.raises(MedsegError, match="is named twice"):
        load_runs([runs[0], runs[1], again], CPU)


def test_mc_dropout_of_a_network_that_does_not_draw_is_refused(tmp_path, store):
    run = RunDirectory(make_run(tmp_path / "run", store, **FIXED))
    way = replace(CPU, draws=5)
    with pytest.raises(MedsegError, match=r"run with --mc-dropout: none of its layers draws") as e:
        load_runs([run], way)
    assert "`selection: sampled`" in str(e.value)
    assert "encoder.0.between_convs" in str(e.value)
    plain = RunDirectory(make_run(tmp_path / "plain", store, **PLAIN))
    with pytest.raises(MedsegError, match="has no layer that draws by chance"):
        load_runs([plain], way)


def test_layers_that_stand_still_among_those_that_draw_are_noted(tmp_path, store):
    layers = [
        {"name": "heuristic_dropout", "places": "bottleneck", "p": 0.2},
        *SPATIAL,
    ]
    run = RunDirectory(make_run(tmp_path / "run", store, regularization__architecture=layers))
    assert "HeuristicDropout" in load_runs([run], replace(CPU, draws=2)).notes[0]
    assert load_runs([run], CPU).notes == ()


def test_sampled_heuristic_dropout_draws(tmp_path, store):
    layers = [{"name": "heuristic_dropout", "places": "between_convs", "p": 0.5,
               "selection": "sampled"}]  # fmt: skip
    run = RunDirectory(make_run(tmp_path / "run", store, regularization__architecture=layers))
    loaded = load_runs([run], replace(CPU, draws=3))
    found = everything(loaded.ensemble, store.image("case_00"))
    assert found["mutual_information"].max() > 1e-4


def test_what_may_surprise_is_noted(tmp_path, store):
    run = RunDirectory(
        make_run(
            tmp_path / "run",
            store,
            data__image={"size": [24, 24], "fit": "resize"},
            regularization__data=[{"name": "HorizontalFlip", "p": 0.5}],
        )
    )
    way = replace(CPU, window=(), flips=("horizontal", "vertical"))
    first, second = load_runs([run], way).notes
    assert "whole slices scaled to 24 x 24 (fit resize)" in first
    assert "was not trained on slices with a vertical flip" in second


def test_a_network_of_one_size_takes_windows_of_that_size(tmp_path, store, monkeypatch):
    run = RunDirectory(make_run(tmp_path / "run", store, **PLAIN))
    network = nn.Conv2d(1, 3, 1)
    network.fixed, network.size = True, (32, 32)
    monkeypatch.setattr("medseg_reg.inference.ensemble.load_run_network", lambda run: network)
    load_runs([run], replace(CPU, window=(32,)))
    with pytest.raises(MedsegError, match="takes 32 x 32 alone. Use --window 32 32"):
        load_runs([run], replace(CPU, window=(16,)))


def test_names_and_weights_are_told_to_those_who_write(runs):
    algorithm = load_runs(runs, CPU).algorithm
    assert algorithm.name == "tiny"
    assert len(set(algorithm.version.split("+"))) == 3

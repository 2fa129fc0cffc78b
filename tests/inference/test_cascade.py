"""A cheap run predicts first, and finer ones where it is not sure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from medseg_reg.data.preprocessing import ImageSpec
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.errors import MedsegError
from medseg_reg.inference.cascade import Cascade, load_cascade
from medseg_reg.inference.confidence import confidence
from medseg_reg.inference.ensemble import Ensemble, Way, load_runs
from medseg_reg.inference.passes import Passes
from medseg_reg.inference.predictor import Predictor
from medseg_reg.networks.build import probabilities
from medseg_reg.predict import main as predict
from tests.inference.made_runs import NAMES, NOISY, PLAIN, make_run, predicted
from tests.stores import make_store

CPU = Way(device=torch.device("cpu"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SliceStore:
    folder = tmp_path_factory.mktemp("store")
    return make_store(folder / "store", cases=6, slices=10, size=(32, 40), classes=3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, store: SliceStore) -> list[RunDirectory]:
    """A coarse run, and two finer ones of another size."""
    folder = tmp_path_factory.mktemp("runs")
    return [
        RunDirectory(
            make_run(folder / f"run{seed}", store, seed, data__image={"size": size}, **NOISY)
        )
        for seed, size in enumerate(([16, 16], [32, 40], [24, 32]))
    ]


def assert_alike(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    np.testing.assert_array_equal(found["labels"], expected["labels"])
    for name in NAMES:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-6)


def sureness(run: RunDirectory, images: np.ndarray) -> np.ndarray:
    predictor = load_runs([run], CPU).ensemble.predictors[0]
    # 16 x 16 of 32 x 40 pixels: two of the network's are five of the source.
    return torch.cat([confidence(p, 5) for _, p in predictor.batches(images, "case")]).numpy()


@pytest.mark.parametrize("way", [CPU, replace(CPU, window=(16, 24), flips=("vertical",))])
def test_at_the_ends_one_network_decides_alone(store, runs, way):
    images = store.image("case_00")
    coarse, *fine = runs
    for threshold, alone in (
        (0, load_runs([coarse], CPU)),
        (1, load_runs(fine, way)),
    ):
        cascade = load_cascade(coarse, fine, way, threshold).ensemble
        assert_alike(predicted(cascade, images), predicted(alone.ensemble, images))
        assert cascade.share_early == 1 - threshold


def test_each_slice_is_that_of_the_first_network_if_this_is_sure_and_else_of_the_others(
    store, runs
):
    images = store.image("case_00")
    sure = sureness(runs[0], images)
    threshold = float(np.sort(sure)[4])
    cascade = load_cascade(runs[0], runs[1:], replace(CPU, batch_size=4), threshold).ensemble
    found = predicted(cascade, images)
    coarse = predicted(load_runs(runs[:1], CPU).ensemble, images)
    fine = predicted(load_runs(runs[1:], CPU).ensemble, images)
    stays = sure > threshold
    assert stays.sum() == 5
    expected = {name: np.where(stays[:, None, None], coarse[name], fine[name]) for name in found}
    assert_alike(found, expected)
    assert (found["labels"] != fine["labels"]).any()
    assert (found["labels"] != coarse["labels"]).any()
    assert cascade.share_early == 0.5


def test_the_share_of_early_exits_falls_and_the_cost_rises_with_the_threshold(store, runs):
    images = store.image("case_01")
    found = []
    for threshold in (0, *np.quantile(sureness(runs[0], images), [0.2, 0.5, 0.8]), 1):
        cascade = load_cascade(runs[0], runs[1:2], CPU, float(threshold)).ensemble
        list(cascade.parts(images, "case"))
        found.append((cascade.share_early, cascade.relative_cost))
    shares, costs = zip(*found, strict=True)
    np.testing.assert_allclose(shares, [1, 0.8, 0.5, 0.2, 0], atol=1e-9)
    # Networks of convolutions cost as many multiply-adds as their inputs have pixels.
    np.testing.assert_allclose(costs, [256 / 1280 + 1 - early for early in shares])


class Halves(nn.Module):
    """Sure of the left half of an image, and not of the right one, where it sees stripes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        columns = x.shape[3] // 2
        logits = torch.zeros(len(x), 2, *x.shape[2:])
        logits[:, 0] = 8
        logits[:, 1, ::2, columns:] = 8.1
        return logits


class Asked(nn.Conv2d):
    """Notes the shapes that it was asked for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(x) is torch.Tensor:  # not those of counting multiply-adds
            self.shapes = [*getattr(self, "shapes", []), tuple(x.shape)]
        return super().forward(x)


def test_a_window_goes_on_by_itself():
    torch.manual_seed(0)
    network, classes = Asked(1, 2, 3, padding=1), ("background", "box")
    passes = Passes(window=(8, 8), overlap=0)
    spec = ImageSpec()
    first = Ensemble([Predictor(Halves(), spec, 1, device="cpu")], classes)
    fine = Ensemble([Predictor(network, spec, 1, device="cpu", passes=passes)], classes)
    cascade = Cascade(first, fine, 0.9)
    images = np.random.default_rng(0).integers(0, 255, (3, 16, 32)).astype(np.uint8)
    found = np.concatenate([one.labels for one in cascade.parts(images, "case")])
    assert cascade.share_early == 0.5
    assert sum(shape[0] for shape in network.shapes) == 3 * 4
    assert {shape[1:] for shape in network.shapes} == {(1, 8, 8)}
    assert (found[:, :, :16] == 0).all()
    with torch.inference_mode():
        for top in (0, 8):
            for left in (16, 24):
                window = torch.from_numpy(images[:, None, top : top + 8, left : left + 8] / 255)
                expected = probabilities(network(window.float())).argmax(1)
                np.testing.assert_array_equal(found[:, top : top + 8, left : left + 8], expected)


def test_the_first_network_takes_slices_as_it_was_trained_on_them(tmp_path, store, runs):
    way = replace(CPU, flips=("horizontal",), window=(24,))
    crops = {"size": [16, 16], "fit": "crop"}
    of_crops = RunDirectory(make_run(tmp_path / "run", store, data__image=crops, **PLAIN))
    for first, window in ((runs[0], None), (of_crops, (16, 16))):
        cascade = load_cascade(first, runs[1:], way, 0.5).ensemble
        assert [one.passes for one in cascade.first.predictors] == [Passes(window)]
        assert {one.passes for one in cascade.predictors} == {
            Passes((24, 24), flips=("horizontal",))
        }


def test_both_runs_are_told_to_those_who_write(runs):
    both = load_cascade(runs[0], runs[1:2], CPU, 0.5).algorithm
    single = [load_runs([run], CPU).algorithm.version for run in runs[:2]]
    assert both.version == "+".join(single)


def test_what_makes_no_cascade_is_refused(tmp_path, store, runs):
    for threshold in (-0.1, 1.1, float("nan")):
        with pytest.raises(MedsegError, match=r"--confidence \S+: expected a number from 0"):
            load_cascade(runs[0], runs[1:], CPU, threshold)
    with pytest.raises(MedsegError, match="run1: is one of --run too"):
        load_cascade(runs[1], runs[1:], CPU, 0.5)
    with pytest.raises(MedsegError, match="cannot go with --mc-dropout"):
        load_cascade(runs[0], runs[1:], replace(CPU, draws=3), 0.5)
    other = RunDirectory(
        make_run(tmp_path / "run", store, data__image={"window": [0, 99]}, **PLAIN)
    )
    with pytest.raises(MedsegError, match=r"its data.image.window is .* must be trained on the"):
        load_cascade(other, runs[1:], CPU, 0.5)


def test_the_command_predicts_and_says_what_was_saved(store, runs, tmp_path, capsys):
    paths = [
        "--run",
        runs[1].path,
        "--input",
        store.path,
        "--device",
        "cpu",
        "--output",
        tmp_path / "out",
    ]
    threshold = float(np.quantile(sureness(runs[0], store.image("case_00")), 0.5))
    predict([str(one) for one in [*paths, "--first", runs[0].path, "--confidence", threshold]])
    printed = capsys.readouterr().out
    assert "the first network was sure of" in printed
    assert "% of the slices; both together took" in printed
    files = sorted((tmp_path / "out").rglob("case_00*"))
    assert files
    cascade = load_cascade(runs[0], runs[1:2], CPU, threshold).ensemble
    expected = predicted(cascade, store.image("case_00"))["labels"]
    np.testing.assert_array_equal(read(files[0]), expected)


def read(path: Path) -> np.ndarray:
    if path.is_dir():
        return np.stack([np.asarray(Image.open(one)) for one in sorted(path.iterdir())])
    return np.asarray(nibabel.load(path).dataobj).T


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--first", "coarse"], "--first coarse: needs --confidence"),
        (["--confidence", "0.5"], "--confidence: has no effect without --first"),
    ],
)
def test_half_a_request_is_refused(options, message):
    with pytest.raises(MedsegError, match=message):
        predict(["--run", "fine", "--input", "x", "--output", "y", *options])

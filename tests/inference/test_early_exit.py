"""A run that takes in a coarse one exits early where this is sure, and asks it once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from medseg_reg.data.splits import Splits
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.inference.cascade import Cascade, EarlyExit, load_cascade
from medseg_reg.inference.cascade_curve import cascade_curve
from medseg_reg.inference.confidence import confidence
from medseg_reg.inference.ensemble import Way, load_runs
from medseg_reg.inference.evaluation import case_table, count_slices
from medseg_reg.networks.build import probabilities
from medseg_reg.networks.reuse import coarse_of
from medseg_reg.networks.summary import summarize
from tests.inference.made_runs import NAMES, PLAIN, make_run, predicted
from tests.stores import make_store

CPU = Way(device=torch.device("cpu"), batch_size=4)
WINDOWS = replace(CPU, window=(16, 16), flips=("horizontal",))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SliceStore:
    folder = tmp_path_factory.mktemp("store")
    return make_store(folder / "store", cases=6, slices=10, size=(32, 32), classes=3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, store: SliceStore) -> list[RunDirectory]:
    """A coarse run of 16 x 16 pixels, and one of 32 x 32 that takes in its answer."""
    folder, cases = tmp_path_factory.mktemp("runs"), [case.name for case in store.manifest.cases]
    found: list[RunDirectory] = []
    for name, size in (("coarse", 16), ("fine", 32)):
        more = {"network__reuse": {"run": str(found[0].path)}} if found else {}
        image = {"size": [size, size]}
        path = make_run(folder / name, store, len(found), data__image=image, **PLAIN, **more)
        Splits(train=cases[:2], val=cases[2:4], test=cases[4:]).write(path / "splits.json")
        found.append(RunDirectory(path))
    return found


def inside(runs: list[RunDirectory], images: np.ndarray) -> Tensor:
    """Probabilities that the coarse part of the finer run gives, at the size of this run."""
    one = load_runs(runs[1:], CPU).ensemble.predictors[0]
    coarse = coarse_of(one.network)
    case = one.case(images, "case")
    with torch.inference_mode():
        batches = [case.batch(start, min(start + 4, 10)) for start in range(0, 10, 4)]
        return torch.cat([probabilities(coarse(batch)) for batch in batches])


@pytest.mark.parametrize("way", [CPU, WINDOWS])
def test_at_the_threshold_of_1_it_is_the_finer_run_at_its_cost(store, runs, way):
    images = store.image("case_00")
    cascade = load_cascade(runs[0], runs[1:], way, 1.0).ensemble
    assert isinstance(cascade, EarlyExit)
    found, alone = (predicted(one, images) for one in (cascade, load_runs(runs[1:], way).ensemble))
    for name in found:
        np.testing.assert_array_equal(found[name], alone[name])
    assert (cascade.share_early, cascade.relative_cost) == (0.0, 1.0)


def test_a_slice_of_which_the_coarse_part_is_sure_stays_with_it(store, runs):
    images = store.image("case_00")
    coarse = inside(runs, images)
    sure = confidence(coarse).numpy()
    threshold = float(np.sort(sure)[5])
    cascade = load_cascade(runs[0], runs[1:], CPU, threshold).ensemble
    found, fine = predicted(cascade, images), predicted(load_runs(runs[1:], CPU).ensemble, images)
    stays = sure > threshold
    assert stays.sum() == 4
    for number, name in enumerate(NAMES[1:], start=1):
        expected = np.where(stays[:, None, None], coarse[:, number], fine[name])
        np.testing.assert_allclose(found[name], expected, atol=1e-6)
    assert (found["labels"] != fine["labels"]).any()
    assert cascade.share_early == pytest.approx(0.4)
    network = load_runs(runs[1:], CPU).ensemble.predictors[0].network
    whole, part = (
        summarize(one, (1, 1, 32, 32)).numbers()["multiply_adds"]
        for one in (network, coarse_of(network))
    )
    assert cascade.relative_cost == pytest.approx((part + 0.6 * (whole - part)) / whole)


def test_the_coarse_part_computes_each_slice_once(store, runs, monkeypatch):
    images = store.image("case_00")
    threshold = float(np.sort(confidence(inside(runs, images)).numpy())[5])
    cascade = load_cascade(runs[0], runs[1:], CPU, threshold).ensemble
    inner = coarse_of(cascade.predictors[0].network).network
    seen: list[int] = []
    inner.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    list(cascade.parts(images, "case"))
    assert sum(seen) == len(images)


def test_what_the_run_has_kept_is_a_first_run_too_and_another_run_is_no_part_of_it(
    tmp_path, store, runs
):
    assert isinstance(load_cascade(runs[1].coarse, runs[1:], CPU, 0.5).ensemble, EarlyExit)
    other = RunDirectory(
        make_run(tmp_path / "other", store, 9, data__image={"size": [16, 16]}, **PLAIN)
    )
    cascade = load_cascade(other, runs[1:], CPU, 0.5).ensemble
    assert type(cascade) is Cascade


def test_the_scores_are_those_of_cascades_and_the_last_row_costs_what_the_finer_run_does(
    store, runs
):
    table = cascade_curve(runs[1], runs[1].coarse)
    assert table["budget"].iloc[-1] == pytest.approx(1.0)
    assert table["multiply_adds"].iloc[-1] == pytest.approx(1.0)
    assert table["early"].iloc[0] == 1.0
    assert table["dice"].nunique() > 2
    for row in table.iloc[[2]].itertuples():
        cascade, counts = load_cascade(runs[0], runs[1:], CPU, row.confidence).ensemble, {}
        for case in runs[1].splits(store).test:
            labels = [part.labels for part in cascade.parts(store.image(case), case)]
            counts[case] = count_slices(np.concatenate(labels), store.mask(case), 3)
        assert row.dice == pytest.approx(case_table(store, counts, "one")["dice"].mean())
        assert row.early == pytest.approx(cascade.share_early)
        assert row.multiply_adds == pytest.approx(cascade.relative_cost)

"""Two runs are scored as a cascade, at thresholds that keep budgets on the validation part."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from medseg_reg.cascade import main
from medseg_reg.data.splits import Splits
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.errors import MedsegError
from medseg_reg.inference.cascade import load_cascade
from medseg_reg.inference.cascade_curve import cascade_curve
from medseg_reg.inference.confidence import confidence, threshold_for
from medseg_reg.inference.ensemble import Way, load_runs
from medseg_reg.inference.evaluation import case_table, count_slices
from tests.inference.made_runs import PLAIN, make_run
from tests.stores import make_store

CPU = Way(device=torch.device("cpu"))
# Of the small run's 16 x 16 over the other's 32 x 32 pixels.
LEAST = 0.25


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SliceStore:
    folder = tmp_path_factory.mktemp("store")
    return make_store(folder / "store", cases=6, slices=10, size=(32, 40), classes=3)


@pytest.fixture
def runs(tmp_path, store: SliceStore) -> list[RunDirectory]:
    """A coarse run and a finer one, of one split."""
    cases = [case.name for case in store.manifest.cases]
    found = []
    for seed, size in enumerate(([16, 16], [32, 32])):
        path = make_run(tmp_path / f"run{seed}", store, seed, data__image={"size": size}, **PLAIN)
        Splits(train=cases[:2], val=cases[2:4], test=cases[4:]).write(path / "splits.json")
        found.append(RunDirectory(path))
    return found


def test_the_scores_are_those_of_cascades_whose_thresholds_keep_the_budgets(
    store, runs, capsys: pytest.CaptureFixture[str]
):
    coarse, fine = runs
    main(["--run", str(fine.path), "--first", str(coarse.path), "--budgets", "0.9", "0.6"])
    assert "multiply_adds" in capsys.readouterr().out
    table = pd.read_csv(fine.path / "evaluation" / "cascade.csv")
    assert table["budget"].tolist() == [0.6, 0.9]
    cases = [case.name for case in store.manifest.cases]
    first = load_runs([coarse], CPU).ensemble.predictors[0]
    sure = np.concatenate(
        [confidence(p, 5) for case in cases[2:4] for _, p in first.batches(store.image(case), case)]
    )
    for row in table.itertuples():
        assert row.confidence == threshold_for(sure, [LEAST] * 20, [1] * 20, row.budget)
        # 20 slices: a slice more would be above the budget.
        assert LEAST + (sure <= row.confidence).mean() == pytest.approx(row.budget, abs=0.0501)
        cascade = load_cascade(coarse, [fine], CPU, row.confidence).ensemble
        counts = {}
        for case in cases[4:]:
            labels = [part.labels for part in cascade.parts(store.image(case), case)]
            counts[case] = count_slices(np.concatenate(labels), store.mask(case), 3)
        assert row.dice == pytest.approx(case_table(store, counts, "one")["dice"].mean())
        assert row.early == pytest.approx(cascade.share_early)
        assert row.multiply_adds == pytest.approx(cascade.relative_cost)
    assert table["early"].nunique() == table["dice"].nunique() == 2


def test_without_budgets_they_lead_from_the_first_network_alone_to_both(runs):
    table = cascade_curve(runs[1], runs[0], part="val")
    np.testing.assert_allclose(table["budget"], LEAST + np.arange(5) / 4)
    np.testing.assert_allclose(table["early"], 1 - np.arange(5) / 4, atol=1e-9)
    # Scored on the part on which the thresholds were chosen: the budgets are kept.
    np.testing.assert_allclose(table["multiply_adds"], table["budget"])
    assert (runs[1].path / "evaluation" / "val" / "cascade.csv").exists()


def test_runs_of_other_splits_and_too_small_budgets_are_refused(store, runs):
    with pytest.raises(MedsegError, match=r"--budgets 0.2: the first network alone costs 0.25"):
        cascade_curve(runs[1], runs[0], [0.2])
    cases = [case.name for case in store.manifest.cases]
    path = runs[0].path / "splits.json"
    path.unlink()
    Splits(train=cases[2:4], val=cases[:2], test=cases[4:]).write(path)
    with pytest.raises(MedsegError, match="Train both on one split"):
        cascade_curve(runs[1], runs[0])

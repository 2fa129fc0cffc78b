"""A store with pixels of no known class trains, and its scores are those of the other pixels."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from medseg_reg.config import EvaluationSpec
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.network import load_run_network
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.errors import MedsegError
from medseg_reg.evaluate import main as evaluate_main
from medseg_reg.inference.case_scores import surface_scores
from medseg_reg.inference.evaluation import case_table, count_slices, run_predictor, slice_table
from medseg_reg.train import main as train_main
from tests.inference.test_case_scores import SPACING, scored, spaced
from tests.reference import metrics as reference
from tests.stores import make_store
from tests.training import tiny_config, write_config

IGNORED = 255
ROUNDED = 1e-5  # the tables hold six digits


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    folder = tmp_path_factory.mktemp("run")
    store = make_store(
        folder / "store", cases=6, slices=3, size=24, classes=3, ignore_label=IGNORED
    )
    content = tiny_config(
        store.path,
        folder / "run",
        data__ignore_label=IGNORED,
        training__epochs=1,
        regularization__error={"ce": 1, "dice": 1, "ssim": 1, "focal": 1},
        regularization__optimization={"select": "last"},
    )
    train_main(["--config", str(write_config(folder / "c.yaml", content))])
    return RunDirectory(folder / "run")


@pytest.fixture(scope="module")
def store(run: RunDirectory) -> SliceStore:
    return SliceStore(run.config().data.store)


@pytest.fixture(scope="module")
def found(run: RunDirectory, store: SliceStore) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return probabilities (K, S, H, W) and truth of each test case."""
    predictor = run_predictor(run, load_run_network(run))
    result = {}
    for case in json.loads((run.path / "splits.json").read_text())["test"]:
        parts = [mean for _, mean in predictor.batches(store.image(case), case)]
        p = torch.cat(parts).movedim(1, 0).numpy()
        result[case] = p, np.array(store.mask(case))
    return result


def known_pixels(labels: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels that count, in a row."""
    kept = truth != IGNORED
    return labels[kept], truth[kept]


def test_scores_of_a_case_are_those_of_the_other_pixels(run, store, found):
    table = pd.read_csv(run.path / "evaluation" / "per_case.csv")
    assert table["case"].nunique() == 2
    for _, row in table.iterrows():
        p, truth = found[row["case"]]
        label = store.classes.index(row["class"])
        mine, true = known_pixels(p.argmax(axis=0), truth)
        assert (row["tp"], row["fp"], row["fn"]) == reference.counts(mine, true, label)
        for name in ("dice", "iou", "precision", "recall"):
            expected = getattr(reference, name)(mine, true, label, empty=1)
            assert row[name] == pytest.approx(expected, abs=ROUNDED), name
        _, error = reference.calibration(p[label][truth != IGNORED], true, label, 15)
        assert row["ece"] == pytest.approx(error, abs=ROUNDED)


def test_scores_of_a_slice_are_those_of_the_other_pixels(run, store, found):
    for _, row in pd.read_csv(run.path / "evaluation" / "per_slice.csv").iterrows():
        p, truth = found[row["case"]]
        label = store.classes.index(row["class"])
        mine, true = known_pixels(p.argmax(axis=0)[row["slice"]], truth[row["slice"]])
        assert row["dice"] == pytest.approx(reference.dice(mine, true, label, 1), abs=ROUNDED)


def test_surfaces_end_where_pixels_are_ignored(run, store, found):
    table = pd.read_csv(run.path / "evaluation" / "per_case.csv")
    for _, row in table.iterrows():
        p, truth = found[row["case"]]
        label = store.classes.index(row["class"])
        mine = (p.argmax(axis=0) == label) & (truth != IGNORED)
        sides: tuple[list[float], list[float]] = ([], [])
        for one, other in zip(mine, truth == label, strict=True):
            for side, part in zip(sides, reference.distances(one, other, (1, 1)), strict=True):
                side += [min(d, math.hypot(24, 24)) for d in part]
        assert sides[1]
        if sides[0]:
            worst = max(reference.percentile(side, 95) for side in sides)
            assert row["hd95"] == pytest.approx(worst, abs=1e-4)
            assert row["assd"] == pytest.approx(np.mean(sides[0] + sides[1]), abs=1e-4)


def test_in_a_volume_surfaces_end_there_too(tmp_path):
    made = make_store(tmp_path / "s", cases=1, slices=4, size=16, ignore_label=IGNORED)
    table, _ = scored(spaced(made))
    truth = np.array(made.mask("case_00"))
    mine = (np.array(made.image("case_00")) / 255 > 0.5) & (truth != IGNORED)
    sides = reference.distances(mine, truth == 1, SPACING)
    worst = max(reference.percentile(side, 95) for side in sides)
    assert table["hd95"][0] == pytest.approx(worst, rel=1e-5)


def test_a_prediction_inside_of_ignored_pixels_costs_nothing():
    truth = np.zeros((1, 12, 12), np.uint8)
    truth[0, 2:6, 2:6], truth[0, :, 6:] = 1, IGNORED
    beyond = np.zeros_like(truth)
    beyond[0, 2:6, 2:11] = 1
    (_, scores) = surface_scores(beyond, truth, 2, None, EvaluationSpec(), "px", IGNORED)
    assert scores == {"hd95": 0, "assd": 0, "surface_dice": 1}
    short = beyond.copy()
    short[0, :, 4:] = 0
    (_, scores) = surface_scores(short, truth, 2, None, EvaluationSpec(), "px", IGNORED)
    assert scores["hd95"] == 2
    assert count_slices(beyond, truth, 2, IGNORED)[0, 1].tolist() == [16, 0, 0]


def test_validation_scores_are_those_of_the_evaluation(run):
    evaluate_main(["--run", str(run.path), "--part", "val"])
    table = pd.read_csv(run.path / "evaluation" / "val" / "per_case.csv")
    epochs = pd.read_csv(run.path / "metrics.csv")
    assert epochs["val_dice"].iloc[-1] == pytest.approx(table["dice"].mean(), abs=ROUNDED)
    assert np.isfinite(epochs[["train_loss", "val_loss"]]).all(axis=None)


def test_the_summary_says_which_label_was_left_out(run):
    assert json.loads((run.path / "summary.json").read_text())["ignore_label"] == IGNORED
    assert run.config().data.ignore_label == IGNORED


@pytest.mark.parametrize("empty", ["one", "zero"])
def test_where_every_pixel_is_ignored_there_is_no_score(tmp_path, empty):
    made = make_store(tmp_path / "s", cases=2, slices=2, size=8, ignore_label=IGNORED)
    nothing = np.zeros((2, 8, 8), np.uint8)
    truth = np.full_like(nothing, IGNORED)
    counts = {"case_00": count_slices(nothing, truth, 2, IGNORED)}
    truth[1] = 0
    counts["case_01"] = count_slices(nothing, truth, 2, IGNORED)
    cases, slices = (f(made, counts, empty) for f in (case_table, slice_table))
    agreed = {"one": 1, "zero": 0}[empty]
    assert cases["empty"].tolist() == ["ignored", "both"]
    scores = ["dice", "iou", "precision", "recall"]
    assert cases[scores].isna().all(axis=1).tolist() == [True, False]
    assert slices["dice"].tolist()[3] == agreed
    assert slices["dice"].isna().tolist() == [True, True, True, False]
    found = surface_scores(
        nothing, np.full_like(truth, IGNORED), 2, None, EvaluationSpec(empty=empty), "px", IGNORED
    )
    assert all(math.isnan(value) for value in found[1].values())


def test_labels_that_are_neither_class_nor_ignored_are_an_error():
    truth = np.full((1, 4, 4), 254, np.uint8)
    with pytest.raises(ValueError, match=r"target 254\.\.254"):
        count_slices(np.zeros_like(truth), truth, 2, IGNORED)


def test_a_training_that_would_not_ignore_them_is_refused(store, tmp_path):
    content = tiny_config(store.path, tmp_path / "other")
    config = write_config(tmp_path / "c.yaml", content)
    with pytest.raises(MedsegError, match=r"label 255 have no known class. Set data.ignore_label"):
        train_main(["--config", str(config)])
    assert not (tmp_path / "other").exists()

"""What a finished run's evaluation says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from medseg_reg.config import parse_config
from medseg_reg.data.preprocessing import ImageSpec
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.errors import MedsegError
from medseg_reg.evaluate import main as evaluate_main
from medseg_reg.inference import pictures
from medseg_reg.inference.evaluation import case_table, count_slices, slice_table, summarise
from medseg_reg.inference.predictor import Predictor
from medseg_reg.train import main as train_main
from tests.stores import make_store
from tests.training import tiny_config, write_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    store = make_store(
        folder / "store", cases=9, slices=4, size=32, classes=3, empty=0.5,
        groups=["a", "a", "b", "c", "d", "e", "f", "g", "h"],
    )  # fmt: skip
    content = tiny_config(store.path, folder / "run", training__epochs=1)
    content["data"]["split"] = {"kind": "counts", "train": 2, "val": 1, "test": 5}
    train_main(["--config", str(write_config(folder / "c.yaml", content))])
    return folder / "run"


def test_the_headline_is_the_mean_over_patients_of_volume_scores(run):
    summary = json.loads((run / "summary.json").read_text())
    table = pd.read_csv(run / "evaluation" / "per_case.csv")
    patients = table.groupby(["group", "class"])["dice"].mean().groupby("group").mean()
    assert summary["dice"]["mean"] == pytest.approx(patients.mean(), abs=1e-6)
    assert summary["dice"]["n"] == len(patients) == 5
    assert summary["dice"]["low"] <= summary["dice"]["mean"] <= summary["dice"]["high"]


def test_volume_scores_come_from_summed_counts_and_not_from_slice_scores(run):
    cases = pd.read_csv(run / "evaluation" / "per_case.csv")
    slices = pd.read_csv(run / "evaluation" / "per_slice.csv")
    sums = slices.groupby(["case", "class"], sort=False)[["tp", "fp", "fn"]].sum()
    for _, row in cases.iterrows():
        tp, fp, fn = sums.loc[(row["case"], row["class"])]
        assert (row["tp"], row["fp"], row["fn"]) == (tp, fp, fn)
        if tp + fp + fn:
            assert row["dice"] == pytest.approx(2 * tp / (2 * tp + fp + fn), abs=1e-6)


def test_empty_slices_are_named_and_counted(run):
    summary = json.loads((run / "summary.json").read_text())
    slices = pd.read_csv(run / "evaluation" / "per_slice.csv")
    assert summary["empty_policy"] == "one"
    for name, about in summary["classes"].items():
        rows = slices[slices["class"] == name]
        assert about["slice"]["slices"] == len(rows)
        for key, side in (
            ("empty_in_both", "both"),
            ("empty_in_truth_alone", "truth"),
            ("empty_in_prediction_alone", "prediction"),
        ):
            assert about["slice"][key] == (rows["empty"] == side).sum()
        assert (rows.loc[rows["empty"] == "both", "dice"] == 1).all()
        assert (rows.loc[rows["empty"].isin(["truth", "prediction"]), "dice"] == 0).all()


@pytest.mark.parametrize(("policy", "score"), [("one", 1.0), ("zero", 0.0), ("nan", math.nan)])
def test_each_policy_for_empty_slices(tmp_path, policy, score):
    store = make_store(tmp_path / "store", cases=1, slices=2, size=8)
    truth = np.zeros((2, 8, 8), np.uint8)
    truth[0, :4] = 1
    counts = {"case_00": count_slices(truth, truth, 2)}
    table = slice_table(store, counts, policy)
    assert table["dice"].tolist() == pytest.approx([1.0, score], nan_ok=True)
    assert case_table(store, counts, policy)["dice"].tolist() == [1.0]


def test_scores_do_not_change_when_slices_change_places(tmp_path):
    store = make_store(tmp_path / "store", cases=1, slices=6, size=16)
    truth = np.asarray(store.mask("case_00"))
    guess = np.roll(truth, 2, axis=2)
    order = np.random.default_rng(0).permutation(6)
    tables = [
        case_table(store, {"case_00": count_slices(guess[o], truth[o], 2)}, "one")
        for o in (np.arange(6), order)
    ]
    pd.testing.assert_frame_equal(*tables)


def test_slices_are_scored_at_the_resolution_of_the_store():
    class Everything(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([0.5 - x[:, 0], x[:, 0] - 0.5], dim=1)

    images = np.zeros((3, 40, 24), np.uint8)
    images[1, 10:30, 6:18] = 255
    spec = ImageSpec(size=(80, 48))
    labels = Predictor(Everything(), spec, 1, batch_size=2).labels(images, "case")
    assert labels.shape == images.shape
    assert (labels == (images > 0)).mean() > 0.97


def test_batch_size_changes_no_label(run):
    store = SliceStore(run.parent / "store")
    from medseg_reg.engine.network import load_run_network

    network = load_run_network(RunDirectory(run))
    one, many = (
        Predictor(network, ImageSpec(), 1, size, "cpu").labels(store.image("case_00"), "x")
        for size in (1, 4)
    )
    assert (one == many).all()


def test_another_part_is_scored_into_its_own_folder(run, capsys):
    evaluate_main(["--run", str(run), "--part", "val"])
    assert json.loads((run / "evaluation/val/summary.json").read_text())["part"] == "val"
    assert json.loads((run / "summary.json").read_text())["part"] == "test"
    assert "val DICE" in capsys.readouterr().out


def test_evaluating_again_changes_nothing(run):
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    evaluate_main(["--run", str(run)])
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == before


def test_lost_tables_are_made_again_equal(run):
    before = (run / "evaluation/per_case.csv").read_text()
    (run / "summary.json").unlink()
    (run / "evaluation/per_case.csv").unlink()
    evaluate_main(["--run", str(run)])
    assert (run / "evaluation/per_case.csv").read_text() == before


def test_the_pictures_can_be_looked_at(run):
    for name in ("panels.png", "curves.png"):
        with Image.open(run / name) as picture:
            assert min(picture.size) > 300
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 20


def test_a_run_that_is_not_finished_says_how_to_go_on(run, tmp_path):
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(MedsegError, match=r"not finished .*it goes on"):
        evaluate_main(["--run", str(tmp_path)])


def test_a_store_that_moved_can_be_named(run, tmp_path):
    import shutil

    shutil.copytree(run.parent / "store", tmp_path / "moved")
    (run / "summary.json").unlink()
    evaluate_main(["--run", str(run), "--store", str(tmp_path / "moved")])
    assert (run / "summary.json").exists()


def test_two_patients_have_no_interval(tmp_path):
    store = make_store(tmp_path / "store", cases=2, slices=2, size=8)
    counts = {c: count_slices(np.array(store.mask(c)), store.mask(c), 2) for c in store.rows}
    content = tiny_config(store.path, tmp_path / "run")
    tables = case_table(store, counts, "one"), slice_table(store, counts, "one")
    summary = summarise(*tables, parse_config(content, "test"))
    assert summary["dice"]["low"] is None
    assert summary["dice"]["method"] == "none"


@pytest.mark.parametrize("scores", [(np.nan, np.nan), (0.25, np.nan), (0.25, 0.5)])
def test_a_case_without_a_score_is_shown_as_such(tmp_path, monkeypatch, scores):
    store = make_store(tmp_path / "store", cases=2, slices=2, size=16)
    titles = []
    monkeypatch.setattr(
        pictures, "_save",
        lambda figure, *_: titles.extend(axes.get_title() for axes in figure.axes[::3]),
    )  # fmt: skip
    predictor = Predictor(nn.Conv2d(1, 2, 1), ImageSpec(), 1, device="cpu")
    table = pd.DataFrame({"case": list(store.rows), "dice": scores})
    pictures.write_panels(store, predictor, table, tmp_path / "panels.png")
    pictures.pyplot.close("all")
    shown = sorted(title.rsplit(", ", 1)[1] for title in titles)
    known = [f"DICE {score:.3f}" for score in scores if not math.isnan(score)]
    assert shown == (known or ["no score", "no score"])
    assert all(title.startswith(("best", "median", "worst")) == bool(known) for title in titles)

"""Distances of surfaces and calibration in an evaluation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from medseg_reg.config import EvaluationSpec, parse_config
from medseg_reg.data.preprocessing import ImageSpec
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.errors import MedsegError
from medseg_reg.inference.case_scores import predict_and_calibrate, surface_scores
from medseg_reg.inference.evaluation import (
    case_table,
    count_cases,
    evaluate,
    headline,
    score_cases,
    slice_table,
    summarise,
)
from medseg_reg.inference.predictor import Predictor
from medseg_reg.io.geometry import geometry_of
from medseg_reg.metrics import (
    average_surface_distance,
    calibration_counts,
    hausdorff_distance,
    pooled,
    surface_dice,
    surface_distances,
)
from medseg_reg.train import main as train_main
from tests.stores import make_store
from tests.training import tiny_config, write_config

SPACING = (2.5, 0.8, 0.5)


class Brightness(nn.Module):
    """A network whose first class is what is bright, and which finds nothing of the others."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        never = [torch.full_like(x[:, 0], -9.0)] * (self.classes - 2)
        return torch.stack([0.5 - x[:, 0], x[:, 0] - 0.5, *never], dim=1) * 4


def predictor(classes: int = 2, **options: object) -> Predictor:
    return Predictor(Brightness(classes), ImageSpec(**options), 1, batch_size=3, device="cpu")


def spaced(store: SliceStore) -> SliceStore:
    """Give every case of a store a spacing."""
    for name, row in store.rows.items():
        shape = row.shape[:3]
        geometry = geometry_of(np.diag([*reversed(SPACING), 1.0]), shape[::-1])
        store.rows[name] = row.model_copy(update={"geometry": geometry})
    return store


def scored(store, spec=None):
    spec = spec or EvaluationSpec()
    cases = list(store.rows)
    network = predictor(len(store.classes))
    counts, more = score_cases(store, cases, network, spec, "test", progress=False)
    return case_table(store, counts, spec.empty, more), slice_table(store, counts, spec.empty)


def test_a_volume_is_scored_in_millimetres(tmp_path):
    store = spaced(make_store(tmp_path / "store", cases=2, slices=5, size=24))
    assert store.row("case_00").geometry.spacing == SPACING
    table, _ = scored(store)
    for case, row in table.set_index("case").iterrows():
        mine = predictor().labels(store.image(case), case) == 1
        found = surface_distances(mine, store.mask(case) == 1, SPACING)
        assert row["hd95"] == hausdorff_distance(found, 95)
        assert row["assd"] == average_surface_distance(found)
        assert row["surface_dice"] == surface_dice(found, 2.0)
        assert row["volume_difference_ml"] == pytest.approx(
            (mine.sum() - (store.mask(case) == 1).sum()) * math.prod(SPACING) / 1000, abs=1e-4
        )


def test_frames_are_scored_in_pixels_of_each_frame_and_pooled(tmp_path):
    store = make_store(tmp_path / "store", cases=1, slices=6, size=24, empty=0.5)
    table, _ = scored(store, EvaluationSpec(tolerance=1.0))
    images, truth = store.image("case_00"), store.mask("case_00") == 1
    mine = predictor().labels(images, "case_00") == 1
    found = pooled([surface_distances(a, b) for a, b in zip(mine, truth, strict=True)])
    assert table["hd95"].tolist() == [hausdorff_distance(found, 95)]
    assert table["assd"].tolist() == [average_surface_distance(found)]
    assert table["surface_dice"].tolist() == [surface_dice(found, 1.0)]
    assert table["volume_difference_ml"].isna().all()


@pytest.mark.parametrize("unit", ["mm", "px"])
@pytest.mark.parametrize(("missing", "known"), [("diagonal", True), ("nan", False)])
def test_the_policies_of_the_configuration_are_kept(tmp_path, unit, missing, known):
    store = spaced(make_store(tmp_path / "store", cases=1, slices=3, size=8))
    nothing, truth = np.zeros((3, 8, 8), np.uint8), np.zeros((3, 8, 8), np.uint8)
    truth[1, 2:5, 2:5] = 1
    spec = EvaluationSpec(missing=missing, empty="zero")
    scores = surface_scores(nothing, truth, 3, store.row("case_00"), spec, unit)
    lengths = SPACING if unit == "mm" else (0, 1, 1)
    diagonal = math.hypot(*(n * s for n, s in zip((3, 8, 8), lengths, strict=True)))
    assert scores[0] == {}
    # Class 1 is missing, class 2 is empty in both.
    for one in scores[1:]:
        assert one["surface_dice"] == 0
        for name in ("hd95", "assd"):
            expected = diagonal if known else math.nan
            assert one[name] == pytest.approx(expected, nan_ok=True)


def test_calibration_is_that_of_all_pixels_of_the_case(tmp_path):
    store = make_store(tmp_path / "store", cases=1, slices=5, size=16)
    images, truth = store.image("case_00"), store.mask("case_00")
    labels, counts = predict_and_calibrate(predictor(), images, "case_00", truth, 10)
    assert np.array_equal(labels, predictor().labels(images, "case_00"))
    x = torch.from_numpy(np.array(images)).float()[:, None] / 255
    expected = calibration_counts(Brightness()(x).softmax(1), torch.from_numpy(np.array(truth)), 10)
    assert counts[..., :2].tolist() == expected.sum(dim=0)[..., :2].tolist()


def test_pixels_that_the_network_did_not_see_are_not_calibrated(tmp_path):
    store = make_store(tmp_path / "store", cases=1, slices=2, size=16)
    cut = predictor(size=(8, 8), fit="crop")
    _, counts = predict_and_calibrate(
        cut, store.image("case_00"), "case_00", store.mask("case_00"), 5
    )
    assert counts[0, :, 0].sum() == 2 * 8 * 8


def test_a_network_that_gives_no_numbers_is_an_error(tmp_path):
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, x * math.nan], dim=1)

    store = make_store(tmp_path / "store", cases=1, slices=2, size=16)
    broken = Predictor(Broken(), ImageSpec(), 1, device="cpu")
    with pytest.raises(MedsegError, match="case_00: the network gives no probabilities"):
        predict_and_calibrate(broken, store.image("case_00"), "case_00", store.mask("case_00"), 5)


@pytest.mark.parametrize("metrics", [(), ("surface",), ("calibration",)])
def test_what_is_not_asked_for_is_neither_computed_nor_written(tmp_path, monkeypatch, metrics):
    from medseg_reg.inference import evaluation

    def never(*_, **__):
        raise AssertionError("computed, but not asked for")

    if "surface" not in metrics:
        monkeypatch.setattr(evaluation, "surface_scores", never)
    if "calibration" not in metrics:
        monkeypatch.setattr(evaluation, "predict_and_calibrate", never)
    store = make_store(tmp_path / "store", cases=2, slices=3, size=16)
    table, _ = scored(store, EvaluationSpec(metrics=metrics))
    assert ("hd95" in table) == ("surface_dice" in table) == ("surface" in metrics)
    assert ("ece" in table) == ("calibration" in metrics)
    counts = count_cases(store, list(store.rows), predictor(), "test", progress=False)
    assert table["dice"].tolist() == case_table(store, counts, "one")["dice"].tolist()


def test_columns_that_were_there_stay_where_they_were(tmp_path):
    store = make_store(tmp_path / "store", cases=1, slices=3, size=16)
    table, _ = scored(store)
    assert list(table)[:11] == [
        "case", "group", "class", "slices", "dice", "iou", "tp", "fp", "fn",
        "truth_ml", "predicted_ml",
    ]  # fmt: skip
    assert list(table)[11:] == [
        "precision", "recall", "volume_difference", "volume_difference_ml", "empty",
        "hd95", "assd", "surface_dice", "ece",
    ]  # fmt: skip


def test_the_summary_counts_what_is_empty_and_what_each_mean_leaves_out(tmp_path):
    store = make_store(tmp_path / "store", cases=4, slices=2, size=16, classes=3)
    content = tiny_config(store.path, tmp_path / "run", evaluation={"missing": "nan"})
    config = parse_config(content, "test")
    tables = scored(store, config.evaluation)
    # The network knows no second class, so it finds nothing of it.
    summary = summarise(*tables, config)
    second = summary["classes"]["class_2"]
    assert second["cases"] == {
        "cases": 4, "empty_in_both": 0, "empty_in_truth_alone": 0, "empty_in_prediction_alone": 4,
    }  # fmt: skip
    assert (tables[0].loc[tables[0]["class"] == "class_2", "empty"] == "prediction").all()
    assert "hd95" in second["volume"]
    assert second["volume"]["hd95"]["left_out"] == 4
    assert second["volume"]["hd95"]["mean"] is None
    assert second["volume"]["recall"]["mean"] == 0
    assert second["volume"]["volume_difference"]["mean"] == -1
    first = summary["classes"]["class_1"]["volume"]
    assert first["hd95"]["n"] == 4
    # Over classes the one that is left out does not count.
    assert summary["scores"]["hd95"]["mean"] == pytest.approx(first["hd95"]["mean"])
    assert "volume_difference_ml" not in first
    json.dumps(summary, allow_nan=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    store = make_store(folder / "store", cases=8, slices=3, size=32)
    content = tiny_config(store.path, folder / "run", training__epochs=1)
    content["data"]["split"] = {"kind": "counts", "train": 3, "val": 1, "test": 4}
    train_main(["--config", str(write_config(folder / "c.yaml", content))])
    return folder / "run"


def test_the_files_of_a_run_hold_the_scores_and_say_how_they_were_taken(run):
    summary = json.loads((run / "summary.json").read_text())
    table = pd.read_csv(run / "evaluation" / "per_case.csv")
    assert summary["surface"] == {"missing_policy": "diagonal", "tolerance": 2.0, "unit": "px"}
    assert summary["calibration"] == {"bins": 15}
    for name in ("precision", "recall", "hd95", "assd", "surface_dice", "ece"):
        assert summary["scores"][name]["mean"] == pytest.approx(table[name].mean(), abs=1e-5)
    assert summary["scores"].keys().isdisjoint({"dice", "iou"})
    lines = headline(RunDirectory(run), summary).splitlines()
    assert lines[1].startswith("test: HD95 ")
    assert " px, surface DICE at 2 px 0." in lines[1]
    assert lines[-1] == f"test DICE {summary['dice']['mean']:.2f}"


def test_other_settings_are_evaluated_anew(run):
    def written():
        return (run / "summary.json").stat().st_mtime_ns

    before = written()
    evaluate(RunDirectory(run))
    assert written() == before
    content = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(content.replace("tolerance: 2.0", "tolerance: 5.0"))
    try:
        summary = evaluate(RunDirectory(run))
    finally:
        (run / "config.yaml").write_text(content)
    assert written() != before
    assert summary["surface"]["tolerance"] == 5.0


def test_a_summary_from_before_these_scores_has_a_headline(run):
    summary = json.loads((run / "summary.json").read_text())
    for key in ("surface", "scores", "calibration"):
        summary.pop(key, None)
    assert "HD95" not in headline(RunDirectory(run), summary)

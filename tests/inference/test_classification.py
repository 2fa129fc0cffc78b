"""Scores of a slice classifier: thresholds from validation, tables per slice and patient."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from medseg_reg.config import parse_as
from medseg_reg.config_classification import ClassificationConfig
from medseg_reg.data.dataset import SliceDataset
from medseg_reg.data.preprocessing import ImageSpec
from medseg_reg.inference.classification import (
    headline,
    judge,
    patient_table,
    score_slices,
    thresholds,
)
from medseg_reg.metrics import auroc, average_precision
from tests.stores import make_store


class Bright(torch.nn.Module):
    """Gives for two classes the brightest pixel of an image, and its mean."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x.amax((1, 2, 3)), x.mean((1, 2, 3))], dim=1)


@pytest.fixture(scope="module")
def spec() -> ClassificationConfig:
    content = {
        "name": "judged",
        "data": {"store": "none", "image": {"size": [32, 32]}, "split": {}},
        "evaluation": {"resamples": 100, "batch_size": 3},
        "presence": {"sensitivity": 0.8},
        "training": {"accelerator": "cpu"},
    }
    return parse_as(ClassificationConfig, content, "test")


@pytest.fixture(scope="module")
def table(spec: ClassificationConfig, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    path = tmp_path_factory.mktemp("data") / "store"
    # Two cases of one patient, and three of others.
    groups = ["a", "b", "b", "c", "d"]
    store = make_store(path, cases=5, slices=6, classes=3, groups=groups, empty=0.5)
    names = [row.name for row in store.manifest.cases]
    parts = {"val": names[:1], "test": names[1:]}
    return pd.concat(
        score_slices(Bright(), SliceDataset(store, cases, ImageSpec()), spec).assign(part=part)
        for part, cases in parts.items()
    )


def test_there_is_a_row_for_each_slice_and_class(table: pd.DataFrame) -> None:
    assert len(table) == 5 * 6 * 2
    assert not table.duplicated(["case", "slice", "class"]).any()
    assert set(table["truth"]) == {0.0, 1.0}


def test_thresholds_come_from_validation_alone(
    table: pd.DataFrame, spec: ClassificationConfig
) -> None:
    found = thresholds(table, spec)
    changed = table.copy()
    changed.loc[changed["part"] == "test", "score"] = 0.0
    assert thresholds(changed, spec) == found
    val = table[(table["part"] == "val") & (table["truth"] == 1)]
    for name, limit in found.items():
        assert (val[val["class"] == name]["score"] >= limit).mean() >= 0.8


def test_a_patient_is_scored_over_all_its_cases(
    table: pd.DataFrame, spec: ClassificationConfig
) -> None:
    patients = patient_table(table, thresholds(table, spec))
    assert sorted(set(patients["patient"])) == ["b", "c", "d"]
    for _, row in patients.iterrows():
        own = table[(table["patient"] == row["patient"]) & (table["class"] == row["class"])]
        pair = own["score"].to_numpy(), own["truth"].to_numpy()
        assert row["slices"] == len(own)
        np.testing.assert_equal(row["auroc"], auroc(*pair))
        np.testing.assert_equal(row["average_precision"], average_precision(*pair))


def test_the_summary_has_both_and_counts_what_is_unknown(
    table: pd.DataFrame, spec: ClassificationConfig
) -> None:
    holed = table.reset_index(drop=True)
    first = holed[(holed["part"] == "test") & (holed["class"] == "class_2")].index[0]
    holed.loc[first, "truth"] = np.nan
    found = judge(holed, spec)["classes"]["class_2"]
    rows = holed[(holed["part"] == "test") & (holed["class"] == "class_2")].dropna()
    assert (found["unknown"], found["slices"]) == (1, 23)
    expected = auroc(rows["score"].to_numpy(), rows["truth"].to_numpy())
    assert found["all_slices"]["auroc"] == pytest.approx(expected)
    assert found["patients"]["auroc"]["n"] <= 3
    json.dumps(found, allow_nan=False)


def test_without_a_test_part_the_validation_is_scored_and_it_is_said(
    table: pd.DataFrame, spec: ClassificationConfig
) -> None:
    from medseg_reg.engine.classification import ClassificationDirectory

    summary = judge(table[table["part"] == "val"], spec)
    assert (summary["part"], summary["note"] != "") == ("val", True)
    said = headline(ClassificationDirectory(Path("runs/x")), summary)
    assert said.startswith("note: there is no test part")
    assert "val: class_1 in " in said

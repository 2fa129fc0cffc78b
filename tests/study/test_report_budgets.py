"""Unequal budgets are found in the runs themselves: in their settings, and in what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from medseg_reg.study.report.budgets import unequal_budgets
from medseg_reg.study.report.provenance import runs
from medseg_reg.study.report.source import Source
from medseg_reg.study.results import COLUMNS

RULES: dict[str, Any] = {
    "training": {"epochs": 20, "accumulate": 1, "validate_every": 1},
    "data": {"batch_size": 4, "sampling": {"policy": "all", "per_epoch": None}},
    "regularization": {
        "architecture": [],
        "optimization": {"early_stopping": None, "select": "best"},
    },
}
STOP = {"monitor": "val_dice", "patience": 2, "min_delta": 0.0}


def changed(content: Any, key: str, value: Any) -> Any:
    first, _, rest = key.partition(".")
    inner = changed(content[first], rest, value) if rest else value
    return {**content, first: inner}


@pytest.fixture
def make(tmp_path: Path):
    """Give studies of two methods and two seeds; what is changed belongs to `dropout`."""

    def study(key: str = "", value: Any = None, trained: tuple[int, int] = (20, 20)) -> Source:
        rows = []
        for method in ("none", "dropout"):
            for seed in (0, 1):
                run = f"runs/blobs/unet/{method}/seed{seed}"
                (tmp_path / run).mkdir(parents=True)
                own = key and method == "dropout"
                config = changed(RULES, key, value) if own else RULES
                (tmp_path / run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
                epochs = trained[seed] if method == "dropout" else 20
                table = pd.DataFrame({"epoch": range(1, epochs + 1)})
                table.to_csv(tmp_path / run / "metrics.csv", index=False)
                (tmp_path / run / "seen.json").write_text('{"slices_per_epoch": 10}')
                names = ("blobs", "unet", method, seed, "5f", run)
                rows += [(*names, f"c{n}", f"c{n}", "organ", "dice", 0.5) for n in range(3)]
        pd.DataFrame(rows, columns=list(COLUMNS)).to_csv(tmp_path / "results.csv", index=False)
        return Source.read(tmp_path)

    return study


def test_equal_budgets_need_no_word(make):
    assert list(unequal_budgets(make())) == []


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("training.epochs", 300, "20 in none and 300 in dropout"),
        ("training.accumulate", 2, "1 in none and 2 in dropout"),
        ("data.batch_size", 8, "4 in none and 8 in dropout"),
        ("regularization.optimization.select", "last", "best in none and last in dropout"),
        (
            "regularization.optimization.early_stopping",
            STOP,
            "off in none and monitor val_dice patience 2 min_delta 0.0 in dropout",
        ),
    ],
)
def test_settings_of_the_runs_that_differ_are_named_with_their_methods(make, key, value, told):
    (said,) = unequal_budgets(make(key, value))
    assert f"blobs, unet: the runs had unequal budgets: {key}: {told}." in said


def test_the_epochs_that_were_trained_are_told_beside_the_rule(make):
    source = make("regularization.optimization.early_stopping", STOP, trained=(7, 12))
    (said,) = unequal_budgets(source)
    assert "patience 2" in said
    assert "; epochs that were trained: none 20, dropout 7 to 12." in said
    listed = runs(source).frame
    assert listed["epochs"].tolist() == [20] * 4
    assert sorted(listed["trained"]) == [7, 12, 20, 20]
    assert sorted(listed["drawn"]) == [70, 120, 200, 200]


def test_equal_rules_may_end_at_unequal_times(make):
    (said,) = unequal_budgets(make(trained=(7, 7)))
    assert said == (
        "blobs, unet: by equal rules the trainings ended after unequal numbers of epochs: "
        "none 20, dropout 7."
    )


def test_runs_without_files_are_passed_over(make):
    source = make("training.epochs", 300)
    for row in source.runs.itertuples():
        for name in ("config.yaml", "metrics.csv"):
            (source.path / row.run / name).unlink()
    assert list(unequal_budgets(source)) == []

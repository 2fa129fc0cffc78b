"""A report says what methods had besides their own training, and whether by all alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from medseg_reg.engine.origins import Origin
from medseg_reg.study.report.besides import besides, told_besides
from medseg_reg.study.report.source import Source
from medseg_reg.study.report.tables import write_tables
from medseg_reg.study.results import COLUMNS

NUMBERS = {"tested": 3, "validated": 1, "val": ()}
TEACHER = Origin("teacher", "runs/t", 30, 8, ("a", "b"), (), **NUMBERS)
MAE = Origin("pre-training", "runs/mae", 40, 10, ("a", "b", "c"), (), **NUMBERS)
SEEN = Origin("pre-training", "runs/seen", 40, 10, ("a", "x", "y"), ("x", "y"), **NUMBERS)
FILE = Origin("file", "w.pt", tested=3, validated=1)


@pytest.fixture
def make(tmp_path: Path):
    """Give studies of two methods and two seeds, by what the runs of each had, by network."""

    def study(**networks: tuple[list[list[Origin]], list[list[Origin]]]) -> Source:
        rows: list[tuple[Any, ...]] = []
        for network, of_methods in networks.items():
            for method, of_seeds in zip(("none", "other"), of_methods, strict=True):
                for seed, origins in enumerate(of_seeds):
                    run = f"runs/blobs/{network}/{method}/seed{seed}"
                    (tmp_path / run).mkdir(parents=True)
                    noted = json.dumps({"learned_from": [one.as_dict() for one in origins]})
                    (tmp_path / run / "environment.json").write_text(noted)
                    where = ("blobs", network, method, seed, "5f", run)
                    rows.append((*where, "c", "c", "o", "dice", 0.5))
        pd.DataFrame(rows, columns=list(COLUMNS)).to_csv(tmp_path / "results.csv", index=False)
        return Source.read(tmp_path)

    return study


def both(*origins: Origin) -> list[list[Origin]]:
    return [list(origins)] * 2


def test_nothing_from_elsewhere_needs_no_word_and_no_table(make):
    source = make(unet=(both(), both()))
    assert list(told_besides(source)) == []
    assert besides(source) is None
    for run in source.runs["run"]:
        (source.path / run / "environment.json").unlink()
    assert list(told_besides(source)) == []


def test_a_teacher_of_one_method_is_another_budget(make, tmp_path):
    longer = Origin("teacher", "runs/u", 34, 8, ("a", "b", "c"), (), **NUMBERS)
    source = make(unet=(both(), [[TEACHER], [longer]]))
    assert list(told_besides(source)) == [
        "blobs, unet: methods did not have the same budget. Besides their own training: nothing "
        "in none; a teacher (epochs 30 to 34, slices 240 to 272, cases 2 to 3) in other. A "
        "difference between them may come from that."
    ]
    table = besides(source)
    shown = [[cell.text for cell in row] for row in table.rows]
    assert shown == [
        ["blobs", "unet", "none", "nothing", "2", *["–"] * 6],  # noqa: RUF001
        ["blobs", "unet", "other", "teacher", "2", "2", "30 to 34", "240 to 272", "2 to 3"]
        + ["none"] * 2,
    ]
    write_tables([table], tmp_path / "tables")
    written = pd.read_csv(tmp_path / "tables/besides.csv")
    assert written["cases"].dropna().tolist() == ["a b", "a b c"]
    assert written["path"].dropna().tolist() == ["runs/t", "runs/u"]


def test_what_only_some_runs_of_a_method_had_is_told_so(make):
    (said,) = told_besides(make(unet=(both(), [[TEACHER], []])))
    assert "a teacher in 1 of 2 runs (epochs 30, slices 240, cases 2) in other." in said


def test_what_all_methods_had_is_told_and_networks_are_compared(make):
    source = make(unetr=(both(), both()), mae=(both(MAE), both(MAE)))
    had = "a pre-training (epochs 40, slices 400, cases 3)"
    assert list(told_besides(source)) == [
        f"blobs, mae: besides its own training every method had {had}.",
        "blobs: networks did not have the same budget. Besides the training of none: "
        f"nothing in unetr; {had} in mae.",
    ]


def test_what_a_teacher_had_itself_counts_too(make):
    taught = Origin("teacher", "runs/t", 30, 8, ("a", "b"), (), **NUMBERS, before=(SEEN,))
    budget, known = told_besides(make(unet=(both(), both(taught))))
    assert "and a pre-training of the teacher (epochs 40, slices 400, cases 3)" in budget
    assert known == (
        "blobs, unet: the pre-training of the teacher of 2 runs (other) has seen images of 2 of 3 "
        "test cases, without labels. The scores of these runs hold for patients whose images are "
        "at hand before."
    )


def test_what_is_known_of_test_cases_is_told_run_by_run(make):
    source = make(unet=([[SEEN], [MAE]], both(FILE)))
    said = list(told_besides(source))
    assert "a pre-training (epochs 40, slices 400, cases 3) in none; a file of weights (" in said[0]
    assert "of 1 run (none) has seen images of 2 of 3 test cases, without labels" in said[1]
    assert said[2] == (
        "blobs, unet: whether the file of weights of 2 runs (other) has seen test cases is not "
        "known."
    )
    texts = {row[3].text: [cell.text for cell in row[9:]] for row in besides(source).rows}
    assert texts == {
        "pre-training": ["0 to 2 of 3", "none"],
        "file of weights": ["not known", "not known"],
    }


def test_of_runs_from_before_such_notes_the_configuration_says_what_there_was(make):
    source = make(unet=(both(), both(TEACHER)))
    for row in source.runs.itertuples():
        folder = source.path / row.run
        (folder / "environment.json").write_text("{}")
        if row.method == "other":
            config = {"regularization": {"error": {"distillation": {"teacher": "runs/t"}}}}
            (folder / "config.yaml").write_text(json.dumps(config))
    budget, known = told_besides(source)
    assert "nothing in none; a teacher (of unknown cost) in other" in budget
    assert known.endswith("of 2 runs (other) has seen test cases is not known.")

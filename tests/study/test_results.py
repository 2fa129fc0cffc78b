"""The tables of a study hold what its runs have written, each row with its run."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from medseg_reg.files import write_json
from medseg_reg.study.grid import Cell, expand
from medseg_reg.study.results import COADAPTATION_COLUMNS, write_results
from medseg_reg.study.runner import is_finished
from medseg_reg.study.worker import coadaptation_files
from tests.study.studies import study_of

TESTS = {
    "coadaptation": "rate,draw,group,dice\n0.5,10,None,0.25\n0.5,9,None,0.125\n0.0,0,None,0.5\n",
    "channel_correlation": "group,correlation\n9,0.25\n10,\n",
    "train_val_gap": (
        "train_dice,val_dice,gap,epoch,train_loss,val_loss,loss_gap\n0.9,0.7,0.2,3,0.1,0.3,0.2\n"
    ),
}


def finish(cell: Cell, settings: dict[str, object]) -> None:
    """Write what a finished run has, as far as the tables are made of it."""
    run = cell.config.run_path
    (run / "evaluation").mkdir(parents=True)
    (run / "weights.safetensors").touch()
    write_json(run / "summary.json", {})
    write_json(run / "splits.json", {"hash": f"hash of {cell.spot.part}"})
    scores = "case,group,class,dice\n007,None,organ,0.5\n"
    (run / "evaluation" / "per_case.csv").write_text(scores)
    tables, done = coadaptation_files(run)
    for name, content in TESTS.items():
        tables[name].write_text(content)
    write_json(done, settings)


def test_each_row_has_the_split_of_its_run(tmp_path: Path) -> None:
    asked = {"part": "val", "rates": (0.0, 0.5), "draws": 11, "seed": 0}
    study = study_of(tmp_path / "store", tmp_path, folds=2, seeds=1, coadaptation=asked)
    for cell in expand(study):
        finish(cell, study.coadaptation.model_dump(mode="json"))
    write_results(study, expand(study))
    kept = {"dtype": str, "keep_default_na": False}
    results = pd.read_csv(study.directory / "results.csv", **kept)
    tests = {name: pd.read_csv(study.directory / f"{name}.csv", **kept) for name in TESTS}
    assert {name: tuple(table) for name, table in tests.items()} == COADAPTATION_COLUMNS
    fallen = tests["coadaptation"]
    for table, rows in zip((results, *tests.values()), (1, 3, 2, 1), strict=True):
        assert len(table) == 2 * 2 * rows  # folds and methods
        counted = table.groupby(["method", "split"]).size()
        assert set(counted) == {rows}
        assert set(counted.index.get_level_values("split")) == {"hash of fold0", "hash of fold1"}
    # By number, not by letters, and as the run wrote them.
    assert fallen["draw"].tolist()[:3] == ["0", "9", "10"]
    assert set(results["case"]) == {"007"}
    assert set(fallen["part"]) == {"val"}
    assert set(tests["channel_correlation"]["correlation"]) == {"0.25", ""}
    assert set(tests["train_val_gap"]["gap"]) == {"0.2"}


def test_a_table_that_is_no_longer_asked_for_goes(tmp_path: Path) -> None:
    asked = {"rates": (0.0, 0.5), "draws": 11, "seed": 0}
    study = study_of(tmp_path / "store", tmp_path, seeds=1, coadaptation=asked)
    for cell in expand(study):
        finish(cell, study.coadaptation.model_dump(mode="json"))
    write_results(study, expand(study))
    assert all((study.directory / f"{name}.csv").exists() for name in TESTS)
    without = study_of(tmp_path / "store", tmp_path, seeds=1)
    write_results(without, expand(without))
    assert not any((study.directory / f"{name}.csv").exists() for name in TESTS)
    assert (study.directory / "results.csv").exists()


def test_a_run_that_lacks_one_of_the_tests_is_not_finished(tmp_path: Path) -> None:
    study = study_of(tmp_path / "store", tmp_path, seeds=1, coadaptation={"draws": 2})
    cell = expand(study)[0]
    finish(cell, study.coadaptation.model_dump(mode="json"))
    assert is_finished(cell, study)
    tables, _ = coadaptation_files(cell.config.run_path)
    for path in tables.values():
        content = path.read_bytes()
        path.unlink()
        assert not is_finished(cell, study)
        path.write_bytes(content)
    assert is_finished(cell, study)
    other = study_of(tmp_path / "store", tmp_path, seeds=1, coadaptation={"part": "val"})
    assert not is_finished(cell, other)

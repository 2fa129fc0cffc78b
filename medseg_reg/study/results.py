"""The tables of a study: one row a run, case, class and score, whatever happened on the way.

    results.csv       dataset, network, method, seed, split, run, case, group, class, metric, value
    coadaptation.csv  dataset, network, method, seed, split, rate, draw, group, dice

Both are made from the finished runs alone and sorted, so they are the same, byte for byte, for a
study that was stopped or killed on the way and for one that was not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from medseg_reg.errors import MedsegError
from medseg_reg.files import read_json, replacing
from medseg_reg.study import worker
from medseg_reg.study.grid import Cell, Spot
from medseg_reg.study.runner import is_finished
from medseg_reg.study.spec import StudySpec

COLUMNS = (
    *("dataset", "network", "method", "seed", "split", "run", "case", "group", "class"),
    *("metric", "value"),
)
COADAPTATION_COLUMNS = (
    *("dataset", "network", "method", "seed", "split"),
    *("rate", "draw", "group", "dice"),
)


def write_results(study: StudySpec, cells: Sequence[Cell[Spot]]) -> Path:
    """Gather the scores of all finished runs in results.csv, and in coadaptation.csv."""
    done = [cell for cell in cells if is_finished(cell, study)]
    path = study.directory / "results.csv"
    _write([_scores(study, cell) for cell in done], COLUMNS, path)
    if study.coadaptation is not None:
        tables = [_coadaptation(cell) for cell in done]
        _write(tables, COADAPTATION_COLUMNS, study.directory / "coadaptation.csv")
    else:  # of a time when it was asked for; the tables of the runs stay
        (study.directory / "coadaptation.csv").unlink(missing_ok=True)
    return path


def _scores(study: StudySpec, cell: Cell[Spot]) -> pd.DataFrame:
    run = cell.config.run_path
    wide = _read(run / "evaluation" / "per_case.csv")
    found = [metric for metric in study.metrics if metric in wide]
    long = wide.melt(["case", "group", "class"], found, "metric", "value")
    return _labelled(long, cell).assign(run=f"runs/{cell.path}")


def _coadaptation(cell: Cell[Spot]) -> pd.DataFrame:
    return _labelled(_read(worker.coadaptation_files(cell.config.run_path)[0]), cell)


def _read(path: Path) -> pd.DataFrame:
    # As text: what a run has written stays as it is, and a case may be called 007.
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False)
    except (FileNotFoundError, ValueError) as error:
        raise MedsegError(
            f"{path}: cannot be read ({error}). Delete summary.json of that run and start the "
            "study again: the run is evaluated anew."
        ) from None


def _labelled(table: pd.DataFrame, cell: Cell[Spot]) -> pd.DataFrame:
    split = read_json(cell.config.run_path / "splits.json")["hash"]
    return table.assign(**cell.spot._asdict(), split=split)


def _write(tables: Sequence[pd.DataFrame], columns: Sequence[str], path: Path) -> None:
    table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)
    keys = [column for column in columns if column not in ("value", "dice")]
    numbers = {"rate": float, "draw": int}

    def key(column: pd.Series) -> pd.Series:
        kind = numbers.get(str(column.name))
        return column if kind is None else column.astype(kind)

    table = table[list(columns)].sort_values(keys, kind="stable", key=key)
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")

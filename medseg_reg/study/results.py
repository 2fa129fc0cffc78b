"""The tables of a study: one row a run, case, class and score, whatever happened on the way.

    results.csv              dataset, network, method, seed, split, run, case, group, class, metric,
                             value
    coadaptation.csv         dataset, network, method, seed, split, part, rate, draw, group, dice
    channel_correlation.csv  dataset, network, method, seed, split, part, group, correlation
    train_val_gap.csv        dataset, network, method, seed, split, train_dice, val_dice, gap,
                             epoch, train_loss, val_loss, loss_gap

All are made from the finished runs alone and sorted, so they are the same, byte for byte, for a
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
_KEYS = (*COLUMNS[:-1], "part", "rate", "draw")
_WHERE = ("dataset", "network", "method", "seed", "split")
# Columns of the tables of the tests of co-adaptation, by the names of their files.
COADAPTATION_COLUMNS = {
    "coadaptation": (*_WHERE, "part", "rate", "draw", "group", "dice"),
    "channel_correlation": (*_WHERE, "part", "group", "correlation"),
    "train_val_gap": (
        *(*_WHERE, "train_dice", "val_dice", "gap"),
        *("epoch", "train_loss", "val_loss", "loss_gap"),
    ),
}


def write_results(study: StudySpec, cells: Sequence[Cell[Spot]]) -> Path:
    """Gather the scores of all finished runs in results.csv, and the tests of co-adaptation."""
    done = [cell for cell in cells if is_finished(cell, study)]
    path = study.directory / "results.csv"
    _write([_scores(study, cell) for cell in done], COLUMNS, path)
    for name, columns in COADAPTATION_COLUMNS.items():
        gathered = study.directory / f"{name}.csv"
        if study.coadaptation is not None:
            part = study.coadaptation.part
            _write([_coadaptation(cell, name, part) for cell in done], columns, gathered)
        else:  # of a time when it was asked for; the tables of the runs stay
            gathered.unlink(missing_ok=True)
    return path


def _scores(study: StudySpec, cell: Cell[Spot]) -> pd.DataFrame:
    run = cell.config.run_path
    wide = _read(run / "evaluation" / "per_case.csv")
    found = [metric for metric in study.metrics if metric in wide]
    long = wide.melt(["case", "group", "class"], found, "metric", "value")
    return _labelled(long, cell).assign(run=f"runs/{cell.path}")


def _coadaptation(cell: Cell[Spot], name: str, part: str) -> pd.DataFrame:
    tables, _ = worker.coadaptation_files(cell.config.run_path)
    return _labelled(_read(tables[name]), cell).assign(part=part)


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
    keys = [column for column in columns if column in _KEYS]
    numbers = {"rate": float, "draw": int}

    def key(column: pd.Series) -> pd.Series:
        kind = numbers.get(str(column.name))
        return column if kind is None else column.astype(kind)

    table = table[list(columns)].sort_values(keys, kind="stable", key=key)
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")

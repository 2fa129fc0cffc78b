"""failures.csv: the runs of a study that failed, and why."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from medseg_reg.files import replacing
from medseg_reg.study.grid import Cell, Spot
from medseg_reg.study.pool import ATTEMPT

COLUMNS = (*Spot._fields, "exit_code", "error", "log")
_KEYS = len(Spot._fields)


@dataclass(frozen=True)
class Failure:
    """A run that failed: how its process ended, and the last thing that it said."""

    cell: Cell
    code: int
    error: str
    log: str

    @property
    def row(self) -> tuple[str, ...]:
        """What stands in the table."""
        return (*_key(self.cell), str(self.code), self.error, self.log)


class FailureTable:
    """Keeps failures.csv; without failures there is none.

    What an earlier attempt has left there stays until the run of it has ended anew, whatever
    happens before.

    Args:
        path: of the file.
        todo: the runs that are about to be tried; what the file says of others is out of date.
    """

    def __init__(self, path: Path, todo: Iterable[Cell]) -> None:
        self.path = path
        wanted = {_key(cell) for cell in todo}
        self._rows = {row[:_KEYS]: row for row in _read(path) if row[:_KEYS] in wanted}
        self._write()

    def ended(self, cell: Cell, failure: Failure | None) -> None:
        """Note that a run has ended, and how if it failed."""
        self._rows.pop(_key(cell), None)
        if failure is not None:
            self._rows[_key(cell)] = failure.row
        self._write()

    def _write(self) -> None:
        if not self._rows:
            self.path.unlink(missing_ok=True)
            return
        rows = sorted(self._rows.values(), key=lambda row: (*row[:3], int(row[3]), row[4]))
        with replacing(self.path) as temporary:
            pd.DataFrame(rows, columns=COLUMNS).to_csv(temporary, index=False)


def _key(cell: Cell) -> tuple[str, ...]:
    return tuple(map(str, cell.spot))


def _read(path: Path) -> list[tuple[str, ...]]:
    """Return the rows of a table; none of one that is missing or damaged."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        return list(table[list(COLUMNS)].itertuples(index=False, name=None))
    except (OSError, ValueError, KeyError):
        return []


def last_error(log: Path, code: int) -> str:
    """Return in one line why a run failed: its last error, or the signal that ended it."""
    if code < 0:
        name = _signal_name(-code)
        hint = " (by hand, or because memory ran out)" if name == "SIGKILL" else ""
        return f"killed by {name}{hint}"
    lines = []
    if log.exists():
        text = log.read_bytes()[-20_000:].decode(errors="replace").rpartition(ATTEMPT)[2]
        lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"ended with exit code {code} and said nothing"])[-1][:500]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # most real-time signals have none
        return f"signal {number}"

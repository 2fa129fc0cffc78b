"""failures.csv: the runs of a study or a search that failed, and why."""

from __future__ import annotations

import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from medseg_reg.files import replacing
from medseg_reg.study.grid import Spotted
from medseg_reg.study.pool import ATTEMPT

COLUMNS = ("exit_code", "error", "log")


@dataclass(frozen=True)
class Failure:
    """A run that failed: how its process ended, and the last thing that it said."""

    spot: Spotted
    code: int
    error: str
    log: str

    @property
    def row(self) -> tuple[str, ...]:
        """What stands in the table."""
        return (*_key(self.spot), str(self.code), self.error, self.log)


class FailureTable:
    """Keeps failures.csv; without failures there is none.

    What an earlier attempt has left there stays until the run of it has ended anew, whatever
    happens before.

    Args:
        path: of the file.
        fields: what says where a run stands; the first columns.
        todo: the runs that are about to be tried; what the file says of others is out of date.
    """

    def __init__(self, path: Path, fields: Iterable[str], todo: Iterable[Spotted]) -> None:
        self.path, self.columns = path, (*fields, *COLUMNS)
        wanted = {_key(spot) for spot in todo}
        keys = len(self.columns) - len(COLUMNS)
        rows = _read(path, self.columns)
        self._rows = {row[:keys]: row for row in rows if row[:keys] in wanted}
        self._write()

    def ended(self, spot: Spotted, failure: Failure | None) -> None:
        """Note that a run has ended, and how if it failed."""
        self._rows.pop(_key(spot), None)
        if failure is not None:
            self._rows[_key(spot)] = failure.row
        self._write()

    def _write(self) -> None:
        if not self._rows:
            self.path.unlink(missing_ok=True)
            return
        rows = [self._rows[key] for key in sorted(self._rows, key=_order)]
        with replacing(self.path) as temporary:
            pd.DataFrame(rows, columns=self.columns).to_csv(temporary, index=False)


def _key(spot: Spotted) -> tuple[str, ...]:
    return tuple(map(str, spot))


def _order(key: tuple[str, ...]) -> list[tuple[int, int, str]]:
    """Return what sorts texts by the alphabet, and numbers by their size."""
    return [(0, int(one), "") if one.isdecimal() else (1, 0, one) for one in key]


def _read(path: Path, columns: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return the rows of a table; none of one that is missing or damaged."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        return list(table[list(columns)].itertuples(index=False, name=None))
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

"""What is said and noted of the runs of a study or a search as they end, with the time left."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Generic

from medseg_reg.study.failures import Failure, FailureTable, last_error
from medseg_reg.study.grid import SpotT
from medseg_reg.study.pool import Job


class Journal(Generic[SpotT]):
    """Keeps failures.csv and tells of each run that has ended; the time left is that of like runs.

    Args:
        directory: of the study or the search.
        fields: what says where a run stands; the first columns of failures.csv.
        todo: where each run stands that has not ended.
        total: how many runs there are, with those that have ended before.
        room: returns how many runs go on at a time.
        result: returns in words what became of a run that succeeded.
        kind: runs of one kind take like times; all are alike by default.
        tell: gets a line for each run that has ended.

    Attributes:
        failures: the runs that have failed.
    """

    def __init__(
        self,
        directory: Path,
        fields: Sequence[str],
        todo: Sequence[SpotT],
        total: int,
        *,
        room: Callable[[], int],
        result: Callable[[SpotT], str],
        kind: Callable[[SpotT], Hashable] = lambda _: None,
        tell: Callable[[str], None] = print,
    ) -> None:
        self.directory, self.total, self.failures = directory, total, list[Failure]()
        self._todo: dict[str, SpotT] = {spot.path: spot for spot in todo}
        self._table = FailureTable(directory / "failures.csv", fields, todo)
        self._room, self._result, self._kind, self._tell = room, result, kind, tell
        self._seconds: dict[Hashable, list[float]] = {}

    @property
    def left(self) -> Mapping[str, SpotT]:
        """The runs that have not ended, by name."""
        return self._todo

    def ended(self, job: Job, code: int, seconds: float) -> None:
        """Note that a run has ended, and tell of it."""
        spot, failure = self._todo.pop(job.name), None
        if code == 0:
            self._seconds.setdefault(self._kind(spot), []).append(seconds)
        else:
            log = job.log.relative_to(self.directory).as_posix()
            failure = Failure(spot, code, last_error(job.log, code), log)
            self.failures.append(failure)
        self._table.ended(spot, failure)
        what = self._result(spot) if failure is None else f"FAILED: {failure.error}"
        done = self.total - len(self._todo)
        title = spot.path.replace("/", " ")
        line = f"[{done}/{self.total}] {title}: {what}, {duration(seconds)}"
        self._tell(f"{line}; about {duration(rest)} left" if (rest := self._rest()) else line)

    def _rest(self) -> float:
        known = [value for values in self._seconds.values() for value in values]
        if not known or not self._todo:
            return 0.0
        mean = sum(known) / len(known)
        each = {kind: sum(v) / len(v) for kind, v in self._seconds.items()}
        return sum(each.get(self._kind(one), mean) for one in self._todo.values()) / self._room()


def duration(seconds: float) -> str:
    """Return a time for people.

    >>> duration(42.4), duration(61), duration(8000)
    ('42 s', '1 min', '2 h 13 min')
    """
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"

"""Runs what is still to be run of a study, notes what fails, and can be stopped at any moment."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from medseg_reg.engine.run_directory import RunDirectory, manifest_hash
from medseg_reg.engine.signals import StopRequest
from medseg_reg.errors import EXIT_INTERRUPTED, Interrupted, MedsegError
from medseg_reg.files import read_json, write_text
from medseg_reg.study import worker
from medseg_reg.study.failures import Failure, FailureTable, last_error
from medseg_reg.study.grid import Cell
from medseg_reg.study.pool import Job, Pool
from medseg_reg.study.spec import StudySpec


def is_finished(cell: Cell, study: StudySpec) -> bool:
    """Whether a run is trained, evaluated and, where that is asked for, tested."""
    run = cell.config.run_path
    if not ((run / "weights.safetensors").exists() and (run / "summary.json").exists()):
        return False
    if study.coadaptation is None:
        return True
    table, done = worker.coadaptation_files(run)
    wanted = study.coadaptation.model_dump(mode="json")
    return table.exists() and done.exists() and read_json(done) == wanted


def check_existing(cells: Iterable[Cell]) -> None:
    """Refuse runs that are there already, but with other settings or on other data.

    Raises:
        MedsegError: naming the run.
    """
    hashes: dict[Path, str | None] = {}
    for cell in cells:
        run, store = RunDirectory(cell.config.run_path), cell.config.data.store
        if not (run.path / "config.yaml").exists():
            continue
        run.prepare(cell.config)
        if store not in hashes:
            hashes[store] = _manifest_hash(store)
        there = (run.path / "data.json").exists() and hashes[store] is not None
        if there and run.data_facts().manifest_sha256 != hashes[store]:
            raise MedsegError(
                f"{store}: has changed since {run.path} was trained on it, so the runs of the "
                "study could not be compared. Restore it, or choose another directory with "
                "`run=DIR`."
            )


def _manifest_hash(store: Path) -> str | None:
    from medseg_reg.data.store import SliceStore

    return manifest_hash(SliceStore(store)) if store.exists() else None


def run_cells(
    study: StudySpec, cells: Sequence[Cell], pool: Pool, tell: Callable[[str], None] = print
) -> list[Failure]:
    """Run the cells that are not finished; return those that failed.

    Args:
        study: the study.
        cells: its runs.
        pool: where they run.
        tell: gets a line for each run that has ended.

    Raises:
        Interrupted: a signal asked to stop before all runs had ended; those begun have
            checkpoints.
    """
    todo = [cell for cell in cells if not is_finished(cell, study)]
    by_name = {cell.path: cell for cell in todo}
    failures: list[Failure] = []
    table = FailureTable(study.directory / "failures.csv", todo)
    progress = _Progress(study, len(cells), todo, pool.size)

    def end(job: Job, code: int, seconds: float) -> None:
        cell, failure = by_name[job.name], None
        if code != 0:
            log = job.log.relative_to(study.directory).as_posix()
            failure = Failure(cell, code, last_error(job.log, code), log)
            failures.append(failure)
        table.ended(cell, failure)
        tell(progress.line(cell, failure, seconds))

    try:
        run_jobs((_job(study, cell) for cell in todo), pool, end)
    except Interrupted as stop:
        left = progress.left
        raise Interrupted(
            f"{len(cells) - left} of {len(cells)} runs have ended. {stop} The same command goes on."
        ) from None
    return failures


def _job(study: StudySpec, cell: Cell) -> Job:
    """Write the configuration of a run, and return the job that runs it."""
    config = study.directory / "configs" / f"{cell.path}.yaml"
    write_text(config, cell.config.to_yaml(), durable=False)
    asked = study.coadaptation
    settings = None if asked is None else asked.model_dump(mode="json")
    log = study.directory / "logs" / f"{cell.path}.log"
    return Job(cell.path, tuple(worker.command(config, coadaptation=settings)), log)


def run_jobs(jobs: Iterable[Job], pool: Pool, end: Callable[[Job, int, float], None]) -> bool:
    """Work off jobs; `end` is called with each that has ended, its exit code and its seconds.

    Jobs that end because they were asked to stop are not passed to `end`.

    Returns:
        Whether a signal asked to stop, too late to stop any of them.

    Raises:
        Interrupted: a signal asked to stop before all jobs were done. None is at work any more.
    """
    waiting, began = iter(jobs), {}
    following = next(waiting, None)
    stopping = stopped = False
    with StopRequest() as stop:
        try:
            while began or (following is not None and not stop.requested):
                while following is not None and len(began) < pool.size and not stop.requested:
                    pool.start(following)
                    began[following.name] = time.monotonic()
                    following = next(waiting, None)
                if stop.requested and not stopping:
                    stopping = True
                    pool.stop()
                for job, code in pool.ended():
                    seconds = time.monotonic() - began.pop(job.name)
                    if stop.requested and code in (EXIT_INTERRUPTED, -signal.SIGTERM):
                        stopped = True
                    else:
                        end(job, code, seconds)
        except BaseException as error:
            pool.kill()
            if isinstance(error, KeyboardInterrupt):
                raise Interrupted("Those at work were stopped at once.") from None
            raise
    if stopped or following is not None:
        raise Interrupted("Those at work have stopped after a checkpoint.")
    return stop.requested


class _Progress:
    """Says how far a study is; the time left is that of like runs before."""

    def __init__(self, study: StudySpec, total: int, todo: Sequence[Cell], at_a_time: int) -> None:
        self.total, self.at_a_time = total, at_a_time
        self._todo = {cell.path: (cell.spot.dataset, cell.spot.network) for cell in todo}
        self._seconds: dict[tuple[str, str], list[float]] = {}

    @property
    def left(self) -> int:
        """How many runs have not ended."""
        return len(self._todo)

    def line(self, cell: Cell, failure: Failure | None, seconds: float) -> str:
        """Return what is said when a run has ended."""
        kind = self._todo.pop(cell.path)
        if failure is None:
            self._seconds.setdefault(kind, []).append(seconds)
        what = _score(cell.config.run_path) if failure is None else f"FAILED: {failure.error}"
        done = self.total - self.left
        line = f"[{done}/{self.total}] {cell.title}: {what}, {duration(seconds)}"
        return f"{line}; about {duration(rest)} left" if (rest := self._rest()) else line

    def _rest(self) -> float:
        known = [value for values in self._seconds.values() for value in values]
        if not known or not self._todo:
            return 0.0
        mean = sum(known) / len(known)
        each = {kind: sum(v) / len(v) for kind, v in self._seconds.items()}
        return sum(each.get(kind, mean) for kind in self._todo.values()) / self.at_a_time


def _score(run: Path) -> str:
    try:
        mean: Any = read_json(run / "summary.json")["dice"]["mean"]
    except (MedsegError, KeyError, TypeError, json.JSONDecodeError):
        return "done"
    return "done, no DICE" if mean is None else f"DICE {mean:.4f}"


def duration(seconds: float) -> str:
    """Return a time for people.

    >>> duration(42.4), duration(61), duration(8000)
    ('42 s', '1 min', '2 h 13 min')
    """
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"

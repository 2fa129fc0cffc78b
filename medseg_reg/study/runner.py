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
from medseg_reg.study.failures import Failure
from medseg_reg.study.grid import Cell, Spot, SpotT
from medseg_reg.study.pool import Job, Pool
from medseg_reg.study.progress import Journal
from medseg_reg.study.spec import StudySpec

_NONE_LEFT: Any = object()


def is_finished(cell: Cell[Spot], study: StudySpec) -> bool:
    """Whether a run is trained, evaluated and, where that is asked for, tested."""
    run = cell.config.run_path
    if not ((run / "weights.safetensors").exists() and (run / "summary.json").exists()):
        return False
    if study.coadaptation is None:
        return True
    tables, done = worker.coadaptation_files(run)
    wanted = study.coadaptation.model_dump(mode="json")
    # The settings are written last, but a run of an older version has fewer tables.
    there = all(path.exists() for path in (*tables.values(), done))
    return there and read_json(done) == wanted


def check_existing(cells: Iterable[Cell[Any]]) -> None:
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
    study: StudySpec, cells: Sequence[Cell[Spot]], pool: Pool, tell: Callable[[str], None] = print
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
    runs = {cell.spot: cell.config.run_path for cell in todo}
    journal = Journal(
        study.directory,
        Spot._fields,
        [cell.spot for cell in todo],
        len(cells),
        room=lambda: pool.size,
        result=lambda spot: _score(runs[spot]),
        kind=lambda spot: (spot.dataset, spot.network),
        tell=tell,
    )
    return work_off((_job(study, cell) for cell in todo), pool, journal)


def work_off(jobs: Iterable[Job | None], pool: Pool, journal: Journal[SpotT]) -> list[Failure]:
    """Work off jobs as `run_jobs` does, keep the journal of them, and return what failed.

    Raises:
        Interrupted: a signal asked to stop before all jobs were done; says how many are.
    """
    try:
        run_jobs(jobs, pool, journal.ended)
    except Interrupted as stop:
        done = journal.total - len(journal.left)
        raise Interrupted(
            f"{done} of {journal.total} runs have ended. {stop} The same command goes on."
        ) from None
    return journal.failures


def _job(study: StudySpec, cell: Cell[Spot]) -> Job:
    asked = study.coadaptation
    settings = None if asked is None else asked.model_dump(mode="json")
    return job_of(study.directory, cell, coadaptation=settings)


def job_of(directory: Path, cell: Cell[Any], **settings: Any) -> Job:
    """Write the configuration of a run, and return the job that runs it; see `worker.command`."""
    config = directory / "configs" / f"{cell.path}.yaml"
    write_text(config, cell.config.to_yaml(), durable=False)
    log = directory / "logs" / f"{cell.path}.log"
    return Job(cell.path, tuple(worker.command(config, **settings)), log)


def run_jobs(
    jobs: Iterable[Job | None], pool: Pool, end: Callable[[Job, int, float], None]
) -> None:
    """Work off jobs; `end` is called with each that has ended, its exit code and its seconds.

    Jobs that end because they were asked to stop are not passed to `end`.

    Args:
        jobs: a None among them says that the next is known only when another has ended.
        pool: where they run.
        end: called with each that has ended.

    Raises:
        Interrupted: a signal asked to stop before all jobs were done. None is at work any more.
    """
    waiting, began = iter(jobs), dict[str, float]()
    following = next(waiting, _NONE_LEFT)
    stopping = stopped = False
    with StopRequest() as stop:
        try:
            while began or (following is not _NONE_LEFT and not stop.requested):
                while len(began) < pool.size and not stop.requested:
                    if following is None:
                        following = next(waiting, _NONE_LEFT)
                    if following is None or following is _NONE_LEFT:
                        break
                    pool.start(following)
                    began[following.name] = time.monotonic()
                    following = next(waiting, _NONE_LEFT)
                if stop.requested and not stopping:
                    stopping = True
                    pool.stop()
                for job, code in pool.ended() if began else ():
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
    if stopped or following is not _NONE_LEFT:
        raise Interrupted("Those at work have stopped after a checkpoint.")


def _score(run: Path) -> str:
    try:
        mean: Any = read_json(run / "summary.json")["dice"]["mean"]
    except (MedsegError, KeyError, TypeError, json.JSONDecodeError):
        return "done"
    return "done, no DICE" if mean is None else f"DICE {mean:.4f}"

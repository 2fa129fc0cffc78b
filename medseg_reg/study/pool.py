"""Processes on this machine that work off jobs, a few at a time."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from medseg_reg.errors import MedsegError
from medseg_reg.study import worker

POLL_SECONDS = 0.05
# Stands in a log before each attempt: what lies before it is no reason of this one's end.
ATTEMPT = "== a run begins\n"


@dataclass(frozen=True)
class Job:
    """A command whose output goes to a log.

    Attributes:
        name: identifies the job.
        command: the words of the command.
        log: the file to which its output is added.
    """

    name: str
    command: tuple[str, ...]
    log: Path


class Pool(Protocol):
    """Something that works off jobs: processes here, or machines of a cluster."""

    @property
    def size(self) -> int:
        """How many jobs go on at a time; it may change."""

    def start(self, job: Job) -> None:
        """Begin a job; only where fewer than `size` run."""

    def ended(self) -> list[tuple[Job, int]]:
        """Return the jobs that have ended since, with their exit codes; waits a moment."""

    def stop(self) -> None:
        """Ask all jobs to stop after a checkpoint."""

    def kill(self) -> None:
        """End all jobs at once."""


class LocalPool:
    """Processes of this machine.

    Args:
        size: how many run at a time.
        threads: CPU threads of each.
        gpus: how many GPUs are shared out; with 0 the processes see none.
        lock: a file descriptor that the processes hold too, so that the directory of the study
            stays locked until the last of them has ended.
    """

    def __init__(self, size: int, threads: int, gpus: int = 0, lock: int | None = None) -> None:
        self.size, self.threads, self.lock = size, threads, lock
        devices = visible_gpus(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
        self._free: list[str | None] = [
            devices[slot % gpus] if gpus else None for slot in range(size)
        ]
        self._running: dict[str, tuple[Job, subprocess.Popen[bytes], str | None]] = {}

    def start(self, job: Job) -> None:
        """Begin a job in a free slot."""
        gpu = self._free.pop(0)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("ab") as log:
            log.write(ATTEMPT.encode())
            log.flush()
            process = subprocess.Popen(
                job.command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=worker.environment(self.threads, gpu, os.environ),
                # Ctrl-C in a terminal reaches this process alone, which passes it on once.
                start_new_session=True,
                pass_fds=() if self.lock is None else (self.lock,),
            )
        self._running[job.name] = (job, process, gpu)

    def ended(self) -> list[tuple[Job, int]]:
        """Return the jobs that have ended since, with their exit codes; waits a moment."""
        found = []
        for job, process, gpu in list(self._running.values()):
            if (code := process.poll()) is not None:
                _close(process)
                del self._running[job.name]
                self._free.append(gpu)
                found.append((job, code))
        if not found:
            time.sleep(POLL_SECONDS)
        return found

    def stop(self) -> None:
        """Ask all jobs to stop after a checkpoint."""
        for _, process, _ in self._running.values():
            with suppress(OSError):
                assert process.stdin is not None  # noqa: S101 - a pipe, see start
                process.stdin.write(worker.STOP)
                process.stdin.flush()

    def kill(self) -> None:
        """End all jobs at once."""
        for _, process, _ in self._running.values():
            process.kill()
        for _, process, _ in self._running.values():
            process.wait()
            _close(process)
        self._running.clear()


def _close(process: subprocess.Popen[Any]) -> None:
    with suppress(OSError):
        if process.stdin is not None:
            process.stdin.close()


def visible_gpus(count: int, visible: str | None) -> Sequence[str]:
    """Return the names of the first GPUs of those that this process may use.

    Without a list they are counted up, and a run that gets one that does not exist says so.

    Raises:
        MedsegError: the list has fewer: the others are hidden, or are somebody else's.

    >>> visible_gpus(2, None), visible_gpus(2, "4,5,6")
    (['0', '1'], ['4', '5'])
    """
    if visible is None:
        return [str(number) for number in range(count)]
    listed = [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    if len(listed) < count:
        raise MedsegError(
            f"gpus: {count} are asked for, but CUDA_VISIBLE_DEVICES shows {len(listed)} "
            f"('{visible}'). Ask for {len(listed)}, or show more."
        )
    return listed[:count]

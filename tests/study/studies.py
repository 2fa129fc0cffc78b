"""Tiny studies for tests, and pools for them: one forks, so that a run need not import everything
anew; the jobs of the other only end.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medseg_reg.config import load_config
from medseg_reg.study import worker
from medseg_reg.study.pool import Job
from medseg_reg.study.spec import StudySpec
from tests.training import fork, tiny_config


def tiny_study(store: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Return the content of a study of four runs on a tiny store."""
    base = tiny_config(store, folder / "unused")
    del base["regularization"]["architecture"]  # the methods decide
    content: dict[str, Any] = {
        "name": "tiny",
        "run": str(folder / "study"),
        "datasets": {
            "blobs": {"overrides": {k: base[k] for k in ("data", "network", "regularization")}}
        },
        "methods": {"none": [], "dropout": [{"name": "dropout", "p": 0.3}]},
        "seeds": 2,
        "budget": {"epochs": 1},
        "overrides": {
            "training.accelerator": "cpu",
            "training.checkpoint_minutes": 1e-6,
            "evaluation.resamples": 100,
        },
        "threads": 1,
    }
    return {**content, **changes}


def study_of(store: Path, folder: Path, **changes: Any) -> StudySpec:
    """Return a tiny study."""
    return StudySpec.model_validate(tiny_study(store, folder, **changes))


def run_of(job: Job) -> Path:
    """Return the directory of the run of a job."""
    config = Path(job.command[job.command.index("--config") + 1])
    return load_config(config).run_path


class ForkPool:
    """Runs workers in forked children; some are killed while they are at work.

    Args:
        size: how many run at a time.
        kill: when the job with this number is killed: as soon as its run has a file like this one.
    """

    def __init__(self, size: int = 2, kill: dict[int, str] | None = None) -> None:
        self.size, self._kill, self.started = size, kill or {}, []
        self._children: dict[int, tuple[Job, str | None]] = {}
        self.killed: list[str] = []

    def start(self, job: Job) -> None:
        sign = self._kill.get(len(self.started))
        self.started.append(job.name)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        words = job.command[job.command.index("medseg_reg.study.worker") + 1 :]
        child = fork(worker.main, [word for word in words if word != "--leash"], job.log)
        self._children[child] = (job, sign)

    def ended(self) -> list[tuple[Job, int]]:
        found = []
        for child, (job, sign) in list(self._children.items()):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                del self._children[child]
                found.append((job, os.waitstatus_to_exitcode(status)))
            elif sign is not None and any(run_of(job).glob(sign)):
                # Not yet waited for, so the process is still this one.
                os.kill(child, signal.SIGKILL)
                self.killed.append(job.name)
                self._children[child] = (job, None)
        time.sleep(0.01)
        return found

    def stop(self) -> None:
        for child in self._children:
            os.kill(child, signal.SIGTERM)

    def kill(self) -> None:
        for child in self._children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        self._children.clear()


class MadePool:
    """Jobs that do nothing and end with the codes that are given, else with 0, one at a time.

    Args:
        codes: by name of the job.
        signal_at: while this job ends, the process is asked to stop.
    """

    size = 1

    def __init__(self, codes: Mapping[str, int] | None = None, signal_at: str = "") -> None:
        self.codes, self.signal_at = codes or {}, signal_at
        self.jobs: list[Job] = []

    def start(self, job: Job) -> None:
        self.jobs.append(job)

    def ended(self) -> list[tuple[Job, int]]:
        job = self.jobs.pop()
        if job.name == self.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return [(job, self.codes.get(job.name, 0))]

    def stop(self) -> None:
        pass

    def kill(self) -> None:
        self.jobs.clear()

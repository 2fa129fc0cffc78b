"""Tiny searches for tests, and a pool whose jobs leave scores behind without any training."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from medseg_reg.config import Config, load_config
from medseg_reg.engine.metrics_table import MetricsTable
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.study.pool import Job
from medseg_reg.study.search.spec import SearchSpec
from tests.training import tiny_config, write_config

LR = {"optimizer.lr": {"low": 1e-5, "high": 1.0, "log": True}}


def search_of(store: Path, folder: Path, **changes: Any) -> SearchSpec:
    """Return a search over two learning rates, whose directory is there."""
    file = write_config(folder / "base.yaml", tiny_config(store, folder / "run"))
    content = {
        "name": "tiny",
        "run": str(folder / "search"),
        "config": str(file),
        "overrides": {"training.epochs": 8, "regularization.architecture": []},
        "parameters": {"optimizer.lr": [1e-7, 1e-2]},
        **changes,
    }
    search = SearchSpec.model_validate(content)
    search.directory.mkdir(parents=True, exist_ok=True)
    return search


class ScoringPool:
    """Jobs whose runs have the validation scores that a function says, and end in some order.

    Args:
        scores: returns the `val_dice` of each epoch of a run; None fails it.
        size: how many go on at a time.
        order: returns which of those that go on ends next.
        signal_at: when this job ends, the process is asked to stop.
    """

    def __init__(
        self,
        scores: Callable[[Config], Sequence[float] | None],
        size: int = 1,
        order: Callable[[Sequence[str]], int] = lambda _: 0,
        signal_at: str = "",
    ) -> None:
        self.size, self._scores, self._order, self._signal_at = size, scores, order, signal_at
        self.started: list[str] = []
        self.most = 0
        self._going: dict[str, Job] = {}
        self._stopped = False

    def start(self, job: Job) -> None:
        assert len(self._going) < self.size
        self.started.append(job.name)
        self._going[job.name] = job
        self.most = max(self.most, len(self._going))

    def ended(self) -> list[tuple[Job, int]]:
        name = list(self._going)[self._order(list(self._going))]
        job = self._going.pop(name)
        if self._stopped:
            return [(job, -signal.SIGTERM)]
        if name == self._signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        config = load_config(Path(job.command[job.command.index("--config") + 1]))
        scores = self._scores(config)
        if scores is None:
            job.log.parent.mkdir(parents=True, exist_ok=True)
            job.log.write_text("error: made to fail.\n")
            return [(job, 2)]
        leave_scores(config, scores)
        return [(job, 0)]

    def stop(self) -> None:
        self._stopped = True

    def kill(self) -> None:
        self._going.clear()


def leave_scores(config: Config, scores: Sequence[float]) -> None:
    """Write what a search reads of a finished run."""
    run = RunDirectory(config.run_path)
    run.prepare(config)
    table = MetricsTable(run.path / "metrics.csv")
    for epoch, score in enumerate(scores, 1):
        table.add(epoch, {"val_dice": score, "val_iou": score / 2}, 1.0)
    run.weights.touch()


def nearness(config: Config) -> list[float]:
    """Return a score that is best where the learning rate is 10 ** -2.5."""
    return [1 - abs(math.log10(config.optimizer.lr) + 2.5) / 10]


def by_value(scores: Mapping[float, Sequence[float] | None]) -> Callable[[Config], Any]:
    """Return what gives the scores of each learning rate."""
    return lambda config: scores[config.optimizer.lr]

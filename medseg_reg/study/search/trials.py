"""The trials of a search: which runs they are, and how they are judged."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from medseg_reg.config import Config, parse_config
from medseg_reg.config_file import origins, read_yaml, with_overrides
from medseg_reg.engine.metrics_table import MetricsTable, kept_epoch
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.errors import MedsegError
from medseg_reg.study.grid import Cell, flow
from medseg_reg.study.search.spec import SearchSpec


class TrialSpot(NamedTuple):
    """Where a run stands in a search.

    Attributes:
        trial: its number.
        seed: of the training.
    """

    trial: int
    seed: int

    @property
    def path(self) -> str:
        """Where the run lies below `runs/`, with slashes; its name too."""
        return f"trial{self.trial:04d}/seed{self.seed}"


@dataclass(frozen=True)
class Trial:
    """One set of parameters.

    Attributes:
        number: the first is 0.
        parameters: the values of the keys that are searched.
        cells: its runs, one a seed.
    """

    number: int
    parameters: dict[str, Any]
    cells: tuple[Cell[TrialSpot], ...]


def make_trial(search: SearchSpec, number: int, parameters: dict[str, Any]) -> Trial:
    """Return the runs of a trial; an error names it."""
    cells: list[Cell[TrialSpot]] = []
    for seed in search.seeds:
        spot = TrialSpot(number, seed)
        own = {"training.progress": False, "seed": seed, "run": run_of(search, spot).as_posix()}
        try:
            cells.append(Cell(spot, configured(search, parameters, own)))
        except MedsegError as error:
            raise MedsegError(f"trial {number}: {error}") from None
    return Trial(number, parameters, tuple(cells))


def configured(search: SearchSpec, parameters: dict[str, Any], own: dict[str, Any]) -> Config:
    """Return the configuration of a run with some parameters and what is the run's own.

    Raises:
        MedsegError: a key or value is wrong, or the epoch whose weights are kept has no score.
    """
    content, lines = read_yaml(search.config)
    changed = {**search.overrides, **parameters, **own}
    overrides = [f"{key}={flow(value)}" for key, value in changed.items()]
    places = origins(search.config, lines, overrides)
    config = parse_config(with_overrides(content, overrides), str(search.config), places)
    every, epochs = config.training.validate_every, config.training.epochs
    if config.regularization.optimization.select == "last" and epochs % every:
        raise MedsegError(
            f"{search.config}: regularization.optimization.select is 'last', but with "
            f"training.validate_every {every} the last of {epochs} epochs is not validated: it "
            f"has no score. Let training.epochs be a multiple of {every}."
        )
    return config


def run_of(search: SearchSpec, spot: TrialSpot) -> Path:
    """Return the run directory of a spot."""
    return search.directory / "runs" / spot.path


def is_trained(search: SearchSpec, spot: TrialSpot) -> bool:
    """Whether the run of a spot is trained; more is not asked of it."""
    return RunDirectory(run_of(search, spot)).finished


def trial_numbers(search: SearchSpec) -> range:
    """Return the numbers of all trials."""
    if search.method != "grid":
        return range(search.trials)
    return range(math.prod(len(values) for values in search.lists.values()))


def grid_trials(search: SearchSpec) -> Iterator[Trial]:
    """Go through all combinations of the lists."""
    for number, values in enumerate(itertools.product(*search.lists.values())):
        yield make_trial(search, number, dict(zip(search.parameters, values, strict=True)))


def short_keys(keys: Collection[str]) -> dict[str, str]:
    """Return keys without the groups that all of them lie in, to be shown; of one alone, all of it.

    >>> short_keys(["regularization.architecture.0.p", "regularization.architecture.1.p"])
    {'regularization.architecture.0.p': '0.p', 'regularization.architecture.1.p': '1.p'}
    >>> short_keys(["optimizer.lr"])
    {'optimizer.lr': 'optimizer.lr'}
    """
    if len(keys) == 1:
        return {key: key for key in keys}
    groups = [key.split(".")[:-1] for key in keys]
    levels = [len(set(level)) == 1 for level in zip(*groups, strict=False)]
    same = [*levels, False].index(False)
    return {key: ".".join(key.split(".")[same:]) for key in keys}


def score_of(cells: Sequence[Cell[TrialSpot]], monitor: str) -> float:
    """Return the mean over the runs of a trial of the validation score of the weights kept.

    It is NaN where a run is not trained, or its score is not a number.
    """
    scores = []
    for cell in cells:
        run = RunDirectory(cell.config.run_path)
        if not run.finished:
            return math.nan
        rows = MetricsTable.read(run.path / "metrics.csv")
        row = kept_epoch(rows, cell.config.regularization.optimization.select)
        scores.append(row.get(monitor, math.nan))
    return sum(scores) / len(scores)

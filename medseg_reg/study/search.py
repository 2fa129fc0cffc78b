"""Search for rates and other parameters, on the validation part alone.

    python -m medseg_reg.study.search --config configs/searches/demo.yaml

Each trial trains with every seed and is judged by the mean of the best validation scores. No case
of the test part is predicted or scored, so a study with the parameters that were found is still
an honest one. Trials lie in `trials.csv`, the best configuration in `best.yaml`. The same command
again goes on where it was stopped: finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import BeforeValidator, Field, model_validator

from medseg_reg.config import Config, parse_config
from medseg_reg.config_base import Closed, Positive
from medseg_reg.config_file import origins, read_yaml, with_overrides
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.errors import Interrupted, MedsegError, run_main
from medseg_reg.files import replacing, require_writable, write_text
from medseg_reg.study import worker
from medseg_reg.study.failures import last_error
from medseg_reg.study.grid import flow
from medseg_reg.study.lock import locked
from medseg_reg.study.pool import Job, LocalPool, Pool
from medseg_reg.study.runner import run_jobs
from medseg_reg.study.spec import ManyRuns, Seed, as_seeds, read_spec


class RangeSpec(Closed):
    """The values between two numbers, for `optuna`."""

    low: float
    high: float
    log: bool = False
    integer: bool = False

    @model_validator(mode="after")
    def _low_is_lower(self) -> RangeSpec:
        if self.low >= self.high or (self.log and self.low <= 0):
            raise ValueError("low must be below high, and above 0 where log is on")
        return self


def _as_choice(value: Any) -> Any:
    return {"values": value} if isinstance(value, list) else value


class ChoiceSpec(Closed):
    """A list of values."""

    values: tuple[Any, ...] = Field(min_length=1)


Parameter = Annotated[ChoiceSpec | RangeSpec, BeforeValidator(_as_choice)]


class SearchSpec(ManyRuns):
    """A search. `{name}` in `run` stands for its name.

    Attributes:
        config: the configuration of a run, as in configs/.
        overrides: what is changed in it for all trials; not `seed` and `run`.
        parameters: keys of a run's configuration, each with a list of values or a range.
        method: `grid` tries all combinations of the lists; `optuna` (tree-structured Parzen
            estimator; Bergstra et al., NeurIPS 2011) draws `trials` of them.
        trials: how many are drawn by `optuna`; refused beside `grid`, as the next two.
        together: how many trials `optuna` draws before it looks at their scores.
        sampler_seed: of the draws of `optuna`.
        monitor: the validation score.
        seeds: of the trainings of each trial.

    The other attributes are those of `ManyRuns`.
    """

    run: str = "runs/searches/{name}"
    config: Path
    overrides: dict[str, Any] = Field(default_factory=dict)
    parameters: dict[str, Parameter] = Field(min_length=1)
    method: Literal["grid", "optuna"] = "grid"
    trials: Positive = 20
    together: Positive = 1
    sampler_seed: Seed = 0
    monitor: Literal["val_dice", "val_iou"] = "val_dice"
    seeds: Annotated[tuple[Seed, ...], BeforeValidator(as_seeds)] = Field((0,), min_length=1)

    @model_validator(mode="after")
    def _a_grid_has_lists(self) -> SearchSpec:
        ranges = [key for key, one in self.parameters.items() if isinstance(one, RangeSpec)]
        if self.method == "grid" and ranges:
            raise ValueError(f"{ranges[0]} is a range: a grid needs lists, or set method: optuna")
        return self

    @model_validator(mode="after")
    def _no_key_does_nothing(self) -> SearchSpec:
        for place in ("parameters", "overrides"):
            for key, hint in (("seed", "List them in 'seeds'"), ("run", "Set 'run' of the search")):
                if key in getattr(self, place):
                    raise ValueError(
                        f"{place}: '{key}' is set for each run by the search itself. {hint}"
                    )
        for key in ("trials", "together", "sampler_seed"):
            if self.method == "grid" and key in self.model_fields_set:
                raise ValueError(
                    f"{key} does nothing with method: grid, which tries all combinations. "
                    "Leave it out, or set method: optuna"
                )
        return self


@dataclass(frozen=True)
class Trial:
    """One set of parameters, and its runs by the names of their jobs."""

    number: int
    parameters: dict[str, Any]
    runs: dict[str, Config]


def load_search(path: Path, overrides: Sequence[str] = ()) -> SearchSpec:
    """Read the file of a search; errors name the file, the line and the key."""
    return read_spec(SearchSpec, "search", path, overrides)


def make_trial(search: SearchSpec, number: int, parameters: dict[str, Any]) -> Trial:
    """Return the runs of a trial; an error names it."""
    content, lines = read_yaml(search.config)
    runs = {}
    for seed in search.seeds:
        name = f"trial{number:04d}/seed{seed}"
        changed = {**search.overrides, "training.progress": False, **parameters, "seed": seed}
        changed["run"] = (search.directory / "runs" / name).as_posix()
        overrides = [f"{key}={flow(value)}" for key, value in changed.items()]
        try:
            places = origins(search.config, lines, overrides)
            runs[name] = parse_config(with_overrides(content, overrides), name, places)
        except MedsegError as error:
            raise MedsegError(f"trial {number}: {error}") from None
    return Trial(number, parameters, runs)


def grid_trials(search: SearchSpec) -> Iterator[list[Trial]]:
    """Return all combinations of the lists, as one round."""
    lists = [one.values for one in search.parameters.values() if isinstance(one, ChoiceSpec)]
    yield [
        make_trial(search, number, dict(zip(search.parameters, values, strict=True)))
        for number, values in enumerate(itertools.product(*lists))
    ]


def optuna_trials(search: SearchSpec, scores: dict[int, float]) -> Iterator[list[Trial]]:
    """Draw trials in rounds; `scores` must have those of a round before the next is drawn.

    The draws depend on the seed and the scores before, so a search that goes on draws the same
    trials again and finds their runs finished.
    """
    try:
        import optuna
    except ImportError:
        raise MedsegError(
            "method: optuna is not installed. Install it with `pip install 'medseg-reg[search]'`, "
            "or take method: grid."
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=search.sampler_seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for first in range(0, search.trials, search.together):
        asked, trials = [], []
        for number in range(first, min(first + search.together, search.trials)):
            one = study.ask()
            drawn = {key: _draw(one, key, spec) for key, spec in search.parameters.items()}
            asked.append(one)
            trials.append(make_trial(search, number, drawn))
        yield trials
        for one, trial in zip(asked, trials, strict=True):
            score = scores.get(trial.number)
            if score is None or score != score:
                study.tell(one, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(one, score)


def _draw(trial: Any, key: str, spec: ChoiceSpec | RangeSpec) -> Any:
    if isinstance(spec, ChoiceSpec):
        # By their numbers: Optuna takes no lists and mappings as values.
        return spec.values[trial.suggest_categorical(key, list(range(len(spec.values))))]
    if spec.integer:
        return trial.suggest_int(key, int(spec.low), int(spec.high), log=spec.log)
    return trial.suggest_float(key, spec.low, spec.high, log=spec.log)


def run_search(search: SearchSpec, pool: Pool) -> pd.DataFrame:
    """Run all trials, and return them with their scores, the best first.

    Raises:
        Interrupted: a signal asked to stop before the last trial had ended; those begun have
            checkpoints.
    """
    scores: dict[int, float] = {}
    done: list[Trial] = []
    rounds = grid_trials(search) if search.method == "grid" else optuna_trials(search, scores)
    table, asked_to_stop = pd.DataFrame(), False
    for trials in rounds:
        if asked_to_stop:
            raise Interrupted(f"{len(done)} trials have ended. The same command goes on.")
        asked_to_stop = _run_round(search, trials, pool)
        for trial in trials:
            scores[trial.number] = score_of(trial, search.monitor)
            print(f"trial {trial.number}: {trial.parameters}: {scores[trial.number]:.4f}")
        done += trials
        table = _table(done, scores, search.monitor)
        with replacing(search.directory / "trials.csv") as temporary:
            table.to_csv(temporary, index=False)
    if not table[search.monitor].notna().any():
        raise MedsegError(f"{search.directory}: no trial has a score. See logs/ there.")
    best = next(trial for trial in done if trial.number == table["trial"].iloc[0])
    config = next(iter(best.runs.values()))
    found = config.model_copy(update={"run": "runs/{name}/seed{seed}"})
    write_text(search.directory / "best.yaml", found.to_yaml())
    return table


def _run_round(search: SearchSpec, trials: Sequence[Trial], pool: Pool) -> bool:
    """Run trials that do not wait for each other; return whether a signal came at the very end."""
    configs = {name: config for trial in trials for name, config in trial.runs.items()}
    jobs = []
    for name, config in configs.items():
        run = RunDirectory(config.run_path)
        if (run.path / "config.yaml").exists():
            run.prepare(config)  # refuses a run with other settings
        if run.finished:
            continue
        path = search.directory / "configs" / f"{name}.yaml"
        write_text(path, config.to_yaml(), durable=False)
        log = search.directory / "logs" / f"{name}.log"
        jobs.append(Job(name, tuple(worker.command(path, train_only=True)), log))

    def end(job: Job, code: int, seconds: float) -> None:
        if code != 0:
            print(f"{job.name} FAILED: {last_error(job.log, code)} (see {job.log})", flush=True)

    return run_jobs(jobs, pool, end)


def score_of(trial: Trial, monitor: str) -> float:
    """Return the mean over the seeds of the best validation score; NaN where a run failed."""
    best = []
    for config in trial.runs.values():
        run = RunDirectory(config.run_path)
        if not run.finished:
            return float("nan")
        best.append(float(pd.read_csv(run.path / "metrics.csv")[monitor].max()))
    return sum(best) / len(best)


def _table(trials: Sequence[Trial], scores: dict[int, float], monitor: str) -> pd.DataFrame:
    rows = [{"trial": t.number, **t.parameters, monitor: scores[t.number]} for t in trials]
    return pd.DataFrame(rows).sort_values([monitor, "trial"], ascending=[False, True])


def main(arguments: Sequence[str]) -> None:
    """Parse the command line and search."""
    parser = argparse.ArgumentParser(
        prog="python -m medseg_reg.study.search", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--config", type=Path, required=True, help="the YAML file of a search")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parsed = parser.parse_intermixed_args(arguments)
    search = load_search(parsed.config, parsed.overrides)
    if search.method == "grid":
        next(grid_trials(search))  # all that can be wrong, before anything runs
    require_writable(search.directory)
    with locked(search.directory) as lock:
        pool = LocalPool(search.at_a_time, search.threads, search.gpus, lock)
        table = run_search(search, pool)
    print(table.head(10).to_string(index=False))
    print(f"best {search.directory / 'best.yaml'} (by the validation part; test it once)")


if __name__ == "__main__":
    run_main(main)

"""Search for rates and other parameters, on the validation part alone.

    python -m medseg_reg.study.search --config configs/searches/demo.yaml

Each trial trains with every seed and is judged by the mean of the validation scores of the weights
that its runs keep. No case of the test part is predicted or scored, so a study with what was found
is still an honest one. `trials.csv` has all trials, `best.yaml` the best configuration, and
`method.yaml` the best method, for a study.

The same command again goes on where it was stopped or killed, and tries failed runs again.
Exit codes: 0 done, 1 some runs have failed, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence

import pandas as pd

from medseg_reg.errors import run_main
from medseg_reg.files import require_writable
from medseg_reg.study.failures import Failure
from medseg_reg.study.grid import flow, require_stores
from medseg_reg.study.launch import (
    add_arguments,
    exit_where_failed,
    make_phantoms,
    make_pool,
    tell,
)
from medseg_reg.study.lock import locked
from medseg_reg.study.pool import Job, Pool
from medseg_reg.study.progress import Journal
from medseg_reg.study.runner import check_existing, job_of, work_off
from medseg_reg.study.search.checks import check_networks, check_values, first_values
from medseg_reg.study.search.draws import Draws
from medseg_reg.study.search.found import write_best, write_trials
from medseg_reg.study.search.sampled import Sampled
from medseg_reg.study.search.spec import SearchSpec, load_search
from medseg_reg.study.search.trials import (
    Trial,
    TrialSpot,
    grid_trials,
    is_trained,
    make_trial,
    score_of,
    short_keys,
    trial_numbers,
)


def main(arguments: Sequence[str]) -> None:
    """Parse the command line and search."""
    parser = argparse.ArgumentParser(
        prog="python -m medseg_reg.study.search", description=(__doc__ or "").split("\n")[0]
    )
    add_arguments(parser, "configs/searches/")
    parsed = parser.parse_intermixed_args(arguments)
    search = load_search(parsed.config, parsed.overrides)
    table, failures = search_in_directory(search, parsed.ray)
    print(table.head(10).rename(columns=short_keys(search.parameters)).to_string(index=False))
    if table[search.monitor].notna().any():
        best = search.directory / "best.yaml"
        print(f"best {best} (by the validation part; test it once)")
        print(f"as a method of a study {best.with_name('method.yaml')}")
    else:
        print("no trial has a score, so there is no best one")
    exit_where_failed(failures, search.directory)


def search_in_directory(
    search: SearchSpec, ray: str | None = None
) -> tuple[pd.DataFrame, list[Failure]]:
    """Check what can be checked, and search with the directory locked; see `run_search`."""
    if search.method == "grid":
        list(grid_trials(search))  # all that can be wrong, before anything runs
    else:
        check_values(search)
    require_writable(search.directory)
    with locked(search.directory) as lock:
        return run_search(search, make_pool(search, ray, lock))


def run_search(
    search: SearchSpec, pool: Pool, say: Callable[[str], None] = tell
) -> tuple[pd.DataFrame, list[Failure]]:
    """Run what is not finished of all trials, and write what was found.

    Args:
        search: the search; its directory is there.
        pool: where the runs go.
        say: gets a line for each run that has ended.

    Returns:
        The trials with their scores, the best first, and the runs that failed.

    Raises:
        Interrupted: a signal asked to stop before all runs had ended; those begun have
            checkpoints.
        MedsegError: runs that are there have other settings, or data are missing.
    """
    spots = [TrialSpot(n, seed) for n in trial_numbers(search) for seed in search.seeds]
    todo = [spot for spot in spots if not is_trained(search, spot)]
    draws = _draws(search)
    known = list(grid_trials(search)) if draws is None else draws.known()
    check_existing(cell for trial in known for cell in trial.cells)
    made = {trial.number: trial for trial in known}
    at_most = len(spots) if draws is None else search.trials_at_a_time * len(search.seeds)
    journal = Journal(
        search.directory,
        TrialSpot._fields,
        todo,
        len(spots),
        room=lambda: min(pool.size, at_most),
        result=lambda spot: _told(made[spot.trial], spot, search.monitor),
        tell=say,
    )

    def has_ended(trial: Trial) -> bool:
        return not any(cell.path in journal.left for cell in trial.cells)

    def score(trial: Trial) -> float:
        return score_of(trial.cells, search.monitor)

    trials = known if draws is None else draws.trials(has_ended, score)
    say(f"search {search.directory}: {len(spots)} runs, {len(todo)} to do")
    if todo:
        _prepare(search)
    try:
        failures = work_off(_jobs(search, trials, made), pool, journal)
    finally:
        scores = {number: score(trial) for number, trial in made.items()}  # NaN for what is left
        table = write_trials(search, list(made.values()), scores)
    if table[search.monitor].notna().any():
        best = int(table["trial"].iloc[0])
        write_best(search, made[best], scores[best])
    return table, failures


def _draws(search: SearchSpec) -> Draws | Sampled | None:
    """Return what draws the trials; None for a grid."""
    if search.method == "grid":
        return None
    return Draws(search) if search.method == "optuna" else Sampled(search)


def _prepare(search: SearchSpec) -> None:
    """See that the data are there, which all trials share, and that the networks can be built."""
    cells = make_trial(search, 0, first_values(search)).cells[:1]
    require_stores(cells)
    make_phantoms(cells)
    check_networks(search)


def _told(trial: Trial, spot: TrialSpot, monitor: str) -> str:
    """Return in words what became of a run."""
    names = short_keys(trial.parameters)
    found = ", ".join(f"{names[key]}: {flow(value)}" for key, value in trial.parameters.items())
    cells = [cell for cell in trial.cells if cell.spot == spot]
    return f"{found}: {monitor} {score_of(cells, monitor):.4f}"


def _jobs(
    search: SearchSpec, trials: Iterable[Trial | None], made: dict[int, Trial]
) -> Iterator[Job | None]:
    """Go through the jobs of trials, and note the trials."""
    for trial in trials:
        if trial is None:
            yield None
            continue
        made[trial.number] = trial
        for cell in trial.cells:
            if not is_trained(search, cell.spot):
                yield job_of(search.directory, cell, train_only=True)


if __name__ == "__main__":
    run_main(main)

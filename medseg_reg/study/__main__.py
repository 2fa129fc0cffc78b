"""Run a study: every method on every data set with every seed, one table and one report.

    python -m medseg_reg.study --config configs/studies/demo.yaml
    python -m medseg_reg.study --config configs/studies/demo.yaml seeds=5 workers=4 --dry-run

The same command again goes on where it was stopped or killed, and tries failed runs again.
Exit codes: 0 done, 1 some runs have failed, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from medseg_reg.errors import Interrupted, MedsegError, run_main
from medseg_reg.files import require_writable, write_text
from medseg_reg.study.failures import Failure
from medseg_reg.study.grid import Cell, Spot, expand, require_splits, require_stores
from medseg_reg.study.launch import (
    add_arguments,
    exit_where_failed,
    make_phantoms,
    make_pool,
    tell,
)
from medseg_reg.study.lock import locked
from medseg_reg.study.results import write_results
from medseg_reg.study.runner import check_existing, is_finished, run_cells
from medseg_reg.study.sources import require_sources
from medseg_reg.study.spec import StudySpec, load_study


def main(arguments: Sequence[str]) -> None:
    """Parse the command line, run the study, write tables and report."""
    parser = argparse.ArgumentParser(
        prog="python -m medseg_reg.study", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--dry-run", action="store_true", help="list the runs, and stop")
    parser.add_argument(
        "--only", choices=("results", "report"), help="run nothing; make this from what is there"
    )
    add_arguments(parser, "configs/studies/")
    parsed = parser.parse_intermixed_args(arguments)
    study = load_study(parsed.config, parsed.overrides)
    if parsed.only == "report":
        report(study)  # which needs the runs alone, not the files that they came from
        return
    cells = expand(study)
    if parsed.dry_run:
        print(listed(study, cells))
    elif parsed.only == "results":
        print(f"results {write_results(study, cells)}")
    else:
        exit_where_failed(run(study, cells, parsed.ray), study.directory)


def run(study: StudySpec, cells: Sequence[Cell[Spot]], ray: str | None = None) -> list[Failure]:
    """Run what is not finished, and write the tables and the report; return what failed."""
    todo = [cell for cell in cells if not is_finished(cell, study)]
    require_stores(todo)
    require_writable(study.directory)
    with locked(study.directory) as lock:
        make_phantoms(todo)
        require_splits(todo)
        require_sources(todo)
        if study.equal_rates:
            cells = equal(study, cells, study.equal_rates)
        check_existing(cells)
        write_text(study.directory / "study.yaml", study.to_yaml())
        print(f"study {study.directory}: {len(cells)} runs, {len(todo)} to do", flush=True)
        try:
            failures = run_cells(study, cells, make_pool(study, ray, lock), tell)
        except Interrupted:
            write_results(study, cells)
            raise
        print(f"results {write_results(study, cells)}")
        try:
            report(study)
        except MedsegError as error:
            if not failures:
                raise
            print(f"no report: {error}")  # as where no run of the baseline is finished
    return failures


def equal(study: StudySpec, cells: Sequence[Cell[Spot]], rate: float) -> list[Cell[Spot]]:
    """Return the runs with a `p` for each layer at which all drop the same share."""
    from medseg_reg.study.equal_rates import with_equal_rates  # seconds to import

    return with_equal_rates(cells, rate, study.directory / "equal_rates.json")


def report(study: StudySpec) -> None:
    """Write the report from the tables."""
    from medseg_reg.study.report import write_report  # seconds to import

    print(f"report {write_report(study.directory)}")


def listed(study: StudySpec, cells: Sequence[Cell[Spot]]) -> str:
    """Return the runs of a study, one a line, and whether they are finished."""
    lines = [f"{'done' if is_finished(c, study) else 'to do':6}{c.path}" for c in cells]
    done = sum(line.startswith("done") for line in lines)
    return "\n".join([*lines, f"{len(lines)} runs, {done} done, {study.at_a_time} at a time"])


def command() -> None:
    """Run as the installed command `medseg-study`."""
    run_main(main)


if __name__ == "__main__":
    command()

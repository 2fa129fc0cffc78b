"""Compare the samplers of a search at equal budgets: controller, random search and evolution.

    python -m medseg_reg.study.compare_searches --config configs/searches/autodropout_small.yaml
    python -m medseg_reg.study.compare_searches --config ... --sampler-seeds 3

Runs the search with each method, each in a directory of its own below that of the search, with the
same trials, rounds and seeds of runs, and draws the best reward so far against the number of
trials: `best_so_far.png`, `.svg` and, with every trial, `.csv`. One sampler seed says little: the
order of three methods that differ by less than the lines of one method do is chance. The same
command again goes on where it was stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from medseg_reg.errors import run_main
from medseg_reg.study.launch import add_arguments, exit_where_failed
from medseg_reg.study.samplers import SAMPLERS
from medseg_reg.study.search.__main__ import search_in_directory
from medseg_reg.study.search.spec import SearchSpec, load_search


def searches_of(path: Path, count: int = 1, overrides: Sequence[str] = ()) -> list[SearchSpec]:
    """Return one search for each method and sampler seed, each with its own directory.

    Args:
        path: the file of a search.
        count: how many sampler seeds, from that of the file on.
        overrides: for all.
    """
    search = load_search(path, overrides)
    base, first = search.directory, search.sampler_seed
    return [
        load_search(
            path,
            [
                *overrides,
                f"method={method}",
                f"sampler_seed={seed}",
                f"run={(base / method / f'sampler{seed}').as_posix()}",
            ],
        )
        for method in SAMPLERS
        for seed in range(first, first + count)
    ]


def in_order(search: SearchSpec, table: pd.DataFrame) -> pd.DataFrame:
    """Return the trials of a search as they came, with the best reward so far.

    A failure has no reward, and leaves the best as it was.
    """
    found = table.sort_values("trial").rename(columns={search.monitor: "reward"})
    found["best"] = found["reward"].cummax().ffill()
    found.insert(0, "method", search.method)
    found.insert(1, "sampler_seed", search.sampler_seed)
    return found.reset_index(drop=True)


def main(arguments: Sequence[str]) -> None:
    """Parse the command line, run the searches and draw them."""
    parser = argparse.ArgumentParser(
        prog="python -m medseg_reg.study.compare_searches",
        description=(__doc__ or "").split("\n")[0],
    )
    add_arguments(parser, "configs/searches/")
    parser.add_argument(
        "--sampler-seeds", type=int, default=1, help="how many searches with each method"
    )
    parsed = parser.parse_intermixed_args(arguments)
    if parsed.sampler_seeds < 1:
        parser.error(f"--sampler-seeds is at least 1, not {parsed.sampler_seeds}")
    tables, failures = [], []
    for one in searches_of(parsed.config, parsed.sampler_seeds, parsed.overrides):
        print(f"== {one.method}, sampler seed {one.sampler_seed}", flush=True)
        table, failed = search_in_directory(one, parsed.ray)
        tables.append(in_order(one, table))
        failures += failed
    search = load_search(parsed.config, parsed.overrides)
    draw(pd.concat(tables, ignore_index=True), search)
    exit_where_failed(failures, search.directory)


def draw(table: pd.DataFrame, search: SearchSpec) -> None:
    """Write the figure of searches side by side, and print what each came to."""
    from medseg_reg.study.report.drawing import write_figures
    from medseg_reg.study.report.search_figure import best_so_far

    write_figures([best_so_far(table, search.monitor)], search.directory)
    print(table.groupby(["method", "sampler_seed"], sort=False)["reward"].agg(["mean", "max"]))
    print(f"figure {search.directory / 'best_so_far.png'} (by the validation part)")


if __name__ == "__main__":
    run_main(main)

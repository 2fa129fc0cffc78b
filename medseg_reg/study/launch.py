"""What the commands of a study and of a search have in common: their options, pool and end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from medseg_reg.study.failures import Failure
from medseg_reg.study.grid import Cell
from medseg_reg.study.pool import LocalPool, Pool
from medseg_reg.study.spec import ManyRuns

EXIT_RUNS_FAILED = 1


def add_arguments(parser: argparse.ArgumentParser, folder: str) -> None:
    """Add the options of both; `folder` has files as they are wanted."""
    parser.add_argument("--config", type=Path, required=True, help=f"as in {folder}")
    parser.add_argument("--ray", metavar="ADDRESS", help="run on a Ray cluster, such as `auto`")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="changes the file, as `workers=2`"
    )


def make_pool(runs: ManyRuns, ray: str | None, lock: int) -> Pool:
    """Return where runs go: processes here, or a cluster."""
    if ray is None:
        return LocalPool(runs.at_a_time, runs.threads, runs.gpus, lock)
    from medseg_reg.study.ray_backend import RayPool

    return RayPool(ray, runs)


def make_phantoms(cells: Iterable[Cell[Any]]) -> None:
    """Generate the phantoms of runs once, before several processes need them."""
    configs = {cell.config.data.store: cell.config for cell in cells if cell.config.data.phantom}
    if configs:
        from medseg_reg.train import make_phantom

        for config in configs.values():
            make_phantom(config)


def tell(line: str) -> None:
    """Print a line at once, also where the output is no terminal."""
    print(line, flush=True)


def exit_where_failed(failures: Sequence[Failure], directory: Path) -> None:
    """End with exit code 1 where runs have failed, and say where that is written."""
    if failures:
        runs = "1 run has" if len(failures) == 1 else f"{len(failures)} runs have"
        print(f"{runs} failed: see {directory / 'failures.csv'}")
        sys.exit(EXIT_RUNS_FAILED)

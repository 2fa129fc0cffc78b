"""Score a finished run, per volume, per slice and per class.

    python -m medseg_reg.evaluate --run runs/demo
    python -m medseg_reg.evaluate --run runs/demo --part val

Writes evaluation/per_case.csv, evaluation/per_slice.csv, summary.json, panels.png and curves.png
into the run directory; another part than the test part gets a folder below evaluation/.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from medseg_reg.errors import run_main


def main(arguments: Sequence[str]) -> None:
    """Parse the command line and evaluate."""
    parser = argparse.ArgumentParser(
        prog="python -m medseg_reg.evaluate", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--run", type=Path, required=True, help="a run directory")
    parser.add_argument("--part", choices=("test", "val", "train"), default="test")
    parser.add_argument("--store", type=Path, help="the slice store, where it has moved")
    parsed = parser.parse_args(arguments)
    # Imported here: they take seconds, and --help needs none of them.
    from medseg_reg.engine.run_directory import RunDirectory
    from medseg_reg.inference.evaluation import evaluate, headline

    run = RunDirectory(parsed.run)
    print(headline(run, evaluate(run, parsed.part, parsed.store)))


def command() -> None:
    """Run as the installed command `medseg-evaluate`."""
    run_main(main)


if __name__ == "__main__":
    command()

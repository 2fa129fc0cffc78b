"""Score a cascade of two runs, with thresholds that keep budgets on the validation part.

    python -m medseg_reg.cascade --run runs/fine --first runs/coarse
    python -m medseg_reg.cascade --run runs/fine --first runs/coarse --budgets 0.5 0.75 --part val

Writes evaluation/cascade.csv into the run directory of --run. `medseg_reg.predict --first` takes
the thresholds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from medseg_reg.errors import run_main


def main(arguments: Sequence[str]) -> None:
    """Parse the command line and score."""
    parser = argparse.ArgumentParser(
        prog="python -m medseg_reg.cascade", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--run", type=Path, required=True, help="the finer run")
    parser.add_argument("--first", type=Path, required=True, help="the cheap run")
    parser.add_argument(
        "--budgets", type=float, nargs="+", metavar="SHARE",
        help="of the multiply-adds of --run on all slices (default: five, from the least to all)",
    )  # fmt: skip
    parser.add_argument("--part", choices=("test", "val", "train"), default="test")
    parsed = parser.parse_args(arguments)
    # Imported here: they take seconds, and --help needs none of them.
    from medseg_reg.engine.run_directory import RunDirectory
    from medseg_reg.inference.cascade_curve import cascade_curve

    run, first = RunDirectory(parsed.run), RunDirectory(parsed.first)
    table = cascade_curve(run, first, parsed.budgets, parsed.part)
    # A column of None alone, as of the interval of two patients, would be printed as such.
    table = table.astype({"low": float, "high": float})
    print(table.to_string(index=False, float_format="%.6f", na_rep="-"))


if __name__ == "__main__":
    run_main(main)

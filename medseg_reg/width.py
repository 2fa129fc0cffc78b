"""Score a run that was trained with Structural Dropout at smaller widths, without training again.

    python -m medseg_reg.width --run runs/structural
    python -m medseg_reg.width --run runs/structural --widths 0.25 0.5 1 --part val

Writes evaluation/width.csv and evaluation/width.png into the run directory.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from medseg_reg.errors import run_main


def main(arguments: Sequence[str]) -> None:
    """Parse the command line and score."""
    parser = argparse.ArgumentParser(
        prog="python -m medseg_reg.width", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--run", type=Path, required=True, help="a run directory")
    parser.add_argument("--widths", type=float, nargs="+", metavar="SHARE")
    parser.add_argument("--part", choices=("test", "val", "train"), default="test")
    parsed = parser.parse_args(arguments)
    # Imported here: they take seconds, and --help needs none of them.
    from medseg_reg.engine.run_directory import RunDirectory
    from medseg_reg.inference.width import WIDTHS, width_curve

    table = width_curve(RunDirectory(parsed.run), parsed.widths or WIDTHS, parsed.part)
    # A column of None alone, as of the interval of two patients, would be printed as such.
    table = table.astype({"low": float, "high": float})
    print(table.to_string(index=False, float_format="%.4f", na_rep="-"))


if __name__ == "__main__":
    run_main(main)

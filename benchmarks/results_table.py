"""Compare finished runs of several methods over seeds, as a Markdown table.

    python benchmarks/results_table.py "U-Net=runs/x/plain-*" "Heuristic=runs/x/heuristic-*"

Each argument is a name and a pattern of run directories, one a seed. A patient's score is the
mean over classes and seeds; means and 95 % bootstrap intervals are over patients. The last column
is the difference to the first method, patient by patient.
"""

from __future__ import annotations

import glob
import sys
from pathlib import Path

import pandas as pd

from medseg_reg.files import read_json
from medseg_reg.metrics import Interval, bootstrap_interval


def scores(pattern: str) -> tuple[pd.DataFrame, set[str], int]:
    """Return Dice and IoU of each patient (mean over classes and seeds), split hashes, seeds."""
    runs = [Path(path) for path in sorted(glob.glob(pattern))]
    if not runs:
        raise SystemExit(f"no run matches {pattern}")
    tables = [pd.read_csv(run / "evaluation" / "per_case.csv") for run in runs]
    summaries = [read_json(run / "summary.json") for run in runs]
    for run, summary in zip(runs, summaries, strict=True):
        if not summary.get("valid_for_reporting", True):
            raise SystemExit(f"{run}: its scores are invalid for reporting; see its summary.json")
    hashes = {summary["splits_hash"] for summary in summaries}
    return pd.concat(tables).groupby("group")[["dice", "iou"]].mean(), hashes, len(runs)


def shown(interval: Interval, sign: str = "") -> str:
    """Write a mean with its interval."""
    return f"{interval.mean:{sign}.3f} ({interval.low:{sign}.3f} to {interval.high:{sign}.3f})"


def main() -> None:
    """Print the table."""
    methods = dict(argument.split("=", 1) for argument in sys.argv[1:])
    found = {name: scores(pattern) for name, pattern in methods.items()}
    hashes = set().union(*(one[1] for one in found.values()))
    if len(hashes) != 1:
        raise SystemExit(f"the runs have different splits: {sorted(hashes)}")
    first = next(iter(found.values()))[0]
    print(f"split {hashes.pop()}, {len(first)} patients\n")
    print("| method | seeds | DICE | IoU | DICE, difference to the first |")
    print("|---|---|---|---|---|")
    for name, (table, _, seeds) in found.items():
        values = [shown(bootstrap_interval(table[key].to_numpy())) for key in ("dice", "iou")]
        change = table["dice"] - first["dice"]
        last = shown(bootstrap_interval(change.to_numpy()), "+") if table is not first else "-"
        print(f"| {name} | {seeds} | {values[0]} | {values[1]} | {last} |")


if __name__ == "__main__":
    main()

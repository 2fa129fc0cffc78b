"""Measure a little of everything: layers, steps, trainings, loading, conversion, imports.

    python -m benchmarks                                # a few minutes on two idle cores
    python -m benchmarks --parts loading imports
    python -m benchmarks --full --device cuda --out gpu.md

Writes and prints one Markdown table with the machine and the versions: medians, their spread, and
ratios to what stands beside them. Ratios carry over to other machines of the kind; times do not.
Other work on the machine disturbs; the table says how much there was. The parts have programs of
their own with more options: `python -m benchmarks.layers --help`; steps, training, loading, growth,
kernels and conversion likewise.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from medseg_reg.errors import MedsegError, run_main
from medseg_reg.files import require_writable, write_text

if TYPE_CHECKING:
    from benchmarks.ratios import Row

# In this order: what forks or starts processes comes before what fills the memory.
PARTS = ("imports", "training", "loading", "conversion", "growth", "kernels", "layers", "steps")


def part(name: str) -> Callable[[argparse.Namespace], list[Row]]:
    """Return the function that measures a part; imported late, for --help needs none of it."""
    found: Callable[[argparse.Namespace], list[Row]] = import_module(f"benchmarks.{name}").rows
    return found


def measure(options: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """Return the rows of the wanted parts, and lines on what was not measured."""
    rows: list[Row] = []
    notes: list[str] = []
    for name in options.parts:
        start, said = time.monotonic(), StringIO()
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            with redirect_stdout(said):  # the parts are programs that print
                rows += part(name)(options)
        except (MedsegError, RuntimeError) as error:
            # What was measured before is kept; torch tells a full memory by a RuntimeError.
            notes.append(f"{name}: not measured ({' '.join(str(error).split())[:300]})")
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        notes += [line for line in said.getvalue().splitlines() if "not measured" in line]
    return rows, notes


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    first, rest = (__doc__ or "").split("\n", 1)
    made = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=first,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--full", action="store_true", help="large maps, many rounds; for a GPU")
    made.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        metavar="PART",
        help=f"some of {', '.join(PARTS)} (default: all)",
    )
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument(
        "--out", type=Path, help="the Markdown file (default: runs/benchmarks/TIME.md)"
    )
    return made


def main(arguments: Sequence[str]) -> None:
    """Measure the parts; write and print the table."""
    options = parser().parse_args(arguments)
    out = options.out or Path("runs/benchmarks") / time.strftime("%Y%m%d-%H%M%S.md")
    if out.is_dir():
        raise MedsegError(f"--out {out}: is a folder. Give the name of a file, such as table.md.")
    require_writable(out.parent)
    import torch

    from benchmarks.ratios import load, machine, markdown

    if options.device == "cuda" and not torch.cuda.is_available():
        raise MedsegError("--device cuda: torch sees no GPU here. Leave it out, or use a GPU.")
    torch.manual_seed(0)
    before, start = load(), time.monotonic()
    rows, notes = measure(options)
    about = [*machine(), f"{time.strftime('%Y-%m-%d')}, {time.monotonic() - start:.0f} s in all"]
    if before is not None:
        about.append(f"other processes that were computing when it began: {before:.1f}")
    if notes:
        about += notes
    text = "\n".join([*(f"* {line}" for line in about), "", markdown(rows), ""])
    write_text(out, text)
    print(text)
    print(f"table: {out}", file=sys.stderr)
    failed = [line.split(":")[0] for line in notes if line.split(":")[0] in options.parts]
    if failed:
        raise MedsegError(f"not measured: {', '.join(failed)}. {out} says why, and has the rest.")


if __name__ == "__main__":
    run_main(main)

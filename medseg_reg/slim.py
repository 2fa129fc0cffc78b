"""Find the patches that a classifier of slices needs, and score it with them alone.

    python -m medseg_reg.slim --run runs/classification/hippocampus/seed0 --tolerance 0.01

Patch Slimming: the patches are the same for every slice, fewer block by block. The run keeps its
weights; what was found stands in its slimming.json, and fine-tuned weights in slimmed.safetensors.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from medseg_reg.errors import MedsegError, run_main


def main(arguments: Sequence[str]) -> None:
    """Parse the command line, search, score, and say what it saves."""
    parser = argparse.ArgumentParser(
        prog="python -m medseg_reg.slim", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--run", type=Path, required=True, help="directory of a finished run")
    parser.add_argument("--tolerance", type=float, default=0.01, help="error of a block's output")
    parser.add_argument("--step", type=int, default=10, help="patches that are added at a time")
    parser.add_argument("--images", type=int, default=64, help="training slices that are looked at")
    parser.add_argument("--epochs", type=int, default=0, help="of fine-tuning a block on these")
    parser.add_argument("--store", type=Path, help="the slice store, where it has moved")
    parsed = parser.parse_args(arguments)
    if min(parsed.tolerance, parsed.epochs) < 0 or min(parsed.step, parsed.images) < 1:
        raise MedsegError("--tolerance and --epochs are 0 or more, --step and --images 1 or more.")
    # Imported here: they take seconds, and --help needs none of them.
    from medseg_reg.engine.classification import ClassificationDirectory
    from medseg_reg.inference.slimming import slim_run, slimming_lines

    run = ClassificationDirectory(parsed.run)
    search = (parsed.tolerance, parsed.step, parsed.images, parsed.epochs)
    content = slim_run(run, *search, parsed.store)
    print(slimming_lines(run, content))


if __name__ == "__main__":
    run_main(main)

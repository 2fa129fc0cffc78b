"""Export the trained network of a finished run, for programs that do not have this package.

    python -m medseg_reg.export --run runs/demo --format onnx
    python -m medseg_reg.export --run runs/demo --format pt2 --out network.pt2
    python -m medseg_reg.export --run runs/demo --format torchscript
    python -m medseg_reg.export --run runs/demo --format monai-bundle --out demo_bundle

The export is compared with PyTorch on images of several sizes and batches, and kept only if both
give the same. An existing file is never replaced.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from medseg_reg.errors import run_main
from medseg_reg.export_formats import FORMATS


def main(arguments: Sequence[str]) -> None:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(
        prog="python -m medseg_reg.export", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--run", type=Path, required=True, help="a run directory")
    parser.add_argument("--format", choices=FORMATS, required=True, help="what to write")
    parser.add_argument(
        "--out", type=Path, help="a file, or a folder for a bundle (default: in RUN/export)"
    )
    parsed = parser.parse_args(arguments)
    # Imported here: they take seconds, and --help needs none of them.
    from medseg_reg.engine.run_directory import RunDirectory
    from medseg_reg.inference.export import export_run
    from medseg_reg.inference.export.plan import TOLERANCE

    done = export_run(RunDirectory(parsed.run), parsed.format, parsed.out)
    for note in done.notes:
        print(f"note: {note}")
    takes = done.size if isinstance(done.size, str) else f"{done.size[0]}x{done.size[1]}"
    print(
        f"equal to PyTorch within {done.difference:.1g} (tolerated: {TOLERANCE:g}); batch: any, "
        f"size: {takes}\nwritten to {done.path}"
    )


def command() -> None:
    """Run as the installed command `medseg-export`."""
    run_main(main)


if __name__ == "__main__":
    command()

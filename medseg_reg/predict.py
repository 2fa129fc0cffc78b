r"""Predict labels with finished runs, written back onto the grid of the source.

    python -m medseg_reg.predict --run runs/demo --input scan.nii.gz --output labels.nii.gz
    python -m medseg_reg.predict --run runs/demo --input DICOM_FOLDER --output labels.dcm
    python -m medseg_reg.predict --run runs/bagls --input FRAMES --output LABELS
    python -m medseg_reg.predict --run runs/fold* --input data/demo/store --output LABELS
    python -m medseg_reg.predict --run runs/demo --input FRAMES --output LABELS --mc-dropout 20
    python -m medseg_reg.predict --run runs/fine --first runs/coarse --confidence 0.9 \
        --input data/demo/store --output LABELS

Volumes become NIfTI, a DICOM series also DICOM SEG, pictures 8-bit PNG; the values are the indices
of the classes. Several runs vote by the mean of their probabilities. With --first they are asked
only for the slices of which a cheaper run is not sure.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from medseg_reg.errors import MedsegError, run_main
from medseg_reg.files import require_writable

if TYPE_CHECKING:
    import torch

    from medseg_reg.inference.ensemble import Ensemble
    from medseg_reg.inference.inputs import Input
    from medseg_reg.inference.passes import Flip

FLIPS: tuple[Flip, ...] = ("horizontal", "vertical")


def main(arguments: Sequence[str]) -> None:
    """Parse the command line and predict."""
    parsed = parser().parse_args(arguments)
    _check_numbers(parsed)
    # Imported here: they take seconds, and --help needs none of them.
    from medseg_reg.engine.run_directory import RunDirectory
    from medseg_reg.inference.cascade import Cascade, load_cascade
    from medseg_reg.inference.ensemble import Way, load_runs
    from medseg_reg.inference.inputs import Wanted, find_inputs

    way = Way(
        window=None if parsed.window is None else tuple(parsed.window),
        overlap=0.5 if parsed.overlap is None else parsed.overlap,
        flips=() if parsed.flips is None else tuple(dict.fromkeys(parsed.flips or FLIPS)),
        draws=parsed.mc_dropout,
        seed=parsed.seed or 0,
        batch_size=parsed.batch_size,
        device=_checked_device(parsed.device),
    )
    paths = [RunDirectory(path) for path in parsed.run]
    if parsed.first is None:
        runs = load_runs(paths, way)
    else:
        runs = load_cascade(RunDirectory(parsed.first), paths, way, parsed.confidence)
    uncertainty = parsed.uncertainty or way.draws > 0
    maps = runs.ensemble.map_names(uncertainty, parsed.probabilities)
    wanted = Wanted(parsed.output, parsed.format, maps, parsed.series, runs.algorithm)
    inputs = find_inputs(parsed.input, wanted, runs.facts)
    require_writable(inputs[0].target.parent)
    for note in runs.notes:
        print(f"note: {note}")
    found = np.zeros(len(runs.facts.classes), dtype=np.int64)
    for one in tqdm(inputs, unit="case", disable=len(inputs) == 1):
        found += _predict(one, runs.ensemble, maps, alone=len(inputs) == 1)
    shares = ", ".join(
        f"{name} {count / found.sum():.2%}"
        for name, count in zip(runs.facts.classes, found, strict=True)
    )
    print(f"{len(inputs)} predicted: {shares}\nwritten to {parsed.output}")
    if isinstance(runs.ensemble, Cascade):
        print(runs.ensemble.summary())
    if maps:
        print(f"beside them: {', '.join(maps)}")


def _predict(one: Input, ensemble: Ensemble, maps: Sequence[str], alone: bool) -> np.ndarray:
    """Predict one input, write it, and return the number of pixels of each class."""
    images, output, notes = one.read()
    found = np.zeros(len(ensemble.classes), dtype=np.int64)
    for note in notes:
        tqdm.write(f"note: {one.name}: {note}")
    bar = tqdm(total=len(images), unit="slice", leave=alone, disable=len(images) == 1)
    with bar, output.open(images.shape) as add:
        for part in ensemble.parts(images, one.name, maps):
            add(part.start, part.labels, part.maps)
            found += np.bincount(part.labels.ravel(), minlength=len(found))
            bar.update(len(part.labels))
        # Large, and not needed to write the labels.
        del images
    return found


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m medseg_reg.predict", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--run", type=Path, required=True, nargs="+", help="run directories; several vote"
    )
    parser.add_argument(
        "--first", type=Path, metavar="DIR",
        help="a cheap run that predicts first; --run only where it is not sure",
    )  # fmt: skip
    parser.add_argument(
        "--confidence", type=float,
        help="above which --first is believed, from 0 to 1; python -m medseg_reg.cascade finds it",
    )  # fmt: skip
    parser.add_argument("--input", type=Path, required=True, help="what to predict")
    parser.add_argument("--output", type=Path, required=True, help="a file or a folder")
    parser.add_argument(
        "--format", choices=("auto", "nifti", "seg"), default="auto",
        help="of volumes; seg is DICOM SEG, for a DICOM series (default: by the name of --output)",
    )  # fmt: skip
    parser.add_argument("--series", metavar="UID", help="the series, where a folder has several")
    parser.add_argument(
        "--window", type=int, nargs="*", metavar="PIXELS",
        help="slide a window of these rows and columns over slices (default: the training's size)",
    )  # fmt: skip
    parser.add_argument(
        "--overlap", type=float, help="of windows, from 0 to below 1 (default: 0.5)"
    )
    parser.add_argument(
        "--flips", nargs="*", choices=FLIPS,
        help="average with mirrored passes (default: both ways and together, four passes)",
    )  # fmt: skip
    parser.add_argument(
        "--mc-dropout", type=int, default=0, metavar="N",
        help="average N passes with the regularizers on; writes maps of the uncertainty",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, help="of MC dropout (default: 0)")
    parser.add_argument(
        "--uncertainty", action="store_true",
        help="write the entropy, and with several runs their mutual information",
    )  # fmt: skip
    parser.add_argument(
        "--probabilities", action="store_true", help="write the mean probability of each class"
    )
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="slices at once (default: the run's)"
    )
    parser.add_argument("--device", help="as cpu or cuda:1; by default a GPU where there is one")
    return parser


def _check_numbers(parsed: argparse.Namespace) -> None:
    if parsed.mc_dropout and parsed.mc_dropout < 2:
        raise MedsegError(
            f"--mc-dropout {parsed.mc_dropout}: expected at least 2 passes; 10 to 50 are usual."
        )
    if parsed.batch_size is not None and parsed.batch_size < 1:
        raise MedsegError(f"--batch-size {parsed.batch_size}: expected at least 1 slice.")
    if parsed.first is not None and parsed.confidence is None:
        raise MedsegError(
            f"--first {parsed.first}: needs --confidence, from 0 to 1; find one with python -m "
            "medseg_reg.cascade."
        )
    for name, needs in (("overlap", "window"), ("seed", "mc_dropout"), ("confidence", "first")):
        if getattr(parsed, name) is not None and not _given(getattr(parsed, needs)):
            needed = needs.replace("_", "-")
            raise MedsegError(f"--{name}: has no effect without --{needed}. Add that, or leave it.")
    if not 0 <= (parsed.seed or 0) < 2**32:
        raise MedsegError(f"--seed {parsed.seed}: expected a number from 0 to {2**32 - 1}.")


def _given(value: Sequence[int] | int | None) -> bool:
    """Whether an option is on; a window without numbers is."""
    return value is not None and value != 0


def _checked_device(name: str | None) -> torch.device | None:
    if name is None:
        return None
    import torch

    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().split("\n")[0][:120]
        raise MedsegError(f"--device {name}: cannot be used ({first}). Try cpu.") from None
    return device


def command() -> None:
    """Run as the installed command `medseg-predict`."""
    run_main(main)


if __name__ == "__main__":
    command()

"""Predict labels with a finished run, written back onto the grid of the source.

    python -m medseg_reg.predict --run runs/demo --input scan.nii.gz --output labels.nii.gz
    python -m medseg_reg.predict --run runs/demo --input DICOM_FOLDER --output labels.nii.gz
    python -m medseg_reg.predict --run runs/bagls --input FRAMES --output LABELS
    python -m medseg_reg.predict --run runs/demo --input data/demo/store --output LABELS

Volumes become NIfTI, pictures become 8-bit PNG; the values are the indices of the classes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from medseg_reg.engine.network import load_run_network
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.errors import MedsegError, run_main
from medseg_reg.files import require_writable
from medseg_reg.inference.inputs import find_inputs
from medseg_reg.inference.predictor import Predictor


def main(arguments: Sequence[str]) -> None:
    """Parse the command line and predict."""
    parser = argparse.ArgumentParser(
        prog="python -m medseg_reg.predict", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--run", type=Path, required=True, help="a run directory")
    parser.add_argument("--input", type=Path, required=True, help="what to predict")
    parser.add_argument("--output", type=Path, required=True, help="a file or a folder")
    parser.add_argument("--device", help="as cpu or cuda:1; by default a GPU where there is one")
    parsed = parser.parse_args(arguments)
    device = _checked_device(parsed.device)
    run = RunDirectory(parsed.run)
    config = run.config()
    network, facts = load_run_network(run), run.data_facts()
    inputs = find_inputs(parsed.input, parsed.output, facts)
    require_writable(inputs[0].target.parent)
    predictor = Predictor(
        network, config.data.image, facts.channels, config.evaluation.batch_size, device
    )
    found = np.zeros(len(facts.classes), dtype=np.int64)
    for one in tqdm(inputs, unit="case", disable=len(inputs) == 1):
        images, context = one.read()
        labels = predictor.labels(images, one.name)
        one.write(labels, context)
        found += np.bincount(labels.ravel(), minlength=len(found))
    shares = ", ".join(
        f"{name} {count / found.sum():.2%}"
        for name, count in zip(facts.classes, found, strict=True)
    )
    print(f"{len(inputs)} predicted: {shares}\nwritten to {parsed.output}")


def _checked_device(name: str | None) -> torch.device | None:
    if name is None:
        return None
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

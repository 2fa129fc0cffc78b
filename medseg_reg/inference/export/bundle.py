"""A run as a MONAI bundle: a folder that predicts without this package."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import metadata as installed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medseg_reg.data.preprocessing import Fit, ImageSpec
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.errors import MedsegError
from medseg_reg.files import read_json, replacing_folder, write_json, write_text
from medseg_reg.inference.export.bundle_config import MODEL, inference_config, is_volume, metadata
from medseg_reg.inference.export.bundle_text import DATA, LICENSE, readme
from medseg_reg.inference.export.facts import LAYOUT, compared
from medseg_reg.inference.export.plan import Plan, require_equal
from medseg_reg.inference.export.script import open_script, script_of, whole_slices, write_script
from medseg_reg.networks.build import Network, probabilities

# Lowest versions that a bundle was run with, where the export's own environment lacks one.
NEEDED = {"nibabel": "5.3", "pillow": "11.3", "pytorch-ignite": "0.5.5", "fire": "0.7.1"}


def check_bundle(run: RunDirectory) -> None:
    """Refuse a run whose preprocessing MONAI has no transform for.

    Raises:
        MedsegError: images are eroded or have edges burnt in, or pictures have other channels than
            gray or RGB.
    """
    facts = run.data_facts()
    for filtered in ("erosion", "canny"):
        if facts.conversion.get(filtered):
            raise MedsegError(
                f"{run.path}: was trained on images that were filtered ({filtered} "
                f"{facts.conversion[filtered]}), which MONAI's transforms cannot do. Use another "
                "--format, and filter before it."
            )
    if not is_volume(facts) and facts.channels not in (1, 3):
        raise MedsegError(
            f"{run.path}: was trained on pictures of {facts.channels} channels, a bundle reads "
            "gray and RGB. Use another --format."
        )


def write_bundle(
    run: RunDirectory, network: Network, plan: Plan, facts: dict[str, Any], target: Path
) -> float:
    """Write a bundle, compare its network with PyTorch, and put it in its place if it is equal.

    Returns:
        The largest difference of a probability.

    Raises:
        Differs: outputs differ; nothing is left then.
    """
    config, data = run.config(), run.data_facts()
    image, raw = config.data.image, _raw(plan, config.data.image)
    facts = {**facts, **_interface(raw), "scores": _scores(run)}
    about = metadata(run, facts, _shape(network, plan, image), _versions())
    with replacing_folder(target) as folder:
        for name in ("configs", "models", "docs"):
            (folder / name).mkdir()
        module = whole_slices(script_of(network, plan), image)
        write_script(module, folder / MODEL, json.dumps(facts))
        opened = open_script(folder / MODEL)
        difference = require_equal(by_hand(network, image), opened, raw, logits=False)
        inference = inference_config(image, data, config.evaluation.batch_size)
        write_json(folder / "configs/metadata.json", about)
        write_json(folder / "configs/inference.json", inference)
        write_text(folder / "docs/README.md", readme(facts, about["task"], is_volume(data)))
        write_text(folder / "docs/data_license.txt", DATA.format(**facts["data"]))
        write_text(folder / "LICENSE", LICENSE.format(**facts["data"]))
    return difference


def by_hand(network: Network, image: ImageSpec) -> Callable[[Tensor], Tensor]:
    """Return what predicts slices (B, C, H, W), 0 to 1, as `medseg_reg.predict` does."""

    def predict(x: Tensor) -> Tensor:
        fit = Fit.of(image, (x.shape[2], x.shape[3]))
        fitted = [fit.image(one.permute(1, 2, 0).numpy()) for one in x]
        batch = torch.from_numpy(np.stack(fitted).transpose(0, 3, 1, 2).copy())
        return fit.undo(probabilities(network(batch)))

    return predict


def _raw(plan: Plan, image: ImageSpec) -> Plan:
    """Return a plan whose shapes are those of slices before they get the network's size."""
    if image.size is None:
        return plan
    batch, channels, rows, columns = plan.example
    sizes = ((rows, columns), (2 * rows + 3, 2 * columns), (rows // 2 + 1, columns + 5))
    probes = tuple((1 + number, channels, *size) for number, size in enumerate(sizes))
    return Plan(True, (batch, channels, rows, columns), probes)


def _interface(raw: Plan) -> dict[str, Any]:
    """Return what goes in and what comes out of the network of a bundle."""
    takes = raw.takes
    return {
        "input": {
            "layout": LAYOUT,
            "type": "float32",
            "values": [0, 1],
            "batch": "any",
            "size": takes if isinstance(takes, str) else list(takes),
        },
        "output": {"layout": "batch, classes, rows, columns", "values": "probabilities"},
        **compared(raw),
    }


def _shape(network: Network, plan: Plan, image: ImageSpec) -> list[Any]:
    """Return the rows and columns of a slice in MONAI's words."""
    if image.size is not None:
        return ["*", "*"]
    if plan.size is not None:
        return list(plan.size)
    # Other sizes are padded; MONAI tries the smallest, which must not be one pixel at the bottom.
    return [f"{2 * network.factor}*n"] * 2


def _scores(run: RunDirectory) -> dict[str, Any]:
    """Return the scores of the test part, if the run has been evaluated."""
    path = run.path / "summary.json"
    if not path.exists():
        return {}
    found = read_json(path)
    values = {f"mean volume {key}": found[key]["mean"] for key in ("dice", "iou")}
    return {"patients of the test part": found["dice"]["n"], **values}


def _versions() -> dict[str, str]:
    versions = {name: installed.version(name) for name in ("monai", "torch", "numpy")}
    versions = {name: version.split("+")[0] for name, version in versions.items()}
    for name, lowest in NEEDED.items():
        try:
            versions[name] = installed.version(name)
        except installed.PackageNotFoundError:
            versions[name] = lowest
    return versions

"""Finished runs to export: never trained, but every class is somewhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from medseg_reg.data.splits import Splits
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.checkpoint import save_weights
from medseg_reg.engine.network import load_run_network
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.files import read_json, write_json
from medseg_reg.networks.foreign import ForeignNetwork
from tests.inference.made_runs import make_run
from tests.stores import make_store

OWN: dict[str, dict[str, Any]] = {
    "unet": {"network": {"channels": [4, 6, 8]}},
    "unet of every other kind": {
        "network": {
            "channels": [4, 6],
            "norm": "instance",
            "activation": "prelu",
            "upsample": "nontrainable",
            "head": "sigmoid",
        }
    },
    "attention_unet": {"network": {"name": "attention_unet", "channels": [4, 6, 8]}},
    "unet3plus": {
        "network": {
            "name": "unet3plus",
            "channels": [4, 6, 8],
            "cat_channels": 4,
            "deep_supervision": True,
            "classification_guided": True,
        }
    },
}


def exportable_run(path: Path, store: SliceStore, conversion: Any = None, **changes: Any) -> Path:
    """Write a finished run; `conversion` says how its data were converted."""
    make_run(path, store, **changes)
    cases = [row.name for row in store.manifest.cases]
    Splits(train=cases[:-2], val=cases[-2:-1], test=cases[-1:]).write(path / "splits.json")
    if conversion is not None:
        content = read_json(path / "data.json")
        write_json(path / "data.json", {**content, "conversion": conversion})
    balance(RunDirectory(path))
    return path


def balance(run: RunDirectory, images: torch.Tensor | None = None) -> None:
    """Shift the last biases until each class wins in about its share of an image.

    Args:
        run: the run.
        images: (B, C, H, W), 0 to 1; noise if they are not given.
    """
    network = load_run_network(run)
    # Some networks take one size alone, some none as small as 64 x 64.
    rows, columns = (max(64, side) for side in run.config().data.image.size or (64, 64))
    if isinstance(network, ForeignNetwork) and network.fixed:
        rows, columns = network.size
    shape = (run.data_facts().channels, rows, columns)
    noise = torch.from_numpy((noisy_volume(shape)[None] + 100) / 340).float().clamp(0, 1)
    x = noise if images is None else images
    with torch.no_grad():
        if getattr(network, "presence", None) is not None:
            network.presence.classify.bias.fill_(1e4)
        logits = network(x)
        convolutions = [one for one in network.modules() if isinstance(one, nn.Conv2d)]
        outputs = logits.shape[1]
        last = [one for one in convolutions if one.bias is not None and len(one.bias) == outputs]
        head = network.get_submodule("classify") if hasattr(network, "classify") else last[-1]
        head.bias -= logits.transpose(0, 1).flatten(1).median(dim=1).values
    save_weights(network, run.weights)


def copy_run(run: Path, target: Path) -> Path:
    """Copy a run without what was exported from it."""
    shutil.copytree(run, target, ignore=shutil.ignore_patterns("export"))
    return target


def hu_store(path: Path) -> SliceStore:
    """Write a store of CT slices."""
    return make_store(path, cases=5, slices=2, size=(40, 33), classes=3, dtype="int16")


def noisy_volume(shape: tuple[int, ...], seed: int = 3) -> np.ndarray:
    """Return HU that a network makes something of: smooth, with an edge, and different at each
    end."""
    grid = np.stack(np.meshgrid(*(np.linspace(0, 1, n) for n in shape), indexing="ij"))
    waves = sum(np.sin((7 + 3 * a) * grid[a] + a) for a in range(3))
    box = (grid[0] > 0.3) & (grid[1] < 0.6) & (grid[2] > 0.2)
    noise = np.random.default_rng(seed).normal(0, 20, shape)
    return (60 * waves + 90 * box + noise).astype(np.int16)

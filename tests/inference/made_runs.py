"""Run directories with weights drawn at random, for tests of what comes after the training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from medseg_reg.config import parse_config
from medseg_reg.data.splits import make_splits
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.checkpoint import save_weights
from medseg_reg.engine.coarse import keep_coarse
from medseg_reg.engine.network import build_run_network
from medseg_reg.engine.run_directory import DataFacts, RunDirectory
from medseg_reg.inference.ensemble import ENTROPY, Ensemble
from tests.training import tiny_config

SPATIAL = [{"name": "spatial_dropout", "places": "between_convs", "p": 0.5}]
HEURISTIC = [{"name": "heuristic_dropout", "places": "between_convs", "p": 0.5}]
NOISY = {"regularization__architecture": SPATIAL}
FIXED = {"regularization__architecture": HEURISTIC}
PLAIN = {"regularization__architecture": []}
# Maps of runs with three classes.
NAMES = (ENTROPY, "probability_1_class_1", "probability_2_class_2")


def make_run(path: Path, store: SliceStore, seed: int = 0, **changes: object) -> Path:
    """Write a finished run that was never trained."""
    config = parse_config(tiny_config(store.path, path, seed=seed, **changes), "test")
    run = RunDirectory(path)
    run.prepare(config)
    image = store.image(store.manifest.cases[0].name)
    run.begin(DataFacts.of(store, image.shape[3] if image.ndim == 4 else 1), store)
    if config.network.reuse is not None:
        keep_coarse(run, config, make_splits(store, config.data.split), store)
    torch.manual_seed(seed)
    network, _ = build_run_network(config, run.data_facts())
    with torch.no_grad():
        # Else every class is about as probable as the others.
        [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)][-1].weight.mul_(20)
    save_weights(network, run.weights)
    return path


def predicted(
    ensemble: Ensemble, images: np.ndarray, names: Sequence[str] = NAMES
) -> dict[str, np.ndarray]:
    """Return the labels and the maps of these names of a case, the parts put together."""
    parts = list(ensemble.parts(images, "case", names))
    assert [one.start for one in parts] == list(range(0, len(images), ensemble.batch_size))
    found = {name: np.concatenate([one.maps[name] for one in parts]) for name in names}
    return {"labels": np.concatenate([one.labels for one in parts]), **found}

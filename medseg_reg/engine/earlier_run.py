"""A finished run of which another training takes something: a teacher, or a coarse network.

What it must have in common with that training, and what it must not have seen, stands here once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medseg_reg.config import Config, RunConfig
from medseg_reg.data.splits import Splits
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.network import load_run_network
from medseg_reg.engine.origins import Kind, Origin, origin_of_run, require_unlearned
from medseg_reg.engine.run_directory import DataFacts, RunDirectory
from medseg_reg.errors import MedsegError
from medseg_reg.files import read_json, sha256_of
from medseg_reg.networks.build import Network
from medseg_reg.regularizers.protocols import LabelReader


def check_earlier(
    run: RunDirectory,
    key: str,
    kind: Kind,
    config: RunConfig,
    facts: DataFacts,
    splits: Splits,
    store: SliceStore,
) -> Origin:
    """Return what is known of an earlier run that a training takes something of.

    Args:
        run: the earlier run.
        key: of the configuration that names it, for errors.
        kind: what it is.
        config: of the training.
        facts: of its data.
        splits: of these.
        store: that holds them.

    Raises:
        MedsegError: it is no finished run, was trained for other classes, channels or
            intensities, or has learned from cases that the training validates or tests on.
    """
    try:
        _require_alike(run, run.config(), config, facts)
        run.require_finished()
        origin = origin_of_run(run, kind, splits, store)
        require_unlearned(origin)
    except MedsegError as error:
        raise MedsegError(f"{key}: {error}") from None
    return origin


def load_earlier(run: RunDirectory, key: str) -> Network:
    """Load the network of an earlier run for a training.

    Random states are not what they were afterwards.

    Raises:
        MedsegError: it reads the labels of what it is tested on, or a file is damaged.
    """
    try:
        network = load_run_network(run)
    except MedsegError as error:
        raise MedsegError(f"{key}: {error}") from None
    if any(isinstance(m, LabelReader) and not m.valid_for_reporting for m in network.modules()):
        raise MedsegError(
            f"{key}: {run.path} has a layer that reads the labels of what it is tested on, so it "
            "predicts nothing without them. Use another run."
        )
    return network


def same_run(
    path: Path, weights: Path, note: Path, key: str, origin: Origin | None
) -> dict[str, Any]:
    """Return what a run notes of an earlier one, or make sure that this is still the same.

    Args:
        path: of the earlier run.
        weights: the file of its weights.
        note: the file of the run that has the note, if it was written already.
        key: of the configuration that names the earlier run.
        origin: what is known of it.

    Raises:
        MedsegError: it has other weights than when the training began.
    """
    found: dict[str, Any] = {"run": str(path), "sha256": sha256_of(weights)}
    if origin is not None:
        found["origin"] = origin.as_dict()
    if note.exists() and read_json(note).get("sha256") != found["sha256"]:
        raise MedsegError(
            f"{key}: {weights} has changed since {note.parent} began to learn from it. Restore "
            "it, or train into another directory with `run=DIR`."
        )
    return found


def _require_alike(run: RunDirectory, other: Config, config: RunConfig, facts: DataFacts) -> None:
    """Refuse a run that knows other classes, or would see images that it does not know."""
    theirs = run.data_facts()
    pairs: dict[str, tuple[Any, Any]] = {
        "classes": (list(theirs.classes), list(facts.classes)),
        "channels": (theirs.channels, facts.channels),
        "data.image.window": (other.data.image.window, config.data.image.window),
        "data.image.percentiles": (other.data.image.percentiles, config.data.image.percentiles),
    }
    for name, (found, wanted) in pairs.items():
        if found != wanted:
            raise MedsegError(
                f"{run.path}: was trained with {name} {found}, this run has {wanted}. Use a run "
                "that was trained with the same."
            )

"""Equal drop rates that are really dropped: what `p` each layer of a study needs for that.

`p` is the share dropped for most layers. For some it is another thing: FocusedDropout's is the
share of batches in which it takes part, ADL's that of batches in which it hides instead of
weighting, and published rules drop what they drop. So each layer is put into the untrained network
of its run, and `p` is sought with which it drops the wanted share of the maps of some training
slices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from medseg_reg.config import Config
from medseg_reg.data.splits import make_splits
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.beginning import data_module
from medseg_reg.engine.network import build_run_network
from medseg_reg.engine.run_directory import DataFacts
from medseg_reg.errors import MedsegError
from medseg_reg.files import read_json, write_json
from medseg_reg.insertion import measure
from medseg_reg.study.grid import Cell, Spot

# Of the wanted rate; nearer is lost in the draws.
TOLERANCE = 0.1
SLICES, DRAWS, HALVINGS, LARGEST = 2, 128, 8, 0.99


def with_equal_rates(cells: Sequence[Cell[Spot]], rate: float, notes: Path) -> list[Cell[Spot]]:
    """Return the runs of a study with a `p` for each layer that really drops the same share.

    What was found is kept, so that a study that goes on has the same runs.

    Args:
        cells: runs whose layers have `p` equal to the rate.
        rate: the share that each layer shall drop, in (0, 1).
        notes: the file, `equal_rates.json`.

    Raises:
        MedsegError: a layer cannot drop that much at any `p`; names run and layer.
    """
    kept = read_json(notes) if notes.exists() else {}
    found: dict[str, Any] = kept["runs"] if kept.get("rate") == rate else {}
    result = []
    for cell in cells:
        key = "/".join((cell.spot.dataset, cell.spot.network, cell.spot.method))
        if key not in found:
            found[key] = _matched(cell, rate)
        result.append(_with_rates(cell, [one["p"] for one in found[key]]))
    write_json(notes, {"rate": rate, "runs": found})
    return result


def _with_rates(cell: Cell[Spot], rates: Sequence[float]) -> Cell[Spot]:
    regularization = cell.config.regularization
    layers = zip(regularization.architecture, rates, strict=True)
    changed = tuple(layer.model_copy(update={"p": p}) for layer, p in layers)
    regularization = regularization.model_copy(update={"architecture": changed})
    overrides = [f"regularization.architecture.{n}.p={p}" for n, p in enumerate(rates)]
    return replace(
        cell,
        config=cell.config.model_copy(update={"regularization": regularization}),
        overrides=(*cell.overrides, *overrides),
    )


def _matched(cell: Cell[Spot], rate: float) -> list[dict[str, Any]]:
    """Return name, `p` and realised rate of each layer of a run."""
    layers = cell.config.regularization.architecture
    if not layers:
        return []
    store = SliceStore(cell.config.data.store)
    data = data_module(cell.config, store, make_splits(store, cell.config.data.split))
    facts, step = DataFacts.of(store, data.channels), max(1, len(data.train) // SLICES)
    images = [data.train[n]["image"] for n in range(0, len(data.train), step)][:SLICES]
    alike = [image for image in images if image.shape == images[0].shape]
    with torch.random.fork_rng(devices=[]):
        found = []
        for number, layer in enumerate(layers):
            torch.manual_seed(0)
            realised = _meter(cell.config, number, facts, torch.stack(alike))
            try:
                p, share = match(realised, rate)
            except ValueError as error:
                raise MedsegError(
                    f"equal_rates {rate:g}: {cell.title}: {layer.name} {error}. Lower equal_rates, "
                    "or leave the method out."
                ) from None
            found.append({"layer": layer.name, "p": p, "realised": round(share, 4)})
    return found


def _meter(
    config: Config, number: int, facts: DataFacts, images: torch.Tensor
) -> Callable[[float], float]:
    """Return how much one layer of a run drops, all its places together, as a function of `p`."""
    layer = config.regularization.architecture[number].model_copy(update={"depth_ramp": None})
    alone = config.regularization.model_copy(update={"architecture": (layer,)})
    network, entries = build_run_network(config.model_copy(update={"regularization": alone}), facts)
    placements = [placement for entry in entries for placement in entry.placements]

    def realised(p: float) -> float:
        for placement in placements:
            network.get_submodule(placement.path).p = p  # type: ignore[assignment]
        torch.manual_seed(0)
        measure(network, images, placements, draws=DRAWS)
        return sum(one.measured_rate or 0.0 for one in placements) / len(placements)

    return realised


def match(realised: Callable[[float], float], rate: float) -> tuple[float, float]:
    """Return the `p` at which a layer drops the wanted share, and the share at that `p`.

    `p` is the rate itself where that is near enough; else it is found by halving, since more is
    dropped the larger `p` is.

    Args:
        realised: the share that is dropped, as a function of `p`.
        rate: the share that is wanted.

    Raises:
        ValueError: even the largest `p` drops less, or the smallest more.

    >>> match(lambda p: p, 0.2)
    (0.2, 0.2)
    >>> match(lambda p: 0.5 * p, 0.2)[0]
    0.4006
    """

    def near(share: float) -> bool:
        return abs(share - rate) <= TOLERANCE * rate

    share = realised(rate)
    if near(share):
        return rate, share
    low, high = (0.0, rate) if share > rate else (rate, LARGEST)
    if share < rate and (most := realised(LARGEST)) < (1 - TOLERANCE) * rate:
        raise ValueError(f"drops {most:.3f} at most, with p = {LARGEST}")
    for _ in range(HALVINGS):
        p = round((low + high) / 2, 4)
        share = realised(p)
        low, high = (p, high) if share < rate else (low, p)
    if not near(share):
        raise ValueError(f"drops {share:.3f} at p = {p}, and nothing nearer was found")
    return p, share

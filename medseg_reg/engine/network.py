"""The network of a run: built, with its regularizers in their places, and loaded."""

from __future__ import annotations

from collections.abc import Sequence

from medseg_reg.config import Config
from medseg_reg.engine.checkpoint import load_weights
from medseg_reg.engine.layer_memory import load_memory
from medseg_reg.engine.rates import PlacedEntry, apply_depth_ramp
from medseg_reg.engine.run_directory import DataFacts, RunDirectory
from medseg_reg.errors import MedsegError
from medseg_reg.insertion import Placement, place
from medseg_reg.networks.build import build_network
from medseg_reg.networks.unet import UNet
from medseg_reg.regularizers.protocols import LabelReader


def build_run_network(config: Config, facts: DataFacts) -> tuple[UNet, list[PlacedEntry]]:
    """Build the network of a configuration and put its regularizers into their places.

    Raises:
        MedsegError: a regularizer, a place or a ramp is wrong.
    """
    spec = config.network
    network = build_network(
        in_channels=facts.channels,
        classes=len(facts.classes),
        head=spec.head,
        channels=spec.channels,
        norm=spec.norm,
        activation=spec.activation,
        upsample=spec.upsample,
    )
    size = (1, facts.channels, *(config.data.image.size or (2 * network.factor,) * 2))
    entries = []
    for number, layer in enumerate(config.regularization.architecture):
        placements = place(network, layer.name, layer.places, layer.parameters)
        p = placements[0].p
        if layer.depth_ramp is not None:
            apply_depth_ramp(network, placements, layer.depth_ramp, size)
        _check_classes(network, placements, number, facts)
        entries.append(PlacedEntry(number, layer, p, tuple(placements)))
    return network, entries


def _check_classes(
    network: UNet, placements: Sequence[Placement], number: int, facts: DataFacts
) -> None:
    """Refuse a layer that reads labels of another number of classes: it would leave some out."""
    names, key = facts.classes, f"regularization.architecture.{number}"
    for placement in placements:
        layer = network.get_submodule(placement.path)
        if isinstance(layer, LabelReader) and layer.classes != len(names):
            raise MedsegError(
                f"{key}: {placement.regularizer} has classes {layer.classes}, the data have "
                f"{len(names)} ({', '.join(names)}). Set {key}.classes={len(names)}."
            )


def load_run_network(run: RunDirectory) -> UNet:
    """Return the trained network of a finished run, in evaluation mode.

    Raises:
        MedsegError: the training is not finished, or a file is damaged.
    """
    config = run.config()
    if not run.finished:
        raise MedsegError(
            f"{run.path}: the training is not finished (no weights.safetensors). Run "
            "`python -m medseg_reg.train` with its configuration again; it goes on."
        )
    network, _ = build_run_network(config, run.data_facts())
    load_weights(network, run.weights)
    load_memory(network, run.memory)
    network.eval()
    return network

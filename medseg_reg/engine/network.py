"""The network of a run: built, with its regularizers in their places, and loaded."""

from __future__ import annotations

from medseg_reg.config import Config
from medseg_reg.engine.checkpoint import load_weights
from medseg_reg.engine.run_directory import DataFacts, RunDirectory
from medseg_reg.errors import MedsegError
from medseg_reg.insertion import Placement, place
from medseg_reg.networks.build import build_network
from medseg_reg.networks.unet import UNet


def build_run_network(config: Config, facts: DataFacts) -> tuple[UNet, list[Placement]]:
    """Build the network of a configuration and put its regularizers into their places."""
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
    placements = []
    for layer in config.regularization.architecture:
        placements += place(network, layer.name, layer.places, layer.parameters)
    return network, placements


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
    network.eval()
    return network

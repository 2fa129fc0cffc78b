"""The network of a run: built, with its regularizers in their places, and loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from medseg_reg.config import Config, RunConfig
from medseg_reg.config_network import ForeignSpec, NetworkSpec
from medseg_reg.config_regularization import LayerSpec
from medseg_reg.engine.checkpoint import load_weights
from medseg_reg.engine.layer_memory import load_memory
from medseg_reg.engine.rates import PlacedEntry, apply_depth_ramp
from medseg_reg.engine.run_directory import DataFacts, RunDirectory
from medseg_reg.errors import MedsegError
from medseg_reg.insertion import Placement, insert, place
from medseg_reg.insertion.kinds import own_drop_paths
from medseg_reg.insertion.slots import has_own_slots
from medseg_reg.networks.build import Network, build_network, check_input_size, usual_size
from medseg_reg.networks.foreign import RATE, later_arguments
from medseg_reg.networks.pretrained import PretrainedReport, load_pretrained
from medseg_reg.networks.reuse import Coarse, attach
from medseg_reg.regularizers.protocols import LabelReader


def build_run_network(
    config: Config, facts: DataFacts, coarse: Coarse | None = None
) -> tuple[Network, list[PlacedEntry]]:
    """Build the network of a configuration and put its regularizers into their places.

    Its weights are new; see `load_run_pretrained`.

    Args:
        config: the configuration.
        facts: of the data.
        coarse: whose answer the network takes in; by default that of the run which the
            configuration names, if it names any.

    Raises:
        MedsegError: the network, a regularizer, a place or a ramp is wrong.
    """
    if coarse is None and config.network.reuse is not None:
        coarse = load_coarse_network(config, RunDirectory(config.network.reuse.run))
    channels = facts.channels + (0 if coarse is None else coarse.channels)
    network = build_plain_network(config.network, facts.model_copy(update={"channels": channels}))
    size = (1, channels, *(config.data.image.size or usual_size(network)))
    check_input_size(network, channels, size[2:])
    entries = []
    for number, layer in enumerate(config.regularization.architecture):
        placements = _placed(network, layer, size)
        p = placements[0].p
        if layer.depth_ramp is not None:
            apply_depth_ramp(network, placements, layer.depth_ramp, size)
        _check_classes(network, placements, number, facts)
        entries.append(PlacedEntry(number, layer, p, tuple(placements)))
    if coarse is not None:
        # After the layers, which are for the finer network.
        attach(network, coarse, facts.channels)
    return network, entries


def build_plain_network(spec: NetworkSpec, facts: DataFacts) -> Network:
    """Build a network for some data, with new weights and without regularizers.

    Raises:
        MedsegError: the network cannot be built so.
    """
    arguments: dict[str, Any] = spec.arguments
    if isinstance(spec, ForeignSpec):
        arguments |= spec.token_arguments
    return build_network(
        in_channels=facts.channels,
        classes=len(facts.classes),
        head=spec.head,
        name=spec.name,
        tree_depth=spec.tree_depth,
        **arguments,
    )


def own_rates_note(spec: NetworkSpec, network: Network) -> str:
    """Say where a network drops branches though its configuration does not ask for it.

    The part of a study without regularization has that rate too. Empty if there is none, or if the
    configuration names a rate.
    """
    said = own_drop_paths(network)
    given = spec.arguments if isinstance(spec, ForeignSpec) else {}
    if not said or any("path_rate" in key for key in given):
        return ""
    encoder = str(given.get("encoder_name", ""))
    if encoder.startswith("tu-") or RATE in later_arguments(encoder):
        return f"network: {said}. Set network.{RATE}; 0.0 is none."
    return f"network: {said}. It has no argument for that."


def _placed(network: Network, layer: LayerSpec, size: Sequence[int]) -> Sequence[Placement]:
    """Put the layers of one entry into their places."""
    if has_own_slots(network):
        return place(network, layer.name, layer.places, layer.parameters)
    # Noise, not the run's own image, so that a finished run finds the same places without data.
    example = torch.rand(*size, generator=torch.Generator().manual_seed(0))
    report = insert(network, layer.name, layer.places, example=example, **layer.parameters)
    if report.note:
        print(f"note: {layer.name}: {report.note}")
    return report


def load_run_pretrained(network: nn.Module, config: RunConfig) -> PretrainedReport | None:
    """Load the pretrained weights that a configuration names, if it names any.

    Raises:
        MedsegError: the file cannot be read, or does not fit.
    """
    spec = config.network
    strict = spec.pretrained_strict
    if spec.encoder_weights is not None:
        return load_pretrained(network, spec.encoder_weights, strict=strict, part="encoder")
    if spec.pretrained is not None:
        return load_pretrained(network, spec.pretrained, strict=strict)
    return None


def _check_classes(
    network: Network, placements: Sequence[Placement], number: int, facts: DataFacts
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


def load_run_network(run: RunDirectory) -> Network:
    """Return the trained network of a finished run, in evaluation mode.

    Raises:
        MedsegError: the training is not finished, or a file is damaged.
    """
    config = run.config()
    run.require_finished()
    network, _ = build_run_network(config, run.data_facts(), kept_coarse(run))
    load_weights(network, run.weights)
    load_memory(network, run.memory)
    network.eval()
    return network


def kept_coarse(run: RunDirectory) -> Coarse | None:
    """Load the coarse network that a run has kept, if it takes one in."""
    config = run.config()
    return None if config.network.reuse is None else load_coarse_network(config, run.coarse)


def load_coarse_network(config: Config, run: RunDirectory) -> Coarse:
    """Load the network of a coarse run, whose answer the network of a configuration takes in.

    Raises:
        MedsegError: the training is not finished, or a file is damaged.
    """
    network, classes = load_run_network(run), len(run.data_facts().classes)
    return coarse_network(network, config, run.config(), classes)


def coarse_network(network: Network, config: Config, theirs: Config, classes: int) -> Coarse:
    """Return a trained network as that of a configuration takes in what it says.

    Args:
        network: the coarse one.
        config: of the finer run.
        theirs: of the coarse run.
        classes: their number.
    """
    what = "probabilities" if config.network.reuse is None else config.network.reuse.what
    binary = what == "logits" and theirs.network.head == "sigmoid"
    # Crops keep the resolution, and what is as large for both is not scaled either.
    image, own = theirs.data.image, config.data.image
    native = image.size is None or image.fit == "crop" or image.size == own.size
    return Coarse(
        network, 1 if binary else classes, what, None if native else image.size, image.fit
    )

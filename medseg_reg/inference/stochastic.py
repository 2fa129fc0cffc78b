"""Which layers of a network draw by chance, and a network in which only those do so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from medseg_reg.errors import MedsegError
from medseg_reg.insertion.running import modes_kept
from medseg_reg.networks.guided import ClassPresence
from medseg_reg.regularizers import HeuristicDropout, Regularizer

# Layers of timm, torchvision and MONAI that are no subclass of torch's dropout, by their classes'
# names, so that none of the three is imported for it.
_FOREIGN = {"DropPath", "StochasticDepth", "DropBlock2d", "DropBlock3d"}
_RATES = ("drop_prob", "p", "dropout")
_EFFICIENT_NET = "EfficientNetEncoder"


def stochastic_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that draw by chance while training, by their paths.

    These are our regularizers whose instances are `stochastic`, every kind of torch's dropout,
    drop path, stochastic depth and DropBlock of timm, torchvision and MONAI, torch's attention with
    dropout, and the blocks of segmentation-models-pytorch's EfficientNet, which drop their paths
    without a layer for it; each with a rate above zero.

    >>> from medseg_reg.regularizers import HeuristicDropout, SpatialDropout
    >>> list(stochastic_layers(nn.Sequential(SpatialDropout(0.1), HeuristicDropout(0.1))))
    ['0']
    """
    # The head of UNet 3+ that says which classes are there has a dropout of its own, in every such
    # network; it would take whole classes away, and is no layer that anyone asked for.
    heads = [part for part in network.modules() if isinstance(part, ClassPresence)]
    left_out = {id(layer) for head in heads for layer in head.modules()}
    encoders = [one for one in network.modules() if type(one).__name__ == _EFFICIENT_NET]
    # What is left of the classifier that the encoder was; it is never called.
    left_out |= {id(one._dropout) for one in encoders}
    blocks = {id(block) for one in encoders for block in _drop_connecting(one)}
    return {
        path: layer
        for path, layer in network.named_modules()
        if (_draws(layer) or id(layer) in blocks) and id(layer) not in left_out
    }


def _drop_connecting(encoder: Any) -> list[nn.Module]:
    """Return the blocks that drop their path; each is told its rate, which rises from 0."""
    if not encoder._drop_connect_rate > 0:
        return []
    return [block for block in encoder._blocks[1:] if block._has_drop_connect]


def fixed_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Return the regularizers and dropouts that do not draw, by their paths."""
    return {
        path: layer
        for path, layer in network.named_modules()
        if isinstance(layer, _DropoutNd) and not _draws(layer)
    }


def _draws(layer: nn.Module) -> bool:
    if isinstance(layer, Regularizer):
        return layer.stochastic and layer.p > 0
    names = {base.__name__ for base in type(layer).__mro__}
    if isinstance(layer, _DropoutNd | nn.MultiheadAttention) or names & _FOREIGN:
        rates = (getattr(layer, name, None) for name in _RATES)
        return any(isinstance(rate, int | float) and rate > 0 for rate in rates)
    return False


@contextmanager
def sampling(network: nn.Module) -> Iterator[list[nn.Module]]:
    """For one block, let the stochastic layers draw while everything else stays in evaluation.

    Batch normalization keeps using, and does not change, what it learned. The modes of all modules
    are restored at the end.

    Yields:
        The stochastic layers.
    """
    with modes_kept(network):
        network.eval()
        layers = list(stochastic_layers(network).values())
        for layer in layers:
            for part in layer.modules():
                part.training = not isinstance(part, _NormBase)
        for module in network.modules():
            # In evaluation mode torch's fast path leaves the dropouts inside out.
            if isinstance(module, nn.TransformerEncoderLayer) and stochastic_layers(module):
                module.training = True
            # Timm's fused attention reads the rate of its dropout and its own mode.
            if getattr(module, "fused_attn", False) and any(map(_draws, module.children())):
                module.training = True
        yield layers


def require_stochastic(network: nn.Module, owner: str) -> None:
    """Refuse a network of which MC dropout would see one and the same answer every time.

    Args:
        network: with its regularizers in their places.
        owner: what the network is, for the message.

    Raises:
        MedsegError: names the layers that do not draw, why, and what to do.
    """
    if stochastic_layers(network):
        return
    fixed = fixed_layers(network)
    if not fixed:
        raise MedsegError(
            f"{owner}: has no layer that draws by chance, so MC dropout would see one answer. "
            "Train with a stochastic regularizer, such as spatial_dropout."
        )
    raise MedsegError(
        f"{owner}: none of its layers draws by chance, so MC dropout would see one answer. "
        f"{describe_fixed(fixed)}"
    )


def describe_fixed(fixed: Mapping[str, nn.Module]) -> str:
    """Say which layers do not draw, why, and what would make them draw."""
    groups: dict[tuple[str, str], list[str]] = {}
    for path, layer in fixed.items():
        groups.setdefault((type(layer).__name__, _reason(layer)), []).append(path)
    return " ".join(
        f"{name} ({', '.join(paths[:3])}{f' and {len(paths) - 3} more' if len(paths) > 3 else ''}) "
        f"{reason}"
        for (name, reason), paths in groups.items()
    )


def _reason(layer: nn.Module) -> str:
    if getattr(layer, "p", 0) == 0:
        return "has the rate p = 0: train with a rate above it."
    if isinstance(layer, HeuristicDropout):
        return (
            f"takes the channels of the highest score (selection: {layer.selection}): train with "
            "`selection: sampled`, which draws them."
        )
    return (
        "decides by its input, not by chance: train with a stochastic regularizer, such as "
        "spatial_dropout."
    )

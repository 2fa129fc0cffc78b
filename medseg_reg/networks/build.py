"""A network by its configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from medseg_reg.errors import MedsegError
from medseg_reg.networks.attention_unet import AttentionUNet
from medseg_reg.networks.foreign import ForeignNetwork, build_foreign
from medseg_reg.networks.mixture import mix_head
from medseg_reg.networks.shapes import run_on_shape
from medseg_reg.networks.sparse_experts import use_experts
from medseg_reg.networks.token_labels import use_token_labels
from medseg_reg.networks.token_selection import use_token_selection
from medseg_reg.networks.unet import UNet
from medseg_reg.networks.unet3plus import UNet3Plus

Network = UNet | UNet3Plus | ForeignNetwork

OWN: dict[str, type[UNet] | type[UNet3Plus]] = {
    "unet": UNet,
    "attention_unet": AttentionUNet,
    "unet3plus": UNet3Plus,
}


def build_network(
    *,
    in_channels: int,
    classes: int,
    head: str,
    name: str = "unet",
    tree_depth: int = 0,
    experts: Mapping[str, Any] | None = None,
    token_selection: Mapping[str, Any] | None = None,
    token_labels: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Network:
    """Build the 2-D network of a run, with new weights.

    Args:
        in_channels: channels of the images.
        classes: number of classes, the background counted.
        head: `softmax`, one output for each class; `sigmoid`, one output, for two classes.
        name: one of `OWN` or of `foreign.FOREIGN`.
        tree_depth: depth of the hierarchical mixture of experts that the last convolution becomes;
            0 leaves it a convolution.
        experts: arguments of `use_experts`; None leaves feed-forward blocks as they are.
        token_selection: arguments of `use_token_selection`; None lets blocks run on all tokens.
        token_labels: arguments of `use_token_labels`; None adds no loss on tokens.
        arguments: what else the network takes.

    Raises:
        MedsegError: a sigmoid head for more than two classes, a foreign network that cannot be
            built with these arguments, or one whose last convolution or feed-forward blocks
            cannot become mixtures, or whose blocks cannot run on chosen tokens or
            give no tokens of patches.
    """
    if head == "sigmoid" and classes != 2:
        raise MedsegError(
            f"network.head: 'sigmoid' is for two classes, the data have {classes}. Use 'softmax'."
        )
    outputs = 1 if head == "sigmoid" else classes
    if name in OWN:
        network: Network = OWN[name](2, in_channels, outputs, **arguments)
    else:
        try:
            network = build_foreign(name, in_channels, outputs, arguments)
        except ValueError as error:
            raise MedsegError(f"network: {error}.") from None
    if experts is not None:
        use_experts(network, (1, in_channels, *usual_size(network)), name, **experts)
    if token_selection is not None:
        shape = (1, in_channels, *usual_size(network))
        use_token_selection(network, shape, name, **token_selection)
    if token_labels is not None:
        shape = (1, in_channels, *usual_size(network))
        use_token_labels(network, shape, name, classes, **token_labels)
    if tree_depth:
        mix_head(network, (1, in_channels, *usual_size(network)), outputs, tree_depth, name)
    return network


def usual_size(network: Network) -> tuple[int, ...]:
    """Return rows and columns of an image that a network takes."""
    return network.size if isinstance(network, ForeignNetwork) else (2 * network.factor,) * 2


def check_input_size(
    network: Network, channels: int, size: Sequence[int], batch_size: int | None = None
) -> None:
    """Refuse a size that a network cannot take, or on which it cannot be trained.

    Sizes that are not divisible are no reason: they are padded inside. But a network may have
    been made for one size, or so little may be left at its bottleneck that it cannot be normalized.

    Args:
        network: the network.
        channels: of the images.
        size: rows and columns.
        batch_size: of the training; None to look at evaluation mode alone.

    Raises:
        MedsegError: names the size found, what is wrong, and a size that works.
    """

    def problem(rows: int, columns: int, values: bool = False) -> str:
        shape = (batch_size or 1, channels, rows, columns)
        try:
            run_on_shape(network, shape, training=batch_size is not None, values=values)
        except Exception as error:
            return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        return ""

    rows, columns = size
    found = problem(rows, columns, values=True)
    if not found:
        return
    # The smallest that works: padded, then ever larger; or the one that the network was made for.
    padded = [-(-n // network.factor) * network.factor for n in size]
    tried = [(padded[0] * n, padded[1] * n) for n in (1, 2, 3, 4, 8, 16)]
    tried.append(tuple(usual_size(network)))  # type: ignore[arg-type]
    works = next((one for one in tried if not problem(*one)), None)
    advice = f" Use at least {works[0]}x{works[1]}." if works else ""
    if works and isinstance(network, ForeignNetwork) and network.fixed:
        advice = (
            f" This network takes {works[0]}x{works[1]} alone: set data.image.size, or the "
            "network's img_size."
        )
    if "more than 1" in found:
        found = f"only one value for each channel is left to normalize ({found})"
    what = "is no size for this network"
    if batch_size is not None:
        what = f"cannot be trained on with this network and data.batch_size {batch_size}"
    raise MedsegError(f"data.image.size {rows}x{columns} {what}: {found}.{advice}")


def predicted_labels(logits: torch.Tensor) -> torch.Tensor:
    """Return the labels (B, *spatial) of logits (B, K, *spatial); one channel means sigmoid."""
    if logits.shape[1] == 1:
        return (logits[:, 0] > 0).to(torch.uint8)
    return logits.argmax(dim=1).to(torch.uint8)


def probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Return class probabilities (B, K, *spatial) in float32, K = 2 for one channel of logits."""
    logits = logits.float()
    if logits.shape[1] == 1:
        foreground = torch.sigmoid(logits)
        return torch.cat([1 - foreground, foreground], dim=1)
    return torch.softmax(logits, dim=1)


def parameter_count(network: nn.Module) -> int:
    """Return the number of trainable values of a network."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)

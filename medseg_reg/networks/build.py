"""A network by its configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from medseg_reg.errors import MedsegError
from medseg_reg.networks.unet import UNet


def build_network(
    *, in_channels: int, classes: int, head: str, channels: Sequence[int], **arguments: Any
) -> UNet:
    """Build the 2-D network of a run.

    Args:
        in_channels: channels of the images.
        classes: number of classes, the background counted.
        head: `softmax`, one output for each class; `sigmoid`, one output, for two classes.
        channels: feature maps of each level.
        arguments: what else the network takes.

    Raises:
        MedsegError: a sigmoid head for more than two classes.
    """
    if head == "sigmoid" and classes != 2:
        raise MedsegError(
            f"network.head: 'sigmoid' is for two classes, the data have {classes}. Use 'softmax'."
        )
    return UNet(2, in_channels, 1 if head == "sigmoid" else classes, channels, **arguments)


def check_input_size(network: UNet, size: Sequence[int], norm: str, batch_size: int) -> None:
    """Refuse a size of which so little is left at the bottleneck that it cannot be normalized.

    Raises:
        MedsegError: names the size found and the smallest that works.
    """
    if any(n > network.factor for n in size) or (norm == "batch" and batch_size > 1):
        return
    least, found = 2 * network.factor, "x".join(map(str, size))
    raise MedsegError(
        f"data.image.size {found} leaves 1x1 at the bottleneck of this network, which "
        f"network.norm '{norm}' cannot normalize with data.batch_size {batch_size}. Use at least "
        f"{least}x{least}, or fewer network.channels."
    )


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

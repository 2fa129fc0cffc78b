"""The blocks that the networks are made of: MONAI's layers, with slots between them."""

from __future__ import annotations

import torch
from monai.networks.blocks.upsample import UpSample
from monai.networks.layers.factories import Conv
from monai.networks.layers.utils import get_act_layer, get_norm_layer
from torch import nn

from medseg_reg.insertion.slots import Slot


def convolution(spatial_dims: int, in_channels: int, out_channels: int, norm: str) -> nn.Module:
    """Return a 3x3 convolution that keeps the size and is followed by a normalization."""
    # A bias before batch or instance normalization is subtracted again.
    biased = norm not in ("batch", "instance")
    conv = Conv[Conv.CONV, spatial_dims]
    layer: nn.Module = conv(in_channels, out_channels, 3, padding=1, bias=biased)
    return layer


def normalization(spatial_dims: int, channels: int, norm: str) -> nn.Module:
    """Return a normalization by MONAI's name, with scale and shift."""
    # torch leaves them out of instance normalization by default.
    named = ("instance", {"affine": True}) if norm == "instance" else norm
    layer: nn.Module = get_norm_layer(named, spatial_dims, channels)
    return layer


def conv_norm_act(
    spatial_dims: int, in_channels: int, out_channels: int, norm: str, activation: str
) -> nn.Sequential:
    """Return one convolution with normalization and activation."""
    return nn.Sequential(
        convolution(spatial_dims, in_channels, out_channels, norm),
        normalization(spatial_dims, out_channels, norm),
        get_act_layer(activation),
    )


class ConvBlock(nn.Module):
    """Two convolutions, each with normalization and activation.

    conv - norm - activation - [between_convs] - conv - norm - [after_norm] - activation
    - [after_block]

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: channels of the output.
        norm: MONAI's name of the normalization, as `batch` or `instance`.
        activation: MONAI's name of the activation.
    """

    def __init__(
        self, spatial_dims: int, in_channels: int, out_channels: int, norm: str, activation: str
    ) -> None:
        super().__init__()
        self.conv1 = convolution(spatial_dims, in_channels, out_channels, norm)
        self.norm1 = normalization(spatial_dims, out_channels, norm)
        self.act1 = get_act_layer(activation)
        self.between_convs = Slot()
        self.conv2 = convolution(spatial_dims, out_channels, out_channels, norm)
        self.norm2 = normalization(spatial_dims, out_channels, norm)
        self.after_norm = Slot()
        self.act2 = get_act_layer(activation)
        self.after_block = Slot()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, in_channels, *spatial) to (B, out_channels, *spatial)."""
        x = self.between_convs(self.act1(self.norm1(self.conv1(x))))
        y: torch.Tensor = self.after_block(self.act2(self.after_norm(self.norm2(self.conv2(x)))))
        return y


class UpBlock(ConvBlock):
    """Up-sampling by two, concatenation with the skip connection, then a `ConvBlock`.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the map from below.
        skip_channels: channels of the skip connection.
        out_channels: channels of the output.
        norm: MONAI's name of the normalization.
        activation: MONAI's name of the activation.
        upsample: `deconv` (transposed convolution) or `nontrainable` (1x1 convolution, where the
            numbers of channels differ, then linear interpolation).
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        skip_channels: int,
        out_channels: int,
        norm: str,
        activation: str,
        upsample: str,
    ) -> None:
        super().__init__(spatial_dims, 2 * skip_channels, out_channels, norm, activation)
        self.up = UpSample(spatial_dims, in_channels, skip_channels, mode=upsample)

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        """Join a map from below with the skip connection of twice its size."""
        assert skip is not None  # noqa: S101 - optional only as ConvBlock takes one map
        return super().forward(torch.cat([skip, self.up(x)], dim=1))

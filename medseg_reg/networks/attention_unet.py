"""Attention U-Net.

Ozan Oktay et al., "Attention U-Net: Learning Where to Look for the Pancreas", MIDL 2018,
arXiv:1804.03999.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.layers.factories import Conv
from monai.networks.layers.utils import get_act_layer
from torch import nn

from medseg_reg.insertion.slots import Slot
from medseg_reg.networks.unet import UNet


class AttentionGate(nn.Module):
    r"""An additive attention gate: one coefficient a pixel, from a skip map and the map below it.

    With :math:`x` the skip map, :math:`g` the map below at half its size, :math:`W_x` a
    convolution of kernel and stride 2 without bias, :math:`W_g` and :math:`\psi` 1x1 convolutions:

    .. math:: \alpha = \operatorname{up}(\operatorname{sigmoid}(\psi(\sigma(W_x x + W_g g))))

    Args:
        spatial_dims: 2 or 3.
        channels: channels of the skip map, and of the sum inside.
        below_channels: channels of the map below.
        activation: MONAI's name of :math:`\sigma`; published: relu.
    """

    def __init__(
        self, spatial_dims: int, channels: int, below_channels: int, activation: str
    ) -> None:
        super().__init__()
        conv = Conv[Conv.CONV, spatial_dims]
        self.of_skip = conv(channels, channels, 2, stride=2, bias=False)
        self.of_below = conv(below_channels, channels, 1)
        self.act = get_act_layer(activation)
        self.psi = conv(channels, 1, 1)
        mode = "bilinear" if spatial_dims == 2 else "trilinear"
        self.up = nn.Upsample(scale_factor=2, mode=mode)

    def joined(self, skip: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
        """Return the map (B, channels, *spatial / 2) from which the coefficients are computed."""
        joined: torch.Tensor = self.act(self.of_skip(skip) + self.of_below(below))
        return joined

    def coefficients(self, joined: torch.Tensor) -> torch.Tensor:
        """Return the coefficients (B, 1, *spatial), between 0 and 1."""
        found: torch.Tensor = self.up(torch.sigmoid(self.psi(joined)))
        return found


class AttentionUNet(UNet):
    r"""Attention U-Net: a U-Net whose skip maps are multiplied by the coefficients of gates.

    .. math:: \hat x_l = \alpha_l x_l

    with :math:`\alpha_l` of `AttentionGate`, whose map below is the bottleneck or the decoder's
    block of the next deeper level.

    Places: those of `UNet`, `skip.<i>` on the gated map, and `gate.<i>` on the map from which the
    coefficients are computed. As in the paper the first skip connection has no gate.

    The published code differs from the paper: a 1x1 convolution and a normalization follow the
    gated map twice, another comes before the first gating signal, and the output is mixed from
    those of all decoder blocks. None of these is here.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: channels of the output, one for each class.
        channels: feature maps of each level; the last is the bottleneck.
        norm: `batch`, `instance` or `syncbatch`.
        activation: a name of MONAI's factory, as `relu`.
        upsample: `deconv` or `nontrainable`.
        gate_full_resolution: whether the first skip connection has a gate too, as in many later
            implementations.

    Raises:
        ValueError: no skip connection would have a gate.

    >>> network = AttentionUNet(2, 1, 2, channels=(8, 16, 32))
    >>> network(torch.zeros(1, 1, 50, 37)).shape
    torch.Size([1, 2, 50, 37])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int] = (32, 64, 128, 256, 512),
        norm: str = "batch",
        activation: str = "relu",
        upsample: str = "deconv",
        gate_full_resolution: bool = False,
    ) -> None:
        super().__init__(
            spatial_dims, in_channels, out_channels, channels, norm, activation, upsample
        )
        levels = range(0 if gate_full_resolution else 1, len(channels) - 1)
        if not levels:
            raise ValueError(
                f"with channels {tuple(channels)} only the first skip connection is left, and it "
                "has no gate: give three levels, or gate_full_resolution"
            )
        self.gate = nn.ModuleDict({str(level): Slot() for level in levels})
        self.attention = nn.ModuleDict(
            {
                str(i): AttentionGate(spatial_dims, channels[i], channels[i + 1], activation)
                for i in levels
            }
        )

    def leave(self, level: int, x: torch.Tensor) -> torch.Tensor:
        """Return the encoder's map."""
        return x

    def arrive(self, level: int, skip: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
        """Multiply the skip map by its coefficients."""
        key = str(level)
        if key in self.gate:
            gate: Any = self.attention[key]
            skip = skip * gate.coefficients(self.gate[key](gate.joined(skip, below)))
        arrived: torch.Tensor = self.skip[level](skip)
        return arrived

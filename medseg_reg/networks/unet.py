"""U-Net.

Olaf Ronneberger, Philipp Fischer, Thomas Brox, "U-Net: Convolutional Networks for Biomedical
Image Segmentation", MICCAI 2015, doi 10.1007/978-3-319-24574-4_28. 3-D: Ozgun Cicek et al.,
MICCAI 2016, doi 10.1007/978-3-319-46723-8_49.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.layers.factories import Conv, Pool
from torch import nn

from medseg_reg.insertion.slots import Slot
from medseg_reg.networks.blocks import ConvBlock, UpBlock
from medseg_reg.networks.padding import crop, needs_two_pixels, pad_to_multiple


class UNet(nn.Module):
    """U-Net in 2-D or 3-D for inputs of any size, with a slot at every place.

    Places: `input`; `encoder.<i>`, `bottleneck` and `decoder.<i>`, each with `between_convs`,
    `after_norm` and `after_block`; `skip.<i>`; `head` (before the last convolution). Level 0 has
    the full resolution. Unlike the paper, convolutions keep the size, normalization follows each
    of them, and inputs whose size is not divisible are padded inside and the output cropped (see
    `pad_to_multiple`; with instance normalization so far that two pixels are left at the bottom).

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: channels of the output, one for each class.
        channels: feature maps of each level; the last is the bottleneck.
        norm: `batch`, `instance` or `syncbatch`.
        activation: a name of MONAI's factory, as `relu`.
        upsample: `deconv` or `nontrainable`.

    Raises:
        ValueError: fewer than two levels.

    >>> network = UNet(2, 1, 2, channels=(8, 16, 32))
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
    ) -> None:
        super().__init__()
        if len(channels) < 2:
            raise ValueError(f"a U-Net has at least two levels, channels is {tuple(channels)}")
        self.spatial_dims = spatial_dims
        self.factor = 2 ** (len(channels) - 1)
        levels = range(len(channels) - 1)
        inputs = (in_channels, *channels)
        self.input = Slot()
        self.encoder = nn.ModuleList(
            ConvBlock(spatial_dims, inputs[i], channels[i], norm, activation) for i in levels
        )
        self.pool = Pool[Pool.MAX, spatial_dims](2)
        self.bottleneck = ConvBlock(spatial_dims, channels[-2], channels[-1], norm, activation)
        self.skip = nn.ModuleList(Slot() for _ in levels)
        self.decoder = nn.ModuleList(
            UpBlock(
                spatial_dims,
                channels[i + 1],
                channels[i],
                channels[i],
                norm,
                activation,
                upsample,
            )
            for i in levels
        )
        self.head = Slot()
        self.classify = Conv[Conv.CONV, spatial_dims](channels[0], out_channels, 1)
        self.two_at_least = needs_two_pixels(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, in_channels, *spatial) to logits (B, out_channels, *spatial)."""
        size = x.shape[2:]
        x = self.input(pad_to_multiple(x, self.factor, self.two_at_least))
        skips = []
        for level, block in enumerate(self.encoder):
            x = block(x)
            skips.append(self.leave(level, x))
            x = self.pool(x)
        x = self.bottleneck(x)
        for level in reversed(range(len(self.decoder))):
            x = self.decoder[level](x, self.arrive(level, skips[level], x))
        return crop(self.classify(self.head(x)), size)

    def leave(self, level: int, x: torch.Tensor) -> torch.Tensor:
        """Return what sets out on the skip connection of a level: the encoder's map."""
        skip: torch.Tensor = self.skip[level](x)
        return skip

    def arrive(self, level: int, skip: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
        """Return what the decoder gets by the skip connection; `below` is the map from below."""
        return skip

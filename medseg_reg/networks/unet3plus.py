"""UNet 3+.

Huimin Huang et al., "UNet 3+: A Full-Scale Connected UNet for Medical Image Segmentation",
ICASSP 2020, doi 10.1109/ICASSP40776.2020.9053405, arXiv:2004.08790.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.layers.factories import Conv, Pool
from monai.networks.layers.utils import get_act_layer
from torch import Tensor, nn
from torch.nn import functional

from medseg_reg.insertion.slots import Slot
from medseg_reg.networks.blocks import ConvBlock, conv_norm_act, convolution, normalization
from medseg_reg.networks.guided import ClassPresence, GuidedLogits, guide
from medseg_reg.networks.padding import crop, needs_two_pixels, pad_to_multiple

LINEAR = {2: "bilinear", 3: "trilinear"}


class FullScaleNode(nn.Module):
    """A decoder node: the maps of all levels, brought to one size and one width, and fused.

    each map: resize - conv - norm - activation; then
    concatenation - [between_convs] - conv - norm - [after_norm] - activation - [after_block]

    Args:
        spatial_dims: 2 or 3.
        level: the level of the node; the map of level i is shrunk by 2^(level - i), or enlarged.
        in_channels: channels of the map of each level.
        cat_channels: the width that each gets.
        norm: MONAI's name of the normalization.
        activation: MONAI's name of the activation.
        upsample: see `UNet3Plus`.
    """

    def __init__(
        self,
        spatial_dims: int,
        level: int,
        in_channels: Sequence[int],
        cat_channels: int,
        norm: str,
        activation: str,
        upsample: str,
    ) -> None:
        super().__init__()
        self.resize = nn.ModuleList(
            resizing(spatial_dims, level - i, channels, upsample)
            for i, channels in enumerate(in_channels)
        )
        self.unify = nn.ModuleList(
            conv_norm_act(spatial_dims, channels, cat_channels, norm, activation)
            for channels in in_channels
        )
        width = len(in_channels) * cat_channels
        self.between_convs = Slot()
        self.conv = convolution(spatial_dims, width, width, norm)
        self.norm = normalization(spatial_dims, width, norm)
        self.after_norm = Slot()
        self.act = get_act_layer(activation)
        self.after_block = Slot()

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Fuse maps that have been resized."""
        unified = [unify(x) for unify, x in zip(self.unify, maps, strict=True)]
        x = self.conv(self.between_convs(torch.cat(unified, dim=1)))
        fused: Tensor = self.after_block(self.act(self.after_norm(self.norm(x))))
        return fused


def resizing(spatial_dims: int, halvings: int, channels: int, upsample: str) -> nn.Module:
    """Return what shrinks a map by 2^halvings, or enlarges it where that is negative."""
    factor = 2 ** abs(halvings)
    if halvings == 0:
        return nn.Identity()
    if halvings > 0:
        pool: nn.Module = Pool[Pool.MAX, spatial_dims](factor)
        return pool
    if upsample == "nontrainable":
        return nn.Upsample(scale_factor=factor, mode=LINEAR[spatial_dims])
    # One kernel for each channel: a full one of size 16 would have millions of weights.
    deconv: nn.Module = Conv[Conv.CONVTRANS, spatial_dims](
        channels, channels, factor, stride=factor, groups=channels
    )
    return deconv


class UNet3Plus(nn.Module):
    """UNet 3+ in 2-D or 3-D for inputs of any size, with a slot at every place.

    With N levels, E_i the encoder's maps, D_N = E_N the bottleneck, C a 3x3 convolution with
    normalization and activation to `cat_channels` maps, and H one of N * cat_channels maps::

        D_j = H([C(pool(E_i)) for i < j], C(E_j), [C(up(D_i)) for i > j])

    So every decoder node joins N maps of equal width. Down by max-pooling, up by interpolation.

    Places: `input`; `encoder.<i>`, `bottleneck` and `decoder.<j>`, each with `between_convs`,
    `after_norm` and `after_block` (a decoder's `between_convs` is on the joined maps);
    `skip.<i>.<j>`, on the map of level i in the size of decoder j; `head` (before the last
    convolution). Level 0 has the full resolution.

    Deep supervision: in training a list of logits is returned, the finest first, one for each
    level, the bottleneck too; each is a 3x3 convolution, enlarged to the full size by
    interpolation. In evaluation the finest alone.

    Classification-guided: in training a `GuidedLogits`, whose `presence` is trained with binary
    cross-entropy by `presence_loss`; in evaluation classes that are not shown are taken out.

    The published code differs from the paper and from this: its classification branch makes its
    decision by argmax, so no gradient passes, and returns nothing to train it with, which leaves
    it at its random weights; it multiplies the segmentation in training too; it knows one organ
    and has a sigmoid inside; it needs inputs divisible by 16; its convolutions have biases before
    the normalization.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        out_channels: channels of the output, one for each class.
        channels: feature maps of each level; the last is the bottleneck.
        norm: `batch`, `instance` or `syncbatch`.
        activation: a name of MONAI's factory, as `relu`.
        upsample: `nontrainable`, interpolation as in the paper; or `deconv`, a transposed
            convolution of each channel by itself.
        cat_channels: width of each of the maps that a decoder node joins.
        deep_supervision: whether logits of every level are returned in training.
        classification_guided: whether the classes shown are predicted, and used in evaluation.

    Raises:
        ValueError: fewer than two levels.

    >>> network = UNet3Plus(2, 1, 2, channels=(8, 16, 32), cat_channels=8, deep_supervision=True)
    >>> [tuple(logits.shape) for logits in network(torch.zeros(1, 1, 50, 37))]
    [(1, 2, 50, 37), (1, 2, 50, 37), (1, 2, 50, 37)]
    >>> network.eval()(torch.zeros(1, 1, 50, 37)).shape
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
        upsample: str = "nontrainable",
        cat_channels: int = 64,
        deep_supervision: bool = False,
        classification_guided: bool = False,
    ) -> None:
        super().__init__()
        if len(channels) < 2:
            raise ValueError(f"a UNet 3+ has at least two levels, channels is {tuple(channels)}")
        self.spatial_dims = spatial_dims
        self.factor = 2 ** (len(channels) - 1)
        last = len(channels) - 1
        inputs = (in_channels, *channels)
        width = len(channels) * cat_channels
        self.input = Slot()
        self.encoder = nn.ModuleList(
            ConvBlock(spatial_dims, inputs[i], channels[i], norm, activation) for i in range(last)
        )
        self.pool = Pool[Pool.MAX, spatial_dims](2)
        self.bottleneck = ConvBlock(spatial_dims, channels[-2], channels[-1], norm, activation)
        self.skip = nn.ModuleList(
            nn.ModuleList(Slot() for _ in range(last)) for _ in range(last + 1)
        )
        self.decoder = nn.ModuleList(
            FullScaleNode(
                spatial_dims,
                level,
                [*channels[: level + 1], *[width] * (last - level - 1), channels[-1]],
                cat_channels,
                norm,
                activation,
                upsample,
            )
            for level in range(last)
        )
        self.head = Slot()
        conv = Conv[Conv.CONV, spatial_dims]
        self.classify = conv(width, out_channels, 3, padding=1)
        deeper = [*[width] * (last - 1), channels[-1]] if deep_supervision else []
        self.side = nn.ModuleList(conv(n, out_channels, 3, padding=1) for n in deeper)
        self.presence: ClassPresence | None = None
        if classification_guided:
            self.presence = ClassPresence(spatial_dims, channels[-1], max(1, out_channels - 1))
        self.two_at_least = needs_two_pixels(self)

    def forward(self, x: Tensor) -> Tensor | list[Tensor] | GuidedLogits:
        """Map images (B, in_channels, *spatial) to logits (B, out_channels, *spatial)."""
        size = x.shape[2:]
        padded = pad_to_multiple(x, self.factor, self.two_at_least)
        maps = self._encode(self.input(padded))
        deepest = maps[-1]
        skips: list[Any] = list(self.skip)
        for level in reversed(range(len(self.decoder))):
            node: Any = self.decoder[level]
            resized = [resize(m) for resize, m in zip(node.resize, maps, strict=True)]
            maps[level] = node([skips[i][level](m) for i, m in enumerate(resized)])
        whole = self.classify(self.head(maps[0]))
        if not self.training and self.presence is not None:
            whole = guide(whole, self.presence(deepest))
        finest = crop(whole, size)
        if not self.training:
            return finest
        logits: Tensor | list[Tensor] = finest
        if len(self.side):
            logits = [finest, *(crop(side, size) for side in self._sides(maps, whole.shape[2:]))]
        if self.presence is not None:
            return GuidedLogits(logits, self.presence(deepest))
        return logits

    def _encode(self, x: Tensor) -> list[Tensor]:
        """Return the maps of all levels, the finest first."""
        maps = []
        for block in self.encoder:
            x = block(x)
            maps.append(x)
            x = self.pool(x)
        return [*maps, self.bottleneck(x)]

    def _sides(self, maps: Sequence[Tensor], size: Sequence[int]) -> list[Tensor]:
        """Return the logits of the deeper levels in full size."""
        mode = LINEAR[self.spatial_dims]
        return [
            functional.interpolate(side(x), size=list(size), mode=mode)
            for side, x in zip(self.side, maps[1:], strict=True)
        ]

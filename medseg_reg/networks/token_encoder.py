"""The vision transformer inside a network, run on the patches that are visible."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from medseg_reg.errors import MedsegError
from medseg_reg.networks.foreign import ForeignNetwork
from medseg_reg.regularizers.patch_dropout import gather_tokens


class TokenEncoder(nn.Module):
    """A vision transformer of another package that runs on a part of its patches.

    It shares its weights with the network that it is taken from.

    Args:
        vit: the transformer.
        path: where the network has it.
        width: features of a token.
        patch: rows and columns of a patch.
    """

    def __init__(self, vit: nn.Module, path: str, width: int, patch: Sequence[int]) -> None:
        super().__init__()
        self.vit: Any = vit
        self.path, self.width, self.patch = path, width, (int(patch[0]), int(patch[1]))

    def forward(self, image: Tensor, kept: Tensor) -> Tensor:
        """Return what the blocks and the last normalization make of visible patches.

        Hidden patches are taken out before the first block, with their positions: they cost
        nothing, and no token knows of them.

        Args:
            image: (B, C, H, W), sides multiples of those of a patch.
            kept: numbers (B, k) of the visible patches, row after row.

        Returns:
            Their tokens (B, k, width), without class tokens.
        """
        raise NotImplementedError

    def weights(self) -> dict[str, Tensor]:
        """Return the weights by the names that they have in the network."""
        return {f"{self.path}.{name}": one for name, one in self.vit.state_dict().items()}


class MonaiEncoder(TokenEncoder):
    """The ViT of MONAI's UNETR."""

    def forward(self, image: Tensor, kept: Tensor) -> Tensor:
        """Return the tokens of visible patches."""
        x = gather_tokens(self.vit.patch_embedding(image), kept)
        for block in self.vit.blocks:
            x = block(x)
        tokens: Tensor = self.vit.norm(x)
        return tokens


class TimmEncoder(TokenEncoder):
    """The ViT of timm, inside the DPT of segmentation-models-pytorch; class tokens stay."""

    def forward(self, image: Tensor, kept: Tensor) -> Tensor:
        """Return the tokens of visible patches."""
        vit = self.vit
        x = vit._pos_embed(vit.patch_embed(image))
        prefix: int = vit.num_prefix_tokens
        x = torch.cat([x[:, :prefix], gather_tokens(x[:, prefix:], kept)], dim=1)
        tokens: Tensor = vit.norm(vit.blocks(vit.norm_pre(x)))
        return tokens[:, prefix:]


def token_encoder(network: nn.Module) -> TokenEncoder:
    """Return the transformer of a network, to run it on a part of the patches.

    Raises:
        MedsegError: the network has none that this is known of.
    """
    name = network.name if isinstance(network, ForeignNetwork) else type(network).__name__
    inner: Any = network.network if isinstance(network, ForeignNetwork) else network
    if name == "monai.UNETR":
        width = inner.vit.norm.normalized_shape[0]
        return MonaiEncoder(inner.vit, "network.vit", width, inner.patch_size)
    if name == "smp.DPT":
        from timm.models.vision_transformer import VisionTransformer

        vit = inner.encoder.model
        if type(vit) is VisionTransformer:
            path = "network.encoder.model"
            return TimmEncoder(vit, path, vit.embed_dim, vit.patch_embed.patch_size)
        name += f" with the encoder {inner.encoder.name} ({type(vit).__name__})"
    raise MedsegError(
        f"network: {name} has no encoder whose patches can be hidden. Use monai.UNETR, or smp.DPT "
        "with an encoder such as tu-vit_tiny_patch16_224."
    )


def grid_of(encoder: TokenEncoder, size: Sequence[int]) -> tuple[int, int]:
    """Return rows and columns of the patches of an image.

    Raises:
        MedsegError: its sides are no multiples of a patch's.
    """
    grid = tuple(side // patch for side, patch in zip(size, encoder.patch, strict=True))
    if math.prod(grid) * math.prod(encoder.patch) != math.prod(size):
        raise MedsegError(
            f"an image of {size[0]}x{size[1]} is not divided by patches of "
            f"{encoder.patch[0]}x{encoder.patch[1]}. Set data.image.size to multiples of them."
        )
    return grid[0], grid[1]

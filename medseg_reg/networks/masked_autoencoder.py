"""A masked autoencoder: the encoder of a network fills in hidden patches, without labels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medseg_reg.errors import MedsegError
from medseg_reg.networks.padding import pad_to_multiple
from medseg_reg.networks.token_encoder import TokenEncoder, grid_of
from medseg_reg.regularizers.patch_dropout import complete_tokens, kept_patches

_EPS = 1e-6  # added to the variance of a patch
_SPREAD = 0.02  # of a new mask token
_BASE = 10_000.0  # of the wavelengths of positions


def patches_of(image: Tensor, patch: Sequence[int]) -> Tensor:
    """Cut images (B, C, H, W) into patches (B, N, P Q C), row after row, channels last.

    >>> patches_of(torch.arange(8.0).view(1, 1, 2, 4), (2, 2)).tolist()
    [[[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]]]
    """
    batch, channels, height, width = image.shape
    p, q = patch
    x = image.reshape(batch, channels, height // p, p, width // q, q)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, p * q * channels)


def image_of(patches: Tensor, patch: Sequence[int], grid: Sequence[int]) -> Tensor:
    """Undo `patches_of`: patches (B, N, P Q C) of a grid become images (B, C, H, W)."""
    (p, q), (rows, columns) = patch, grid
    x = patches.reshape(len(patches), rows, columns, p, q, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, rows * p, columns * q)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of each patch (B, N, 1): sqrt(var + 1e-6), var over n - 1."""
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + _EPS).sqrt()


def reconstruction_loss(prediction: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """Return the mean squared error over the hidden patches; visible ones do not count.

        sum_n m_n mean_v (y_nv - t_nv)^2 / sum_n m_n

    Args:
        prediction: y, (B, N, V).
        target: t, alike.
        hidden: m, (B, N), true where a patch is hidden.

    >>> target = torch.zeros(1, 2, 3)
    >>> prediction = torch.tensor([[[5.0, 5.0, 5.0], [1.0, 1.0, 1.0]]])
    >>> float(reconstruction_loss(prediction, target, torch.tensor([[False, True]])))
    1.0
    """
    errors = (prediction.float() - target.float()).square().mean(-1)
    return (errors * hidden).sum() / hidden.sum()


def sincos_positions(grid: Sequence[int], width: int) -> Tensor:
    """Return fixed positions (rows * columns, width) of a grid: sines and cosines.

    One half of the features is for the column, the other for the row; with D features for an axis
    and i = 0, ..., D / 2 - 1 they are sin(x w_i) and then cos(x w_i), w_i = 10000^(-2 i / D).

    Args:
        grid: rows and columns.
        width: features, a multiple of 4.
    """
    quarter = width // 4
    waves = _BASE ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * waves for axis in reversed(axes)]
    return torch.cat([f(one) for one in angles for f in (torch.sin, torch.cos)], dim=1).float()


class MaskedAutoencoder(nn.Module):
    """Fills in hidden patches of an image from those that are visible.

    Of N patches k = max(1, floor((1 - ratio) N)) are visible, drawn for each image without
    replacement. The encoder gets these alone. In the decoder a learned token stands for each of the
    others; all tokens get the sines and cosines of their positions, run through a few blocks, and
    each one gives the pixels of its patch. The decoder is thrown away after the pre-training.

    Args:
        encoder: the transformer, of `token_encoder`.
        channels: of the images.
        size: rows and columns of the images.
        factor: to whose multiple they are padded, by repeating their border.
        ratio: share of the patches that are hidden.
        normalize: whether the target of a patch is (t - mean) / sqrt(var + 1e-6) of its own pixels.
        width: features of a token in the decoder, a multiple of 4.
        blocks: of the decoder.
        heads: of their attention.

    Attributes:
        grid: rows and columns of the patches.
        patches: how many they are, N.
        hidden_patches: how many of them are hidden.

    Raises:
        MedsegError: an image is not divided by the patches, or is a single one.

    Paper:
        K. He, X. Chen, S. Xie, Y. Li, P. Dollar, R. Girshick, "Masked Autoencoders Are Scalable
        Vision Learners", CVPR 2022, doi 10.1109/CVPR52688.2022.01553. Differences: positions of the
        encoder are those of the network, which UNETR and timm learn; the class token of the
        encoder, where it has one, does not go into the decoder.
    """

    def __init__(
        self,
        encoder: TokenEncoder,
        channels: int,
        size: Sequence[int],
        *,
        factor: int = 1,
        ratio: float = 0.75,
        normalize: bool = True,
        width: int = 512,
        blocks: int = 8,
        heads: int = 16,
    ) -> None:
        super().__init__()
        self.encoder, self.ratio, self.normalize = encoder, ratio, normalize
        self.factor = factor
        self.grid = grid_of(encoder, [-(-side // factor) * factor for side in size])
        self.patches = math.prod(self.grid)
        self.hidden_patches = self.patches - kept_patches(1, self.patches, ratio).shape[1]
        if not self.hidden_patches:
            raise MedsegError(
                f"an image of {size[0]}x{size[1]} is one patch of {encoder.patch[0]}x"
                f"{encoder.patch[1]}: nothing can be hidden. Raise data.image.size."
            )
        self.embed = nn.Linear(encoder.width, width)
        self.mask_token = nn.Parameter(_SPREAD * torch.randn(width))
        self.positions: Tensor
        self.register_buffer("positions", sincos_positions(self.grid, width), persistent=False)
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width,
                    heads,
                    4 * width,
                    dropout=0.0,
                    activation="gelu",
                    batch_first=True,
                    norm_first=True,
                )
                for _ in range(blocks)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, math.prod(encoder.patch) * channels)
        for part in (self.embed, self.blocks, self.head):
            part.apply(_begin)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Hide patches and return predictions of all (B, N, P Q C), and which were hidden (B, N).

        It hides them in evaluation mode too.
        """
        kept = kept_patches(len(image), self.patches, self.ratio, device=image.device)
        hidden = torch.ones(len(image), self.patches, dtype=torch.bool, device=image.device)
        hidden = hidden.scatter(1, kept, False)
        tokens = self.embed(self.encoder(self.padded(image), kept))
        x = complete_tokens(tokens, kept, self.patches, self.mask_token)
        x = self.blocks(x + self.positions.to(x.dtype))
        return self.head(self.norm(x)), hidden

    def targets(self, image: Tensor) -> Tensor:
        """Return what the predictions should be, (B, N, P Q C)."""
        patches = patches_of(self.padded(image), self.encoder.patch)
        if not self.normalize:
            return patches
        mean, deviation = patch_statistics(patches)
        return (patches - mean) / deviation

    def reconstructed(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return images without their hidden patches (NaN there), and with these filled in.

        Where targets are normalized, a predicted patch gets the mean and the deviation of the true
        one, which the network does not predict.
        """
        prediction, hidden = self(image)
        patches = patches_of(self.padded(image), self.encoder.patch)
        if self.normalize:
            mean, deviation = patch_statistics(patches)
            prediction = prediction * deviation + mean
        rows, columns = image.shape[2:]
        both = (
            torch.where(hidden[..., None], other, patches)
            for other in (torch.full_like(patches, torch.nan), prediction.to(patches.dtype))
        )
        seen, filled = (image_of(one, self.encoder.patch, self.grid) for one in both)
        return seen[..., :rows, :columns], filled[..., :rows, :columns]

    def padded(self, image: Tensor) -> Tensor:
        """Return images of the size that the encoder takes."""
        return pad_to_multiple(image, self.factor)


def _begin(part: nn.Module) -> None:
    """Give linear layers the new weights of the published code."""
    if isinstance(part, nn.Linear):
        nn.init.xavier_uniform_(part.weight)
        nn.init.zeros_(part.bias)

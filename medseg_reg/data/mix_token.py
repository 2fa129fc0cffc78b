"""MixToken for dense prediction: a box of patches of each image comes from another of the batch.

Z. Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers",
NeurIPS 2021, arXiv:2104.10858; after S. Yun et al., "CutMix", ICCV 2019, arXiv:1905.04899.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Rows and columns of patches: the first and one past the last of each.
Box = tuple[tuple[int, int], tuple[int, int]]


def draw_box(grid: Sequence[int], alpha: float = 1.0) -> Box:
    r"""Draw a box of patches.

    .. math::
        \lambda \sim \operatorname{Beta}(\alpha, \alpha), \qquad
        h = \lfloor \sqrt{1 - \lambda} \, H \rfloor, \quad
        w = \lfloor \sqrt{1 - \lambda} \, W \rfloor

    around a patch that is drawn evenly; what lies outside of the grid is cut off.

    Args:
        grid: H and W, rows and columns of patches.
        alpha: of the distribution; 1 is an even one.

    >>> _ = torch.manual_seed(0)
    >>> (top, bottom), (left, right) = draw_box((8, 8))
    >>> 0 <= top <= bottom <= 8, 0 <= left <= right <= 8
    (True, True)
    """
    side = math.sqrt(1 - float(torch.distributions.Beta(alpha, alpha).sample()))
    ranges = []
    for patches in grid:
        cut = int(side * patches)
        first = int(torch.randint(patches, ())) - cut // 2
        ranges.append((max(0, first), max(0, min(patches, first + cut))))
    return ranges[0], ranges[1]


def mix_tokens(x: Tensor, box: Box, patch: Sequence[int]) -> Tensor:
    """Return each entry of a batch with a box of patches from its partner.

    The partner of the first is the last, that of the second the last but one, and so on.

    Args:
        x: images (B, C, H, W) or label maps (B, H, W).
        box: see `draw_box`.
        patch: rows and columns of a patch, in pixels.

    >>> images = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1).expand(2, 1, 2, 4)
    >>> mix_tokens(images, ((0, 1), (1, 2)), (2, 2))[0, 0].tolist()
    [[1.0, 1.0, 2.0, 2.0], [1.0, 1.0, 2.0, 2.0]]
    """
    (top, bottom), (left, right) = box
    rows = slice(top * patch[0], bottom * patch[0])
    columns = slice(left * patch[1], right * patch[1])
    mixed = x.clone()
    mixed[..., rows, columns] = x[..., rows, columns].flip(0)
    return mixed


class MixToken:
    r"""Mixes the tokens of two images of a batch, and what they show.

    .. math:: \tilde x_a = M \odot x_b + (1 - M) \odot x_a, \quad
        \tilde t_a = M \odot t_b + (1 - M) \odot t_a

    with M a box of whole patches, the same for the batch, and b the partner of a. A patch
    embedding sees each patch alone, so that mixing the images is mixing the tokens; every other
    part of a network, as a convolution on the image, sees what the labels show too.

    Args:
        p: share of the batches that are mixed; published: all of them.
        alpha: see `draw_box`.
        patch: rows and columns of a patch, in pixels. Images are cut into patches from their
            first pixel; those at the end may be smaller.

    Raises:
        ValueError: an argument is out of range.

    How it differs from the paper: there the tokens are mixed inside of the network, the outputs
    of the tokens are taken apart again, and the label of the image is mixed by the area of M; a
    segmentation needs none of this, since its labels have places. The published code cuts boxes of
    an odd number of patches down to the next even one.

    >>> batch = {"image": torch.rand(2, 1, 32, 32), "mask": torch.zeros(2, 32, 32)}
    >>> MixToken(patch=(16, 16))(batch)["image"].shape
    torch.Size([2, 1, 32, 32])
    """

    def __init__(self, p: float = 1.0, alpha: float = 1.0, patch: Sequence[int] = (16, 16)) -> None:
        if not 0 <= p <= 1 or alpha <= 0 or len(patch) != 2 or min(patch) < 1:
            raise ValueError(
                f"expected p in [0, 1], alpha > 0, two sides of a patch; got {p}, {alpha}, {patch}"
            )
        self.p, self.alpha, self.patch = float(p), float(alpha), tuple(patch)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch with mixed `image` (B, C, H, W) and `mask` (B, H, W)."""
        if self.p == 0 or float(torch.rand(())) >= self.p:
            return dict(batch)
        size = batch["mask"].shape[1:]
        grid = [math.ceil(n / side) for n, side in zip(size, self.patch, strict=True)]
        box = draw_box(grid, self.alpha)
        mixed = {key: mix_tokens(batch[key], box, self.patch) for key in ("image", "mask")}
        return {**batch, **mixed}

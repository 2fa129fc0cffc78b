"""Patch Slimming: blocks of a transformer compute the rows of the same patches for every image.

Y. Tang, K. Han, Y. Wang, C. Xu, J. Guo, C. Xu, D. Tao, "Patch Slimming for Efficient Vision
Transformers", CVPR 2022, doi 10.1109/CVPR52688.2022.01185.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from medseg_reg.errors import MedsegError
from medseg_reg.networks.row_block import RowBlock, block_operations, whole_block
from medseg_reg.networks.token_encoder import token_encoder


def slim(network: nn.Module, keep: Tensor) -> tuple[int, int]:
    """Let blocks of a network that segments compute the rows of some patches alone, and save time.

    The other patches keep what they had before the block: its readers find every patch. All stay
    keys and values. `unslim` undoes it; the names of the weights stay.

    Args:
        network: monai.UNETR, or smp.DPT with a plain ViT; changed in place.
        keep: which patches each block computes, (blocks, N), boolean, as of `best_patches`.

    Returns:
        Multiply-adds of its blocks for one image, before and after.

    Raises:
        MedsegError: it is another network, it has layers in its blocks, or was slimmed already.
    """
    vit = token_encoder(network).vit
    rows = _with_prefix(vit, keep)
    blocks = [RowBlock(b, kept, reuse=True) for b, kept in zip(vit.blocks, rows, strict=True)]
    counts = [(len(kept), int(kept.sum())) for kept in rows]
    found = _operations(vit, [(every, every) for every, _ in counts]), _operations(vit, counts)
    _put(vit, blocks)
    return found


def slim_classifier(network: nn.Module, keep: Tensor) -> tuple[int, int]:
    """Take patches out of a classifier, block after block; the class tokens stay.

    A block gets the patches that the one before it kept, as keys and values, and hands on those
    that it keeps itself.

    Args:
        network: timm's vision transformer that reads its class token; changed in place.
        keep: which patches are left behind each block, (blocks, N), boolean; a block keeps none
            that the one before it has not. See `find_patches` of
            `patch_search`.

    Returns:
        Multiply-adds of its blocks for one image, before and after.

    Raises:
        MedsegError: patches come back, it reads its patches, has layers in its blocks, or was
            slimmed already.
    """
    vit: Any = network
    require_class_token(vit)
    rows = _with_prefix(vit, keep)
    there = torch.ones_like(rows[0])
    blocks, counts = [], []
    for number, (block, kept) in enumerate(zip(vit.blocks, rows, strict=True)):
        if (kept & ~there).any():
            raise MedsegError(
                f"block {number} keeps patches that the block before it has not: masks are nested"
            )
        blocks.append(RowBlock(block, kept[there]))
        counts.append((int(there.sum()), int(kept.sum())))
        there = kept
    whole = [(len(there), len(there))] * len(rows)
    found = _operations(vit, whole), _operations(vit, counts)
    _put(vit, blocks)
    return found


def unslim(network: nn.Module) -> None:
    """Undo `slim` or `slim_classifier`; a network that is whole stays as it is."""
    vit: Any = network if hasattr(network, "blocks") else token_encoder(network).vit
    for number, block in enumerate(vit.blocks):
        vit.blocks[number] = whole_block(block).train(block.training)


def _with_prefix(vit: Any, keep: Tensor) -> Tensor:
    """Return which tokens are kept, with the class tokens in front.

    Raises:
        MedsegError: there are not as many blocks, or they were slimmed already.
    """
    if any(isinstance(block, RowBlock) for block in vit.blocks):
        raise MedsegError("the network is slimmed already; call `unslim` first")
    if len(keep) != len(vit.blocks):
        raise MedsegError(f"masks are for {len(keep)} blocks, the network has {len(vit.blocks)}")
    prefix = int(getattr(vit, "num_prefix_tokens", 0))
    device = next(vit.parameters()).device
    front = torch.ones(len(keep), prefix, dtype=torch.bool, device=device)
    return torch.cat([front, keep.to(device)], dim=1)


def _operations(vit: Any, counts: list[tuple[int, int]]) -> int:
    """Return the multiply-adds of the blocks, by the tokens and the rows of each."""
    pairs = zip(vit.blocks, counts, strict=True)
    return sum(block_operations(block, *count) for block, count in pairs)


def require_class_token(vit: Any) -> None:
    """Refuse a transformer that reads its patches.

    Raises:
        MedsegError: says what is for such networks.
    """
    if getattr(vit, "global_pool", None) != "token" or not getattr(vit, "num_prefix_tokens", 0):
        raise MedsegError(
            "static slimming is for a vision transformer of timm that reads its class token "
            "(global_pool 'token'); with an output for each patch the nesting would keep them all. "
            "For networks that segment see `slim`."
        )


def _put(vit: Any, blocks: list[RowBlock]) -> None:
    for number, block in enumerate(blocks):
        vit.blocks[number] = block

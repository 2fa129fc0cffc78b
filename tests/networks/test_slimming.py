"""Blocks that compute some rows alone: equal to masks, cheaper, and found by the search."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from medseg_reg.errors import MedsegError
from medseg_reg.insertion import insert
from medseg_reg.networks.build import build_network
from medseg_reg.networks.patch_impact import best_patches, patch_impacts, rows_reused
from medseg_reg.networks.patch_search import find_patches
from medseg_reg.networks.row_block import RowBlock
from medseg_reg.networks.slice_classifier import build_classifier
from medseg_reg.networks.slimming import slim, slim_classifier, unslim
from medseg_reg.networks.token_encoder import token_encoder
from tests.networks.small_foreign import SMALL

SIZES = {"monai.UNETR": 48, "smp.DPT": 64}
DISTILLED = "deit_tiny_distilled_patch16_224"


def classifier(name: str = DISTILLED, depth: int = 4, **more: Any) -> Any:
    torch.manual_seed(0)
    tiny = {"patch_size": 8, "embed_dim": 12, "depth": depth, "num_heads": 3}
    network = build_classifier(name, 1, 2, (32, 32), **{**tiny, **more}).eval()
    for parameter in network.parameters():  # attention that is not the same everywhere
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return network


def nested(blocks: int = 4, patches: int = 16) -> Tensor:
    torch.manual_seed(1)
    order = torch.randperm(patches)
    keep = torch.zeros(blocks, patches, dtype=torch.bool)
    for number, count in enumerate((13, 6, 6, 0)):
        keep[number, order[:count]] = True
    return keep


def masked(vit: Any, images: Tensor, keep: Tensor) -> Tensor:
    """Run every block on all tokens: those left out are hidden as keys, and stay as they were."""
    x = vit._pos_embed(vit.patch_embed(images))
    front = torch.ones(len(keep), vit.num_prefix_tokens, dtype=torch.bool)
    there = torch.ones(x.shape[1], dtype=torch.bool)
    for block, rows in zip(vit.blocks, torch.cat([front, keep], 1), strict=True):
        x = torch.where(rows[:, None], block(x, attn_mask=there[None, None, None]), x)
        there = rows
    found: Tensor = vit.forward_head(vit.norm(x))
    return found


# Classifiers


@pytest.mark.parametrize("name", [DISTILLED, "deit_tiny_patch16_224", "deit3_small_patch16_224"])
def test_taking_patches_out_equals_hiding_them(name: str) -> None:
    scale = {"init_values": 0.5} if name.startswith("deit3") else {}
    network, images, keep = classifier(name, **scale), torch.rand(3, 1, 32, 32), nested()
    names = list(network.state_dict())
    with torch.no_grad():
        whole, expected = network(images), masked(network, images, keep)
        slim_classifier(network, keep)
        found = network(images)
        assert list(network.state_dict()) == names
        unslim(network)
        assert torch.equal(network(images), whole)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - whole).abs().max() > 1e-3


def test_the_patches_of_the_last_block_cost_no_quality() -> None:
    network, images = classifier(), torch.rand(2, 1, 32, 32)
    keep = torch.ones(4, 16, dtype=torch.bool)
    keep[-1] = False
    with torch.no_grad():
        whole = network(images)
        before, after = slim_classifier(network, keep)
        torch.testing.assert_close(network(images), whole)
    assert after < before


def test_the_operations_told_are_those_that_are_done() -> None:
    network, images = classifier(), torch.rand(1, 1, 32, 32)

    def counted() -> float:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network.blocks(torch.rand(1, 18, 12))
        return counter.get_total_flops() / 2

    whole = counted()
    told = slim_classifier(network, nested())
    assert told == (whole, counted())
    assert network(images).shape == (1, 2)


def test_a_slimmed_classifier_can_be_trained() -> None:
    network = classifier(drop_path_rate=0.1).train()
    slim_classifier(network, nested())
    logits, taught = network(torch.rand(2, 1, 32, 32))
    (logits.sum() + taught.sum()).backward()
    assert network.training
    assert all(p.grad is not None for p in network.blocks.parameters())


# Networks that segment


@pytest.mark.parametrize("name", list(SIZES))
def test_rows_that_are_left_out_are_those_that_are_reused(name: str) -> None:
    torch.manual_seed(0)
    network = build_network(in_channels=1, classes=2, head="softmax", name=name, **SMALL[name])
    images = torch.rand(2, 1, SIZES[name], SIZES[name])
    network.eval()
    keep = best_patches(patch_impacts(network, images), 0.5)
    names = list(network.state_dict())
    with torch.no_grad():
        whole = network(images)
        with rows_reused(network, keep):
            expected = network(images)
        before, after = slim(network, keep)
        torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)
        assert list(network.state_dict()) == names
        assert 0.5 * before < after < 0.9 * before
        unslim(network)
        assert torch.equal(network(images), whole)
    assert not torch.allclose(expected, whole)


def test_masks_are_for_one_size() -> None:
    torch.manual_seed(0)
    network = build_network(
        in_channels=1, classes=2, head="softmax", name="smp.DPT", **SMALL["smp.DPT"]
    ).eval()
    slim(network, torch.ones(12, 16, dtype=torch.bool))
    with pytest.raises(ValueError, match="slimmed for images of 17 tokens, this one has 37"):
        network(torch.rand(1, 1, 80, 80))


# What cannot be


def test_what_cannot_be_slimmed_is_told() -> None:
    keep = nested()
    with pytest.raises(MedsegError, match="masks are nested"):
        slim_classifier(classifier(), keep.flip(0))
    with pytest.raises(MedsegError, match="masks are for 3 blocks, the network has 4"):
        slim_classifier(classifier(), keep[:3])
    with pytest.raises(MedsegError, match="reads its class token"):
        find_patches(
            classifier("vit_tiny_patch16_224", global_pool="avg"), torch.rand(1, 1, 32, 32)
        )
    network = classifier()
    slim_classifier(network, keep)
    with pytest.raises(MedsegError, match="slimmed already"):
        slim_classifier(network, keep)


def test_blocks_with_layers_inserted_are_refused() -> None:
    network = build_network(
        in_channels=1, classes=2, head="softmax", name="monai.UNETR", **SMALL["monai.UNETR"]
    ).eval()
    insert(network, "drop_key", example=torch.rand(1, 1, 48, 48), p=0.2)
    with pytest.raises(MedsegError, match="has layers inserted"):
        slim(network, torch.ones(12, 9, dtype=torch.bool))
    assert not any(isinstance(one, RowBlock) for one in token_encoder(network).vit.blocks)

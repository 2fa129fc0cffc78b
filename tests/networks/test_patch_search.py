"""Which patches a classifier needs: nested, within the tolerance, as few as suffice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from medseg_reg.networks.patch_search import find_patches
from medseg_reg.networks.slimming import slim_classifier
from tests.networks.test_slimming import classifier


def test_the_search_nests_and_keeps_to_the_tolerance() -> None:
    network, images = classifier(), torch.rand(4, 1, 32, 32)
    before = {name: one.clone() for name, one in network.state_dict().items()}
    found = find_patches(network, images, tolerance=0.02, step=3)
    assert all(torch.equal(one, before[name]) for name, one in network.state_dict().items())
    assert found.keep.shape == (4, 16)
    assert not found.keep[-1].any()
    for block in range(3):
        assert (found.keep[block + 1] <= found.keep[block]).all()
        more = int((found.keep[block] & ~found.keep[block + 1]).sum())
        assert more % 3 == 0 or found.keep[block].all()
    assert max(found.errors) <= 0.02
    slim_classifier(network, found.keep)
    assert network(images).shape == (4, 2)


def test_a_block_gets_the_fewest_steps_of_best_patches_that_suffice() -> None:
    """By brute force for the block before the last, whose error and scores can be written out."""
    network, images = classifier(depth=2), torch.rand(4, 1, 32, 32)
    with torch.no_grad():
        x = network._pos_embed(network.patch_embed(images))
        y = network.blocks[0](x)
        truth = network.blocks[1](y)[:, :2]

        def weights(block: Any, z: Tensor) -> Tensor:
            q, k, _ = block.attn.qkv(block.norm1(z)).unflatten(2, (3, 3, 4)).permute(2, 0, 3, 1, 4)
            return (q @ k.transpose(2, 3) / 2).softmax(-1).double()

        last, own = weights(network.blocks[1], y), weights(network.blocks[0], x)
        # || A[:, i] ||^2 over the rows of the two class tokens, times || U[i] ||^2.
        a = last[:, :, :2].square().sum(2).mean(1)
        u = (own @ x.double().abs()[:, None]).square().sum(-1).mean(1)
        order = (a * u).mean(0)[2:].argsort(descending=True)
        errors = []
        for count in range(0, 18, 2):
            given = torch.cat([torch.arange(2), 2 + order[:count].sort().values])
            part = network.blocks[1](y[:, given])[:, :2]
            errors.append(float((part - truth).square().sum() / truth.square().sum()))
    tolerance = 1.01 * errors[3]
    count = 2 * next(number for number, error in enumerate(errors) if error <= tolerance)
    assert count > 0
    found = find_patches(network, images, tolerance, step=2)
    assert found.errors[0] == pytest.approx(errors[count // 2], rel=1e-3)
    assert set(found.keep[0].nonzero()[:, 0].tolist()) == set(order[:count].tolist())


def test_a_looser_tolerance_leaves_more_out() -> None:
    network, images = classifier(), torch.rand(4, 1, 32, 32)
    kept = [int(find_patches(network, images, one, 1).keep.sum()) for one in (0.0, 0.02, 0.5, 1e9)]
    assert kept == sorted(kept, reverse=True)
    assert (kept[0], kept[-1]) == (3 * 16, 0)


def test_patches_that_nobody_looks_at_are_left_out() -> None:
    """Keys of one half of the image are made so small that no query finds them."""
    network = classifier("deit_tiny_patch16_224", embed_dim=12, num_heads=1)
    with torch.no_grad():
        for block in network.blocks:
            block.norm1.weight.fill_(1)
            block.norm1.bias.zero_()
            block.attn.qkv.weight[:24].zero_()
            block.attn.qkv.bias[:12] = 1.0
            block.attn.qkv.weight[12:24, 0] = 40.0  # the key is the first feature
            block.attn.proj.weight.mul_(0.01)
            block.mlp.fc2.weight.zero_()
        network.pos_embed[..., 0] = -5.0
        network.pos_embed[:, 1:9, 0] = 5.0
        network.patch_embed.proj.weight.mul_(0.05)
    found = find_patches(network, torch.rand(2, 1, 32, 32), tolerance=1e-6, step=2)
    assert not found.keep[:, 8:].any()


def test_a_block_is_fine_tuned_to_need_fewer_patches() -> None:
    network, original = classifier(depth=3), classifier(depth=3)
    torch.manual_seed(3)
    images = torch.rand(8, 1, 32, 32)
    plain = find_patches(network, images, tolerance=3e-3, step=2)
    before = original.state_dict()
    assert all(torch.equal(one, before[name]) for name, one in network.state_dict().items())
    tuned = find_patches(network, images, tolerance=3e-3, step=2, epochs=30, lr=1e-3)
    assert all((tuned.keep.sum(1) < plain.keep.sum(1))[:2])
    assert max(tuned.errors) <= 3e-3
    changed = {n for n, one in network.state_dict().items() if not torch.equal(one, before[n])}
    assert {name.rpartition("blocks.")[2][0] for name in changed} == {"0", "1"}
    assert all(parameter.grad is None for parameter in network.parameters())
    # The error of the first is that of what it gives the second, which was tuned before it.
    with torch.no_grad():
        x = network._pos_embed(network.patch_embed(images))
        rows = torch.cat([torch.ones(2, dtype=torch.bool), tuned.keep[1]])
        truth = network.blocks[1](original.blocks[0](x))[:, rows]
        slim_classifier(network, tuned.keep)
        found = network.blocks[:2](x)
    error = (found - truth).square().sum() / truth.square().sum()
    assert float(error) == pytest.approx(tuned.errors[0], rel=1e-3)


def test_weights_that_do_not_help_are_taken_back() -> None:
    network = classifier(depth=2)
    before = {name: one.clone() for name, one in network.state_dict().items()}
    torch.manual_seed(3)
    find_patches(network, torch.rand(8, 1, 32, 32), tolerance=1e-9, step=8, epochs=1, lr=10.0)
    assert all(torch.equal(one, before[name]) for name, one in network.state_dict().items())

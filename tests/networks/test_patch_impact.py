"""The impact of patches is that of every choice of heads, and rows that do not count can stay."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medseg_reg.errors import MedsegError
from medseg_reg.networks.build import Network, build_network
from medseg_reg.networks.patch_impact import (
    best_patches,
    impacts,
    patch_impacts,
    read_blocks,
    rows_reused,
)
from tests.networks.small_foreign import SMALL

SIZES = {"monai.UNETR": 48, "smp.DPT": 64}


def network(name: str, **more: Any) -> Network:
    torch.manual_seed(0)
    arguments = {**SMALL[name], **more}
    return build_network(in_channels=1, classes=2, head="softmax", name=name, **arguments).eval()


def brute_force(attentions: list[Tensor], inputs: list[Tensor], taps: set[int]) -> np.ndarray:
    """For each token of each block the mean squared norm of A[:, i] U[i, :] over all choices."""
    weights = [one[0].double().numpy() for one in attentions]
    heads, tokens = range(len(weights[0])), len(weights[0][0])
    found = np.zeros((len(weights), tokens))
    for block in range(len(weights)):
        for last in taps:
            if last < block:
                continue
            norms = []
            for own, *later in itertools.product(heads, repeat=last - block + 1):
                a = np.eye(tokens)
                for number, head in enumerate(later, start=block + 1):
                    a = weights[number][head] @ a
                u = weights[block][own] @ np.abs(inputs[block][0].double().numpy())
                outer = [np.outer(a[:, i], u[i]) for i in range(tokens)]
                norms.append([np.linalg.norm(one) ** 2 for one in outer])
            found[block] += np.mean(norms, axis=0)
    return found


@pytest.mark.parametrize("taps", [{3}, {1, 3}])
def test_the_recursion_is_the_mean_over_every_choice_of_heads(taps: set[int]) -> None:
    torch.manual_seed(0)
    attentions = [torch.randn(1, 3, 5, 5).softmax(-1) for _ in range(4)]
    inputs = [torch.randn(1, 5, 6) for _ in range(4)]
    found = impacts(attentions, inputs, taps)[0]
    np.testing.assert_allclose(found, brute_force(attentions, inputs, taps), rtol=1e-6)


def test_a_patch_that_no_later_one_looks_at_has_no_impact() -> None:
    attentions = [torch.full((1, 2, 4, 4), 0.25) for _ in range(2)]
    attentions[1][..., 2] = 0
    attentions[1] /= attentions[1].sum(-1, keepdim=True)
    found = impacts(attentions, [torch.ones(1, 4, 3)] * 2, {1})[0]
    assert found[0, 2] == 0
    assert (found[0, [0, 1, 3]] > 0).all()
    assert (found[1] > 0).all()  # of the last block every patch is read


@pytest.mark.parametrize("name", list(SIZES))
def test_the_weights_are_those_of_the_network_and_it_is_left_as_it_was(name: str) -> None:
    model, size = network(name), SIZES[name]
    images = torch.rand(2, 1, size, size)
    with torch.no_grad():
        before = model(images)
    found = patch_impacts(model, images)
    assert found.shape == (2, 12, (size // 16) ** 2)
    assert found.isfinite().all()
    assert (found >= 0).all()
    assert not torch.allclose(found[0], found[1])
    with torch.no_grad():
        assert torch.equal(model(images), before)


def test_blocks_that_the_decoder_reads_are_known() -> None:
    assert read_blocks(network("monai.UNETR")) == {3, 6, 9, 11}
    assert read_blocks(network("smp.DPT")) == {2, 5, 8, 11}


@pytest.mark.parametrize("name", list(SIZES))
def test_rows_that_are_reused_keep_what_they_had(name: str) -> None:
    model, size = network(name), SIZES[name]
    images = torch.rand(1, 1, size, size)
    inner: Any = model.network
    vit = inner.vit if name == "monai.UNETR" else inner.encoder.model
    every = torch.ones(12, (size // 16) ** 2, dtype=torch.bool)
    with torch.no_grad():
        whole = model(images)
        with rows_reused(model, every):
            assert torch.equal(model(images), whole)
        some = every.clone()
        some[4, 1:] = False
        seen: list[Tensor] = []
        hooks = [
            vit.blocks[n].register_forward_pre_hook(lambda _, a: seen.append(a[0])) for n in (4, 5)
        ]
        with rows_reused(model, some):
            changed = model(images)
        for hook in hooks:
            hook.remove()
        assert torch.equal(model(images), whole)
    assert not torch.equal(changed, whole)
    prefix = seen[0].shape[1] - some.shape[1]
    assert torch.equal(seen[0][:, prefix + 1 :], seen[1][:, prefix + 1 :])
    assert not torch.isclose(seen[0][:, prefix], seen[1][:, prefix]).all()


def test_the_best_patches_are_chosen_for_each_block_over_all_images() -> None:
    scores = torch.tensor([[[1.0, 5.0, 2.0], [0.0, 0.0, 9.0]], [[6.0, 0.0, 2.0], [0.0, 1.0, 0.0]]])
    assert best_patches(scores, 0.34).int().tolist() == [[1, 0, 0], [0, 0, 1]]
    assert best_patches(scores, 1.0).all()
    assert best_patches(scores, 0.01).sum(1).tolist() == [1, 1]


def test_a_network_without_one_sequence_of_tokens_is_refused() -> None:
    with pytest.raises(MedsegError, match="has no encoder whose patches"):
        patch_impacts(network("smp.Unet"), torch.rand(1, 1, 64, 64))

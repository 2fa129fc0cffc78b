"""Signed distances and the boundary loss."""

from __future__ import annotations

import monai.losses
import numpy as np
import pytest
import torch

from medseg_reg.losses import MixedLoss, boundary_loss, signed_distance
from tests.reference import losses as reference


def blobs(shape, seed=0, share=0.4):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator) < share).float()


@pytest.mark.parametrize("shape", [(2, 2, 7, 9), (1, 1, 4, 5, 6), (1, 2, 1, 8), (2, 1, 1, 1)])
def test_distances_equal_those_of_all_pairs(shape):
    masks = blobs(shape)
    counted = blobs((shape[0], 1, *shape[2:]), seed=1, share=0.8).bool()
    for valid, kept in ((None, torch.ones_like(counted)), (counted, counted)):
        inside = masks * kept
        got = signed_distance(inside, valid)
        assert got.dtype == torch.float32
        for b, c in np.ndindex(shape[:2]):
            expected = reference.signed_distance(inside[b, c].numpy() == 1, kept[b, 0].numpy())
            np.testing.assert_allclose(got[b, c].numpy(), expected, rtol=1e-6, atol=1e-6)


def test_distances_are_negative_inside_and_zero_along_the_outline():
    mask = torch.zeros(1, 1, 9, 9)
    mask[..., 2:7, 2:7] = 1
    distances = signed_distance(mask)[0, 0]
    assert distances[4, 4] == -2
    assert (distances[2, 2:7] == 0).all()
    assert distances[0, 4] == 2
    assert ((distances <= 0) == (mask[0, 0] == 1)).all()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_mask_without_outline_has_no_distances(value):
    assert (signed_distance(torch.full((1, 1, 5, 6), value)) == 0).all()


def test_no_distance_is_taken_to_ignored_pixels():
    mask = torch.tensor([[[[1.0, 0.0, 0.0, 0.0, 0.0]]]])
    counted = torch.tensor([[[[True, False, False, True, True]]]])
    assert signed_distance(mask, counted).tolist() == [[[[-2.0, 0.0, 0.0, 3.0, 4.0]]]]


@pytest.mark.skipif(not hasattr(monai.losses, "BoundaryLoss"), reason="needs MONAI 1.6")
def test_it_equals_monai():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 12, 13, generator=generator)
    target = torch.randint(0, 3, (2, 12, 13), generator=generator)
    theirs = monai.losses.BoundaryLoss(softmax=True, to_onehot_y=True, include_background=False)
    ours = MixedLoss(ce=0, boundary=1)(logits, target)
    torch.testing.assert_close(ours, theirs(logits, target))


def test_what_is_far_from_the_outline_costs_more_and_what_is_deep_inside_gains_more():
    mask = torch.zeros(1, 1, 1, 16)
    mask[..., :8] = 1
    distances = signed_distance(mask)
    costs = []
    for place in (0, 7, 8, 15):
        maps = torch.zeros_like(mask)
        maps[..., place] = 1
        costs.append(boundary_loss(maps, distances).item())
    assert costs == sorted(costs)
    assert costs[0] < costs[1] == 0 < costs[2] < costs[3]


def test_the_distances_of_an_image_are_made_once_for_all_outputs(monkeypatch):
    from medseg_reg.losses import mixed

    made = []
    monkeypatch.setattr(
        mixed, "signed_distance", lambda *given: made.append(given) or signed_distance(*given)
    )
    logits = torch.zeros(1, 2, 8, 8)
    MixedLoss(boundary=1)([logits, logits, logits], torch.ones(1, 8, 8).long())
    assert len(made) == 1

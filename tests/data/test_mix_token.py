"""Boxes of whole patches travel between the images of a batch, with their labels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from medseg_reg.data import mix_token
from medseg_reg.data.mix_token import MixToken, draw_box, mix_tokens
from medseg_reg.networks.token_labels import patch_occupancy
from tests.reference import token_labels as reference

BOXES = [((1, 3), (0, 2)), ((0, 0), (1, 2)), ((0, 4), (0, 3)), ((3, 4), (2, 3))]


def batch(size: tuple[int, int] = (16, 12), count: int = 3) -> dict[str, Any]:
    return {
        "image": torch.rand(count, 2, *size),
        "mask": torch.randint(0, 3, (count, *size), dtype=torch.uint8),
        "case": torch.arange(count),
    }


@pytest.mark.parametrize("size", [(16, 12), (14, 9)])
@pytest.mark.parametrize("box", BOXES)
def test_each_image_has_the_box_of_its_partner(box: Any, size: tuple[int, int]) -> None:
    one = batch(size)
    for x in (one["image"], one["mask"]):
        before = x.clone()
        found = mix_tokens(x, box, (4, 4))
        np.testing.assert_array_equal(found.numpy(), reference.mixed(x.numpy(), box, (4, 4)))
        assert torch.equal(x, before)


def test_mixing_images_is_mixing_the_tokens_of_a_patch_embedding() -> None:
    x, embed = torch.rand(2, 1, 16, 12), nn.Conv2d(1, 5, 4, 4)
    for box in BOXES:
        tokens = embed(mix_tokens(x, box, (4, 4)))
        torch.testing.assert_close(tokens, mix_tokens(embed(x), box, (1, 1)))


def test_labels_of_tokens_are_mixed_as_tokens_are() -> None:
    mask = batch()["mask"]
    for box in BOXES:
        found = patch_occupancy(mix_tokens(mask, box, (4, 4)), 3, (4, 4))
        assert torch.equal(found, mix_tokens(patch_occupancy(mask, 3, (4, 4)), box, (1, 1)))


def test_a_box_has_the_drawn_area_around_a_patch_drawn_evenly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)

    class Fixed:
        def __init__(self, a: float, b: float) -> None:
            pass

        def sample(self) -> float:
            return 0.75

    monkeypatch.setattr(torch.distributions, "Beta", Fixed)
    met = set()
    for _ in range(400):
        (top, bottom), (left, right) = draw_box((10, 7))
        # sqrt(0.25) of 10 and 7: 5 and 3; less where it would leave the grid.
        assert bottom - top == 5 or top == 0 or bottom == 10
        assert right - left == 3 or left == 0 or right == 7
        met.add((top, left))
    assert {top for top, _ in met} == set(range(8))
    assert {left for _, left in met} == set(range(6))


def test_the_area_that_stays_follows_the_beta_distribution(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(torch, "randint", lambda high, shape: torch.tensor(high // 2))
    for alpha, spread in ((1.0, math.sqrt(1 / 12)), (4.0, math.sqrt(1 / 36))):
        shares = []
        for _ in range(800):
            (top, bottom), (left, right) = draw_box((500, 500), alpha)
            shares.append(1 - (bottom - top) * (right - left) / 500**2)
        assert np.mean(shares) == pytest.approx(0.5, abs=0.03)
        assert np.std(shares) == pytest.approx(spread, abs=0.02)


def test_a_share_of_the_batches_is_mixed_and_the_rest_of_a_batch_stays() -> None:
    torch.manual_seed(0)
    one, mixing, changed = batch(), MixToken(0.3, patch=(4, 4)), 0
    boxes: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mix_token, "draw_box", lambda *_: boxes.append(1) or BOXES[0])
        for _ in range(1000):
            found = mixing(one)
            same = torch.equal(found["image"], one["image"])
            assert torch.equal(found["mask"], one["mask"]) == same
            assert found["case"] is one["case"]
            changed += not same
    assert changed == len(boxes)
    assert changed / 1000 == pytest.approx(0.3, abs=0.05)


def test_a_share_of_nothing_draws_nothing() -> None:
    one, state = batch(), torch.get_rng_state()
    found = MixToken(p=0.0)(one)
    assert all(found[key] is value for key, value in one.items())
    assert torch.equal(torch.get_rng_state(), state)


def test_patches_at_the_end_may_be_smaller() -> None:
    one = batch((14, 9))
    torch.manual_seed(0)
    for _ in range(20):
        found = MixToken(patch=(4, 4))(one)
        assert found["image"].shape == one["image"].shape
    whole = mix_tokens(one["image"], ((0, 4), (0, 3)), (4, 4))
    assert torch.equal(whole, one["image"].flip(0))


@pytest.mark.parametrize(
    "arguments", [{"p": 1.5}, {"alpha": 0.0}, {"patch": (0, 4)}, {"patch": (4,)}]
)
def test_an_argument_out_of_range_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected p in \[0, 1\], alpha > 0"):
        MixToken(**arguments)

"""Deep supervision: a list of outputs, the finest first."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from medseg_reg.losses import MixedLoss
from tests.losses.test_terms import ALL, NAMES, example


def outputs(channels, spatial, levels=3):
    logits, target = example(channels, spatial)
    generator = torch.Generator().manual_seed(5)
    coarse = [
        torch.randn(2, channels, *[max(1, n // 2**k) for n in spatial], generator=generator)
        for k in range(1, levels)
    ]
    return [logits, *coarse], target


@pytest.mark.parametrize(
    ("supervision", "shares"),
    [
        ("equal", [1 / 3, 1 / 3, 1 / 3]),
        ("halving", [4 / 7, 2 / 7, 1 / 7]),
        ([3.0, 1.0, 0.0], [0.75, 0.25, 0.0]),
    ],
)
@pytest.mark.parametrize("spatial", [(23, 22), (5, 12, 11)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_loss_is_the_weighted_mean_of_those_of_the_upsampled_outputs(
    channels, spatial, supervision, shares
):
    many, target = outputs(channels, spatial)
    loss = MixedLoss(**ALL, supervision=supervision)
    mode = "bilinear" if len(spatial) == 2 else "trilinear"
    full = [F.interpolate(x, size=spatial, mode=mode, align_corners=False) for x in many]
    got, each = loss.components(many, target), [loss.components(x, target) for x in full]
    for name in NAMES:
        expected = sum(share * one[name] for share, one in zip(shares, each, strict=True))
        torch.testing.assert_close(got[name], expected)
    torch.testing.assert_close(loss(many, target), loss.combine(got))


def test_equal_outputs_cost_as_much_as_one():
    logits, target = example(3, (12, 13))
    for supervision in ("equal", "halving", [2.0, 1.0]):
        loss = MixedLoss(**ALL, supervision=supervision)
        torch.testing.assert_close(loss([logits, logits], target), loss(logits, target))


def test_one_output_is_the_plain_loss_whatever_the_weights():
    logits, target = example(3, (12, 13))
    expected = MixedLoss(**ALL)(logits, target)
    for supervision in ("equal", "halving", [0.0, 1.0]):
        loss = MixedLoss(**ALL, supervision=supervision)
        assert torch.equal(loss([logits], target), expected)
        assert torch.equal(loss(logits, target), expected)


def test_every_output_gets_a_gradient():
    many, target = outputs(2, (24, 24))
    many = [x.requires_grad_() for x in many]
    MixedLoss(**ALL)(many, target).backward()
    for x in many:
        assert x.grad.isfinite().all()
        assert x.grad.abs().sum() > 0


def test_labels_are_never_made_smaller():
    """A line of one pixel is seen by the coarsest output; nearest downsampling would lose it."""
    target = torch.zeros(1, 16, 16, dtype=torch.long)
    target[:, 5] = 1
    coarse = torch.zeros(1, 1, 4, 4, requires_grad=True)
    loss = MixedLoss(ce=1, supervision=[0.0, 1.0])
    loss([torch.zeros(1, 1, 16, 16), coarse], target).backward()
    rows = coarse.grad[0, 0].sum(dim=1)
    assert rows.argmin() == 1
    assert rows[1] < rows[3]


def test_ignored_pixels_give_no_gradient_to_outputs_of_full_size():
    logits, target = example(3, (12, 13), ignored=255)
    many = [logits.clone().requires_grad_() for _ in range(2)]
    MixedLoss(**ALL, ignore=255)(many, target).backward()
    for x in many:
        assert (x.grad.movedim(1, -1)[target == 255] == 0).all()


def test_a_nan_in_any_output_makes_every_term_nan():
    many, target = outputs(2, (12, 12))
    many[2][0, 0, 0, 0] = float("nan")
    for name, term in MixedLoss(**ALL).components(many, target).items():
        assert term.isnan(), name


def test_half_precision_outputs_are_compared_in_float32():
    many, target = outputs(2, (12, 12))
    halves = [x.bfloat16() for x in many]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = MixedLoss(**ALL)(halves, target)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, MixedLoss(**ALL)([x.float() for x in halves], target))


def test_outputs_that_do_not_belong_together_are_an_error():
    logits, target = example(2, (8, 8))
    with pytest.raises(ValueError, match=r"shape \(2, 3, 4, 4\), the first \(2, 2, 8, 8\)"):
        MixedLoss()([logits, torch.zeros(2, 3, 4, 4)], target)
    with pytest.raises(ValueError, match=r"expected the same batch, channels and number of axes"):
        MixedLoss()([logits, torch.zeros(2, 2, 4, 4, 4)], target)
    with pytest.raises(ValueError, match=r"target has shape \(2, 8, 8\), expected \(2, 4, 4\)"):
        MixedLoss()([torch.zeros(2, 2, 4, 4), logits], target)
    with pytest.raises(ValueError, match="empty list"):
        MixedLoss()([], target)
    with pytest.raises(ValueError, match="supervision holds 3 weights for 2 outputs"):
        MixedLoss(supervision=[1, 1, 1])([logits, logits], target)

"""Every term of the mixed loss against its formula, and its gradient against differences."""

from __future__ import annotations

import math

import monai.losses
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from medseg_reg.losses import (
    MixedLoss,
    cross_entropy,
    dice_loss,
    focal_loss,
    iou_loss,
    ms_ssim_scales,
    ssim_window,
    tversky_loss,
)
from tests.reference import losses as reference

NAMES = ("ce", "dice", "ssim", "focal", "iou", "tversky", "ms_ssim", "boundary")
ALL = dict.fromkeys(NAMES, 1.0)


def example(channels, spatial, batch=2, seed=0, ignored=None):
    """Return logits and labels; the labels of a corner and of some pixels may be ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(batch, channels, *spatial, generator=generator)
    target = torch.randint(0, max(2, channels), (batch, *spatial), generator=generator)
    if ignored is not None:
        target[:, : spatial[0] // 4 + 1] = ignored
        target[-1][tuple(n - 1 for n in spatial)] = ignored
    return logits, target


def expected_terms(logits, target, **options):
    spatial = tuple(target.shape[1:])
    x, t = logits.detach().double().numpy(), target.numpy()
    return reference.all_terms(
        x, t, window=ssim_window(spatial), exponents=ms_ssim_scales(spatial), **options
    )


def agree(terms, expected, tolerance=5e-6):
    assert list(terms) == list(NAMES)
    for name, term in terms.items():
        assert term.dtype == torch.float32
        assert term.shape == ()
        assert term.item() == pytest.approx(expected[name], rel=tolerance, abs=tolerance), name


@pytest.mark.parametrize("spatial", [(22, 24), (4, 12, 11), (5, 9), (1, 6), (1, 1), (2, 1, 3)])
@pytest.mark.parametrize("channels", [1, 3])
def test_each_term_equals_its_formula(channels, spatial):
    logits, target = example(channels, spatial)
    agree(MixedLoss(**ALL).components(logits, target), expected_terms(logits, target))


@pytest.mark.parametrize("channels", [1, 3])
def test_each_option_follows_the_formula(channels):
    logits, target = example(channels, (9, 10))
    classes = [0.5, 3.0, 1.0][: max(2, channels)]
    regions = [2.0, 5.0, 0.25][: max(2, channels)]
    loss = MixedLoss(
        **ALL,
        class_weights=classes,
        region_weights=regions,
        label_smoothing=0.1,
        focal_gamma=0.7,
        tversky_alpha=0.2,
        tversky_beta=1.1,
        tversky_gamma=4 / 3,
        include_background=True,
    )
    expected = expected_terms(
        logits, target, weights=classes, region_weights=regions, smoothing=0.1, gamma=0.7,
        tversky_parameters=(0.2, 1.1, 4 / 3), background=True,
    )  # fmt: skip
    agree(loss.components(logits, target), expected)
    plain = MixedLoss(**ALL).components(logits, target)
    for name, term in loss.components(logits, target).items():
        # With one channel there is one region, whatever its weight.
        changed = channels > 1 or name in ("ce", "focal", "tversky")
        assert (term != plain[name]) == changed, name


@pytest.mark.parametrize(("channels", "ignore"), [(1, None), (3, None), (1, 255), (3, 255)])
def test_each_gradient_equals_the_slope_of_its_formula(channels, ignore):
    logits, target = example(channels, (22, 23), batch=1, ignored=ignore)
    logits.requires_grad_()
    terms = MixedLoss(**ALL, ignore=ignore, tversky_gamma=1.5).components(logits, target)
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(logits.shape, generator=generator)
    step = 1e-4
    options = {"ignore": ignore, "tversky_parameters": (0.3, 0.7, 1.5)}
    ahead, behind = (
        expected_terms(logits.double() + sign * step * direction, target, **options)
        for sign in (1, -1)
    )
    for name, term in terms.items():
        (gradient,) = torch.autograd.grad(term, logits, retain_graph=True)
        slope = (ahead[name] - behind[name]) / (2 * step)
        got = (gradient.double() * direction).sum().item()
        assert got == pytest.approx(slope, rel=2e-4, abs=2e-6), name


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_of_the_pixel_terms_are_exact_in_double(gamma, weighted):
    logits, target = example(3, (2, 3), ignored=0)
    logits = logits.double().requires_grad_()
    weights = torch.tensor([0.5, 2.0, 1.0]).double() if weighted else None
    counted = torch.rand(target.shape, generator=torch.Generator().manual_seed(1)) > 0.3
    for term in (
        lambda x: focal_loss(x, target, counted, weights, gamma),
        lambda x: cross_entropy(x, target, counted, weights, 0.1),
    ):
        assert torch.autograd.gradcheck(term, logits)


def test_gradients_of_the_overlap_terms_are_exact_in_double():
    logits, target = example(3, (2, 3))
    masks = F.one_hot(target, 3).movedim(-1, 1).double()
    logits = logits.double().requires_grad_()
    for term in (dice_loss, iou_loss, tversky_loss, lambda p, t: tversky_loss(p, t, gamma=4 / 3)):
        assert torch.autograd.gradcheck(lambda x, term=term: term(x.softmax(1), masks), logits)


def test_focal_without_gamma_is_the_weighted_cross_entropy():
    logits, target = example(3, (6, 7))
    terms = MixedLoss(ce=1, focal=1, focal_gamma=0, class_weights=[1, 5, 2]).components(
        logits, target
    )
    torch.testing.assert_close(terms["focal"], terms["ce"])


def test_focal_leaves_out_what_is_easy():
    target = torch.zeros(1, 1, 2, dtype=torch.long)
    hard, easy = torch.tensor([[[[-2.0, 2.0]]]]), torch.tensor([[[[-4.0, -4.0]]]])
    ratios = [
        (MixedLoss(ce=0, focal=1, focal_gamma=gamma)(easy, target)
         / MixedLoss(ce=0, focal=1, focal_gamma=gamma)(hard, target)).item()
        for gamma in (0.0, 1.0, 3.0)
    ]  # fmt: skip
    assert ratios[0] > 10 * ratios[1] > 1000 * ratios[2] > 0


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("scale", [50.0, 1e4])
def test_focal_stays_finite_for_extreme_logits(gamma, scale):
    logits, target = example(3, (4, 4))
    logits = (scale * logits.sign()).requires_grad_()
    loss = MixedLoss(ce=0, focal=1, focal_gamma=gamma)(logits, target)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    assert logits.grad.abs().sum() > 0


def test_monai_focal_is_a_class_count_smaller_and_blind_without_background():
    logits, target = example(3, (6, 7))
    ours = MixedLoss(ce=0, focal=1)(logits, target)
    theirs = monai.losses.FocalLoss(to_onehot_y=True, use_softmax=True)(logits, target[:, None])
    torch.testing.assert_close(ours, 3 * theirs)
    two, target = example(2, (6, 7))
    blind = monai.losses.FocalLoss(to_onehot_y=True, use_softmax=True, include_background=False)
    assert blind(two, target[:, None]) == 0
    one = two[:, 1:] - two[:, :1]
    binary = monai.losses.FocalLoss()(one, target[:, None].float())
    torch.testing.assert_close(MixedLoss(ce=0, focal=1)(one, target), binary)
    torch.testing.assert_close(MixedLoss(ce=0, focal=1)(two, target), binary)


def test_tversky_holds_dice_and_iou():
    logits, target = example(3, (6, 7))
    for name, weight in (("dice", 0.5), ("iou", 1.0)):
        loss = MixedLoss(ce=0, tversky=1, tversky_alpha=weight, tversky_beta=weight)
        torch.testing.assert_close(
            loss(logits, target), MixedLoss(**{"ce": 0, name: 1})(logits, target), rtol=1e-5, atol=0
        )


def test_tversky_punishes_what_is_missed_by_beta_and_what_is_invented_by_alpha():
    target = torch.zeros(1, 8, 8, dtype=torch.long)
    target[:, :4] = 1
    missing, inventing = torch.full((2, 1, 1, 8, 8), -9.0)
    missing[..., :2, :] = 9.0
    inventing[..., :6, :] = 9.0
    loss = MixedLoss(ce=0, tversky=1, tversky_alpha=0.2, tversky_beta=0.8)
    mirrored = MixedLoss(ce=0, tversky=1, tversky_alpha=0.8, tversky_beta=0.2)
    assert loss(missing, target) > loss(inventing, target)
    assert mirrored(missing, target) < mirrored(inventing, target)


@pytest.mark.parametrize("gamma", [0.75, 4 / 3, 3.0])
def test_focal_tversky_has_a_finite_slope_where_nothing_is_left_to_learn(gamma):
    target = torch.ones(1, 8, 8, dtype=torch.long)
    logits = torch.full((1, 1, 8, 8), 200.0, requires_grad=True)
    loss = MixedLoss(ce=0, tversky=1, tversky_gamma=gamma)(logits, target)
    loss.backward()
    assert 0 <= loss < 0.02
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_every_term_stays_finite_for_extreme_logits(channels):
    logits, target = example(channels, (12, 12))
    logits = (logits * 1e4).requires_grad_()
    for name, term in MixedLoss(**ALL, tversky_gamma=1.3).components(logits, target).items():
        assert term.isfinite(), name
        (gradient,) = torch.autograd.grad(term, logits, retain_graph=True)
        assert gradient.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [1, 3])
def test_autocast_does_not_lower_the_precision_of_any_term(channels, dtype):
    logits, target = example(channels, (23, 24))
    half = logits.to(dtype).requires_grad_()
    loss = MixedLoss(**ALL)
    with torch.autocast("cpu", dtype=dtype):
        inside = loss.components(half, target)
    outside = loss.components(half.detach().float(), target)
    for name, term in inside.items():
        assert term.dtype == torch.float32
        assert torch.equal(term, outside[name]), name
    sum(inside.values()).backward()
    assert half.grad.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_logit_that_is_not_finite_makes_every_term_nan(channels, bad):
    logits, target = example(channels, (12, 12))
    logits[1, 0, 3, 4] = bad
    for name, term in MixedLoss(**ALL).components(logits, target).items():
        assert term.isnan(), name


@pytest.mark.parametrize("name", NAMES)
def test_a_better_segmentation_costs_less(name):
    _, target = example(3, (24, 24), batch=1)
    target = target[:, :6, :6].repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
    right = F.one_hot(target, 3).movedim(-1, 1).float()
    loss = MixedLoss(**{"ce": 0.0, name: 1.0})
    costs = [loss(scale * right, target).item() for scale in (-6.0, 0.0, 2.0, 6.0)]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) == 4


def test_every_term_is_the_same_for_one_channel_and_two():
    one, target = example(1, (23, 22))
    two = torch.cat([torch.zeros_like(one), one], dim=1)
    loss = MixedLoss(**ALL, class_weights=[1.0, 3.0], region_weights=[0.0, 2.0])
    first, second = loss.components(one, target), loss.components(two, target)
    for name in NAMES:
        torch.testing.assert_close(first[name], second[name])


def test_the_order_of_the_batch_and_the_memory_format_do_not_matter():
    logits, target = example(3, (23, 22), batch=3)
    expected = MixedLoss(**ALL)(logits, target)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(MixedLoss(**ALL)(logits[order], target[order]), expected)
    last = logits.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(MixedLoss(**ALL)(last, target), expected)
    flipped = MixedLoss(**ALL)(logits.flip(3), target.flip(2))
    # Multi-scale blocks begin at the other end, so MS-SSIM needs an even size.
    torch.testing.assert_close(flipped, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"focal_gamma": -1.0}, r"focal_gamma is -1\.0"),
        ({"focal_gamma": math.nan}, r"focal_gamma is nan"),
        ({"tversky_alpha": 0.0, "tversky_beta": 0.0}, r"tversky_alpha is 0\.0 and tversky_beta 0"),
        ({"tversky_beta": -0.5}, r"tversky_beta -0\.5: expected finite values >= 0"),
        ({"tversky_gamma": 0.0}, r"tversky_gamma is 0\.0, expected a finite value > 0"),
        ({"boundary": -1.0}, r"'boundary': -1\.0"),
        ({"region_weights": [1.0, 0.0]}, r"region_weights \[0\.0\] of the classes that count"),
        ({"region_weights": [0.0, 0.0]}, r"region_weights \[0\.0, 0\.0\]"),
        ({"supervision": "half"}, r"supervision is 'half', expected 'equal', 'halving'"),
        ({"supervision": [1.0, -1.0]}, r"supervision \[1\.0, -1\.0\]"),
    ],
)
def test_impossible_options_are_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        MixedLoss(**options)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_wrong_number_of_region_weights_is_an_error(channels):
    logits, target = example(channels, (4, 4))
    with pytest.raises(
        ValueError, match=f"region_weights hold 4 values, expected {max(2, channels)}"
    ):
        MixedLoss(dice=1, region_weights=[1.0] * 4)(logits, target)


def test_the_options_show_in_print():
    shown = repr(MixedLoss(ce=0, focal=1, tversky=2, region_weights=[0, 1], ignore=255))
    assert (
        "focal=1, tversky=2, region_weights=[0.0, 1.0], focal_gamma=2, tversky_alpha=0.3" in shown
    )
    assert "ignore=255" in shown


def test_numpy_reference_is_independent_of_torch():
    assert not any(isinstance(value, torch.Tensor) for value in vars(reference).values())
    assert reference.focal(np.zeros((1, 2, 1, 1)), np.zeros((1, 1, 1), int)) == pytest.approx(
        0.25 * math.log(2)
    )

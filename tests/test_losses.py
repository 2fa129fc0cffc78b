"""The losses against their formulas, and the traps that other code fell into."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import structural_similarity
from torch.nn import functional as F

from medseg_reg.losses import MixedLoss, check_labels, mixed, ssim_window
from tests.reference import losses as reference

SHAPES = [(12, 15), (11, 12, 13), (5, 9)]
ALL = {"ce": 1.0, "dice": 1.0, "ssim": 1.0}


def example(channels, spatial, batch=2, dtype=torch.int64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(batch, channels, *spatial, generator=generator)
    target = torch.randint(0, max(2, channels), (batch, *spatial), generator=generator)
    return logits, target.to(dtype)


def reference_terms(logits, target, include_background=False):
    x, t = logits.double().numpy(), target.numpy()
    channels, window = x.shape[1], ssim_window(x.shape[2:])
    if channels == 1:
        maps, masks = reference.sigmoid(x), t[:, None].astype(np.float64)
        ce = reference.binary_cross_entropy(x, t)
    else:
        first = 0 if include_background else 1
        maps, masks = reference.softmax(x)[:, first:], reference.one_hot(t, channels)[:, first:]
        ce = reference.cross_entropy(x, t)
    dice = reference.soft_dice(maps, masks)
    return {"ce": ce, "dice": dice, "ssim": reference.ssim_loss(maps, masks, window)}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("spatial", SHAPES)
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_each_term_equals_its_formula(channels, spatial, dtype):
    logits, target = example(channels, spatial, dtype=dtype)
    terms = MixedLoss(**ALL).components(logits, target)
    expected = reference_terms(logits, target)
    assert list(terms) == ["ce", "dice", "ssim"]
    for name, term in terms.items():
        assert term.dtype == torch.float32
        assert term.shape == ()
        assert term.item() == pytest.approx(expected[name], rel=2e-6, abs=2e-6), name


@pytest.mark.parametrize("channels", [2, 4])
def test_the_background_counts_in_dice_and_ssim_on_request_only(channels):
    logits, target = example(channels, (12, 13))
    terms = MixedLoss(**ALL, include_background=True).components(logits, target)
    expected = reference_terms(logits, target, include_background=True)
    for name, term in terms.items():
        assert term.item() == pytest.approx(expected[name], rel=2e-6, abs=2e-6), name
    without = MixedLoss(**ALL).components(logits, target)
    assert without["ce"] == terms["ce"]
    assert without["dice"] != terms["dice"]
    assert without["ssim"] != terms["ssim"]


def test_the_loss_is_the_weighted_sum_of_its_terms():
    logits, target = example(3, (12, 12))
    loss = MixedLoss(ce=0.5, dice=2.0, ssim=0.25)
    terms = loss.components(logits, target)
    expected = 0.5 * terms["ce"] + 2.0 * terms["dice"] + 0.25 * terms["ssim"]
    torch.testing.assert_close(loss(logits, target), expected)
    torch.testing.assert_close(loss.combine(terms), loss(logits, target), rtol=0, atol=0)


def test_a_term_without_weight_is_not_computed():
    logits, target = example(2, (12, 12))
    assert list(MixedLoss(ce=0, dice=1).components(logits, target)) == ["dice"]
    assert list(MixedLoss(ce=0, ssim=1).components(logits, target)) == ["ssim"]
    assert list(MixedLoss().components(logits, target)) == ["ce"]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, [0.3, 2.0, 1.0], [0.0, 1.0, 5.0]])
def test_class_weights_and_smoothing_follow_the_formula_and_torch(weights, smoothing):
    logits, target = example(3, (7, 8))
    loss = MixedLoss(class_weights=weights, label_smoothing=smoothing)
    got = loss(logits, target).item()
    x, t = logits.double().numpy(), target.numpy()
    assert got == pytest.approx(reference.cross_entropy(x, t, weights, smoothing), rel=2e-6)
    tensor = None if weights is None else torch.tensor(weights)
    same = F.cross_entropy(logits, target, tensor, label_smoothing=smoothing)
    assert got == pytest.approx(same.item(), rel=2e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 4.0)])
def test_one_channel_is_weighted_smoothed_binary_cross_entropy(weights, smoothing):
    logits, target = example(1, (7, 8))
    got = MixedLoss(class_weights=weights, label_smoothing=smoothing)(logits, target).item()
    x, t = logits.double().numpy(), target.numpy()
    expected = reference.binary_cross_entropy(x, t, weights, smoothing)
    assert got == pytest.approx(expected, rel=2e-6)
    if weights == (1.0, 1.0):
        soft = target.float() * (1 - smoothing) + smoothing / 2
        same = F.binary_cross_entropy_with_logits(logits[:, 0], soft)
        assert got == pytest.approx(same.item(), rel=2e-6)


def test_one_channel_cross_entropy_is_not_zero():
    """MONAI's DiceCELoss runs a softmax over the single channel there: always 0."""
    logits, target = example(1, (12, 12))
    logits.requires_grad_()
    loss = MixedLoss()(logits, target)
    loss.backward()
    assert loss > 0.1
    assert logits.grad.abs().min() > 0


def test_one_channel_equals_two_channels_with_a_zero_logit():
    one, target = example(1, (13, 12))
    two = torch.cat([torch.zeros_like(one), one], dim=1)
    loss = MixedLoss(**ALL, class_weights=[1.0, 3.0], label_smoothing=0.1)
    torch.testing.assert_close(loss(one, target), loss(two, target))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_batch_whose_labels_all_weigh_zero_costs_nothing(channels, smoothing):
    logits = torch.randn(1, channels, 4, 4, requires_grad=True)
    error = MixedLoss(class_weights=[0.0, 1.0], label_smoothing=smoothing)
    loss = error(logits, torch.zeros(1, 4, 4).long())
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_dice_pools_the_batch():
    logits, target = example(2, (6, 6), batch=3)
    target[1] = 0
    together = MixedLoss(ce=0, dice=1)(logits, target)
    strip = MixedLoss(ce=0, dice=1)(
        logits.transpose(0, 1).reshape(1, 2, 18, 6), target.reshape(1, 18, 6)
    )
    torch.testing.assert_close(together, strip)


def test_a_perfect_prediction_costs_almost_nothing():
    _, target = example(3, (16, 16))
    logits = 60.0 * F.one_hot(target, 3).movedim(-1, 1).float()
    for term in MixedLoss(**ALL).components(logits, target).values():
        assert abs(term.item()) < 1e-5


@pytest.mark.parametrize("spatial", [(16, 17), (11, 12, 13)])
def test_ssim_equals_scikit_image(spatial):
    logits, target = example(1, spatial, batch=1)
    term = MixedLoss(ce=0, ssim=1)(logits, target)
    expected = structural_similarity(
        torch.sigmoid(logits)[0, 0].double().numpy(),
        target[0].double().numpy(),
        data_range=1.0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert term.item() == pytest.approx(1 - expected, rel=2e-6)


def test_the_ssim_window_shrinks_axis_by_axis():
    assert ssim_window((11, 512)) == (11, 11)
    assert ssim_window((10, 9)) == (9, 9)
    assert ssim_window((1, 2, 40)) == (1, 1, 11)


@pytest.mark.parametrize("spatial", [(1, 1), (3, 5), (10, 10), (1, 64), (1, 1, 1), (2, 3, 12)])
@pytest.mark.parametrize("channels", [1, 3])
def test_tiny_images_work_and_pull(channels, spatial):
    logits, target = example(channels, spatial)
    logits.requires_grad_()
    terms = MixedLoss(**ALL).components(logits, target)
    expected = reference_terms(logits.detach(), target)
    for name, term in terms.items():
        assert term.item() == pytest.approx(expected[name], rel=5e-6, abs=5e-6), name
        (gradient,) = torch.autograd.grad(term, logits, retain_graph=True)
        assert gradient.isfinite().all(), name
        assert gradient.abs().sum() > 0, name


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_gradients_are_finite_and_not_zero_for_extreme_logits(channels):
    logits, target = example(channels, (12, 12))
    logits = (logits * 40).requires_grad_()
    MixedLoss(**ALL)(logits, target).backward()
    assert logits.grad.isfinite().all()
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [1, 3])
def test_autocast_does_not_lower_the_precision(channels, dtype):
    logits, target = example(channels, (12, 12))
    half = logits.to(dtype).requires_grad_()
    loss = MixedLoss(**ALL)
    with torch.autocast("cpu", dtype=dtype):
        inside = loss(half, target)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, loss(half.detach().float(), target))
    inside.backward()
    assert half.grad.dtype == dtype
    assert half.grad.isfinite().all()


@pytest.mark.parametrize("include_background", [False, True])
def test_channels_last_and_strided_logits_give_the_same_loss(include_background):
    logits, target = example(3, (12, 14))
    loss = MixedLoss(**ALL, include_background=include_background)
    expected = loss(logits, target)
    last = logits.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(loss(last, target), expected)
    torch.testing.assert_close(loss(last[:1], target[:1]), loss(logits[:1], target[:1]))
    flipped = loss(logits.transpose(2, 3), target.transpose(1, 2))
    torch.testing.assert_close(flipped, expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_logit_that_is_not_finite_makes_every_term_nan(channels, bad):
    logits, target = example(channels, (12, 12))
    logits[1, 0, 3, 4] = bad
    for name, term in MixedLoss(**ALL).components(logits, target).items():
        assert term.isnan(), name


@pytest.mark.parametrize("wrong", [-100, -1, 3, 255])
def test_labels_out_of_range_are_an_error_on_the_cpu(wrong):
    logits, target = example(3, (4, 4))
    target[0, 0, 0] = wrong
    low, high = min(wrong, 0), max(wrong, 2)
    with pytest.raises(ValueError, match=rf"labels span {low}\.\.{high}, expected 0\.\.2"):
        MixedLoss(dice=1)(logits, target)


def test_one_channel_takes_labels_zero_and_one():
    logits, target = example(1, (4, 4))
    assert MixedLoss()(logits, target.bool()) == MixedLoss()(logits, target)
    with pytest.raises(ValueError, match=r"labels span 0\.\.2, expected 0\.\.1"):
        MixedLoss()(logits, target * 2)


@pytest.mark.parametrize("wrong", [-1, 255])
def test_unchecked_labels_out_of_range_make_every_term_nan(monkeypatch, wrong):
    """What a GPU does, where the check would make the host wait."""
    monkeypatch.setattr(mixed, "check_labels", lambda *arguments: None)
    logits, target = example(3, (12, 12))
    target[0, 0, 0] = wrong
    for name, term in MixedLoss(**ALL).components(logits, target).items():
        assert term.isnan(), name


def test_check_labels_accepts_empty_and_boolean_maps():
    check_labels(torch.zeros(0, 4, 4, dtype=torch.uint8), 2)
    check_labels(torch.ones(1, 2, dtype=torch.bool), 2)


@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        ((1, 2, 4, 4), (1, 1, 4, 4), r"target has shape \(1, 1, 4, 4\), expected \(1, 4, 4\)"),
        ((1, 2, 4, 4), (1, 4, 5), r"target has shape \(1, 4, 5\), expected \(1, 4, 4\)"),
        ((2, 4, 4), (2, 4), r"of shape \(2, 4, 4\), expected floats of shape \(B, K, H, W\)"),
        ((0, 2, 4, 4), (0, 4, 4), r"of shape \(0, 2, 4, 4\)"),
    ],
)
def test_shapes_that_do_not_match_are_an_error(logits, target, message):
    with pytest.raises(ValueError, match=message) as caught:
        MixedLoss()(torch.zeros(logits), torch.zeros(target).long())
    assert "\n" not in str(caught.value)


def test_types_that_do_not_match_are_an_error():
    with pytest.raises(ValueError, match=r"logits are torch\.int64"):
        MixedLoss()(torch.zeros(1, 2, 4, 4).long(), torch.zeros(1, 4, 4).long())
    with pytest.raises(ValueError, match=r"labels are torch\.float32, expected integers"):
        MixedLoss()(torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ce": 0.0}, r"loss weights .* at least one of them > 0"),
        ({"dice": -1.0}, r"loss weights .*'dice': -1\.0.* expected finite values >= 0"),
        ({"ssim": math.nan}, r"loss weights"),
        ({"label_smoothing": 1.0}, r"label_smoothing is 1\.0, expected 0 <= s < 1"),
        ({"class_weights": [1.0, -2.0]}, r"class_weights \[1\.0, -2\.0\]"),
        ({"class_weights": [0.0, 0.0]}, r"class_weights \[0\.0, 0\.0\]"),
        ({"class_weights": [[1.0, 2.0]]}, r"class_weights have shape \(1, 2\)"),
    ],
)
def test_impossible_options_are_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        MixedLoss(**options)


@pytest.mark.parametrize(("channels", "expected"), [(1, 2), (2, 2), (4, 4)])
def test_a_wrong_number_of_class_weights_is_an_error(channels, expected):
    logits, target = example(channels, (4, 4))
    with pytest.raises(ValueError, match=f"hold 3 values, expected {expected}"):
        MixedLoss(class_weights=[1.0, 1.0, 1.0])(logits, target)


def test_the_loss_leaves_no_trace_in_a_checkpoint_and_shows_its_weights():
    loss = MixedLoss(ce=1, dice=0.5, class_weights=[1, 2], label_smoothing=0.1)
    assert loss.state_dict() == {}
    assert "ce=1, dice=0.5, class_weights=[1.0, 2.0], label_smoothing=0.1" in repr(loss)


@pytest.mark.parametrize("spatial", [(12, 13), (4, 5, 6)])
def test_flipping_image_and_mask_leaves_the_loss(spatial):
    logits, target = example(3, spatial)
    loss = MixedLoss(**ALL)
    for axis in range(1, 1 + len(spatial)):
        flipped = loss(logits.flip(axis + 1), target.flip(axis))
        torch.testing.assert_close(flipped, loss(logits, target))


def test_the_loss_does_not_depend_on_the_order_of_the_batch():
    logits, target = example(2, (12, 12), batch=4)
    order = torch.tensor([2, 0, 3, 1])
    loss = MixedLoss(**ALL)
    torch.testing.assert_close(loss(logits[order], target[order]), loss(logits, target))


@settings(max_examples=20, deadline=None, database=None, derandomize=True)
@given(
    channels=st.sampled_from([1, 2, 5]),
    spatial=st.lists(st.integers(1, 14), min_size=2, max_size=3),
    batch=st.integers(1, 3),
    scale=st.sampled_from([0.0, 1.0, 1e4]),
    seed=st.integers(0, 1000),
)
def test_any_shape_gives_finite_terms_in_range(channels, spatial, batch, scale, seed):
    logits, target = example(channels, spatial, batch, torch.uint8, seed)
    logits = (logits * scale).requires_grad_()
    terms = MixedLoss(**ALL).components(logits, target)
    assert terms["ce"] >= 0
    assert -1e-6 <= terms["dice"] <= 1 + 1e-6
    assert -1e-5 <= terms["ssim"] <= 2 + 1e-5
    sum(terms.values()).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_step_on_the_gpu_never_makes_the_host_wait_and_agrees_with_the_cpu(
    channels, memory_format
):
    logits, target = example(channels, (32, 33), batch=1)
    weights = [1.0] * max(2, channels)
    expected = MixedLoss(**ALL, class_weights=weights)(logits, target)
    loss = MixedLoss(**ALL, class_weights=weights).cuda()
    logits = logits.cuda().contiguous(memory_format=memory_format).requires_grad_()
    target = target.cuda()
    loss(logits, target).backward()  # the first call loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = loss(logits, target)
        value.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(value.cpu(), expected, rtol=1e-5, atol=1e-5)

"""Pixels with the ignored label count in no term."""

from __future__ import annotations

import pytest
import torch

from medseg_reg.losses import MixedLoss, check_labels, ms_ssim_loss, ssim_loss
from medseg_reg.losses import mixed as module
from tests.losses.test_terms import ALL, NAMES, agree, example, expected_terms

EXACT = ("ce", "focal", "dice", "iou", "tversky")


@pytest.mark.parametrize("ignored", [255, -1])
@pytest.mark.parametrize("spatial", [(22, 23), (12, 9), (4, 12, 11)])
@pytest.mark.parametrize("channels", [1, 3])
def test_each_term_equals_its_formula_over_the_other_pixels(channels, spatial, ignored):
    logits, target = example(channels, spatial, ignored=ignored)
    loss = MixedLoss(**ALL, ignore=ignored)
    agree(loss.components(logits, target), expected_terms(logits, target, ignore=ignored))


def test_labels_of_one_byte_may_be_ignored():
    logits, target = example(3, (8, 9), ignored=255)
    loss = MixedLoss(**ALL, ignore=255)
    assert torch.equal(loss(logits, target.to(torch.uint8)), loss(logits, target))


@pytest.mark.parametrize("channels", [1, 3])
def test_ignored_pixels_get_no_gradient_at_all(channels):
    logits, target = example(channels, (24, 23), ignored=255)
    logits.requires_grad_()
    terms = MixedLoss(**ALL, ignore=255, label_smoothing=0.1).components(logits, target)
    ignored = (target == 255).unsqueeze(1).expand_as(logits)
    for name, term in terms.items():
        (gradient,) = torch.autograd.grad(term, logits, retain_graph=True)
        assert (gradient[ignored] == 0).all(), name
        assert gradient[~ignored].abs().sum() > 0, name


@pytest.mark.parametrize("channels", [1, 3])
def test_the_logits_of_ignored_pixels_change_nothing(channels):
    logits, target = example(channels, (24, 23), ignored=255)
    other = torch.where((target == 255).unsqueeze(1), 30 * torch.randn_like(logits), logits)
    loss = MixedLoss(**ALL, ignore=255)
    expected, got = loss.components(logits, target), loss.components(other, target)
    for name in NAMES:
        assert torch.equal(got[name], expected[name]), name


@pytest.mark.parametrize("channels", [1, 3])
def test_the_value_is_that_of_the_image_without_the_ignored_pixels(channels):
    logits, target = example(channels, (12, 30))
    target[:, :, 18:] = 255
    loss = MixedLoss(**ALL, ignore=255)
    cut = MixedLoss(**ALL)
    got = loss.components(logits, target)
    expected = cut.components(logits[..., :18], target[..., :18])
    for name in (*EXACT, "ssim", "ms_ssim", "boundary"):
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-6)


def test_scattered_ignored_pixels_count_for_no_pixel_term():
    logits, target = example(3, (10, 11))
    keep = torch.rand(target.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    masked = target.masked_fill(~keep, 255)
    got = MixedLoss(**ALL, ignore=255).components(logits, masked)
    # The pixels that are left, as an image of one row.
    row = logits.movedim(1, -1)[keep].T[None, :, None]
    expected = MixedLoss(**ALL).components(row, target[keep][None, None])
    for name in EXACT:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_of_ignored_pixels_alone_is_finite_and_without_gradient(channels):
    logits, target = example(channels, (23, 22))
    logits.requires_grad_()
    terms = MixedLoss(**ALL, ignore=255).components(logits, torch.full_like(target, 255))
    for name, term in terms.items():
        assert term.item() == pytest.approx(0, abs=1e-6), name
    sum(terms.values()).backward()
    assert (logits.grad == 0).all()


def test_an_ignored_image_does_not_change_the_mean_over_the_others():
    logits, target = example(3, (23, 22), batch=2)
    target[1] = 255
    both = MixedLoss(**ALL, ignore=255).components(logits, target)
    first = MixedLoss(**ALL, ignore=255).components(logits[:1], target[:1])
    for name in NAMES:
        torch.testing.assert_close(both[name], first[name])


def test_windows_with_an_ignored_pixel_are_left_out():
    p, t = torch.rand(2, 1, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    counted = torch.ones(1, 1, 24, 24, dtype=torch.bool)
    counted[..., 5, 5] = False
    # Each window of 11 that begins in row and column 0 to 5 holds that pixel.
    assert ssim_loss(p, t, counted) != ssim_loss(p, t)
    torch.testing.assert_close(
        ssim_loss(p, t, counted) * (14 * 14 - 36),
        ssim_loss(p, t) * 14 * 14 - ssim_loss(p[..., :16, :16], t[..., :16, :16]) * 36,
        rtol=1e-4,
        atol=1e-4,
    )
    counted[..., ::8, ::8] = False
    assert ssim_loss(p, t, counted) == 0
    assert ms_ssim_loss(p, t, counted) == 0


@pytest.mark.parametrize("ignore", [0, 1, 2])
def test_an_ignored_class_has_no_region_terms(ignore):
    logits, target = example(3, (10, 11))
    loss = MixedLoss(**ALL, ignore=ignore, include_background=True)
    expected = expected_terms(logits, target, ignore=ignore, background=True)
    agree(loss.components(logits, target), expected)


def test_ignoring_the_one_class_of_the_regions_is_an_error():
    logits, target = example(1, (4, 4))
    with pytest.raises(ValueError, match="ignore is 1, the one foreground class"):
        MixedLoss(dice=1, ignore=1)(logits, target)
    logits, target = example(2, (4, 4))
    with pytest.raises(ValueError, match="ignore is 1, the one class that counts"):
        MixedLoss(dice=1, ignore=1)(logits, target)
    assert MixedLoss(ce=1, ignore=1)(logits, target).isfinite()


def test_other_labels_out_of_range_stay_an_error(monkeypatch):
    logits, target = example(3, (4, 4), ignored=255)
    target[0, 3, 3] = 7
    message = r"labels span 0\.\.7, expected 0\.\.2 or 255, the ignored label"
    with pytest.raises(ValueError, match=message):
        MixedLoss(**ALL, ignore=255)(logits, target)
    monkeypatch.setattr(module, "check_labels", lambda *arguments: None)
    for name, term in MixedLoss(**ALL, ignore=255).components(logits, target).items():
        assert term.isnan(), name


def test_check_labels_accepts_the_ignored_label_alone():
    check_labels(torch.full((2, 2), 255, dtype=torch.uint8), 2, ignore=255)
    with pytest.raises(ValueError, match=r"labels span 1\.\.5"):
        check_labels(torch.tensor([1, 5, 255]), 2, ignore=255)

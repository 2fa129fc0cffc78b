"""Multi-scale SSIM: its scales, MONAI's value where it has one, and the traps around it."""

from __future__ import annotations

import pytest
import torch
from monai.metrics.regression import compute_ms_ssim

from medseg_reg.losses import MixedLoss, ms_ssim_loss, ms_ssim_scales, ssim_loss
from medseg_reg.losses.similarity import SCALES
from tests.reference import losses as reference


def maps(spatial, batch=1, classes=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, classes, *spatial, generator=generator)


def test_scales_are_those_at_which_a_whole_window_fits():
    for size, scales in ((1, 1), (21, 1), (22, 2), (43, 2), (44, 3), (88, 4), (175, 4), (176, 5)):
        assert len(ms_ssim_scales((size, 400))) == scales
        assert sum(ms_ssim_scales((size,))) == pytest.approx(1)
    assert len(ms_ssim_scales((4000, 4000))) == 5
    assert ms_ssim_scales((44, 44))[0] / ms_ssim_scales((44, 44))[2] == SCALES[0] / SCALES[2]


def test_with_one_scale_it_is_ssim():
    p, t = maps((15, 21)), maps((15, 21), seed=1).round()
    torch.testing.assert_close(ms_ssim_loss(p, t), ssim_loss(p, t))


def test_it_equals_monai_on_large_images():
    p = maps((176, 180), batch=2)
    t = (p + 0.2 * maps((176, 180), batch=2, seed=1)).round().clamp(0, 1)
    theirs = 1 - compute_ms_ssim(p, t, 2, weights=ms_ssim_scales((176, 180)))
    torch.testing.assert_close(ms_ssim_loss(p, t), theirs.mean().reshape(1))


def test_monai_refuses_small_images_and_ours_do_not():
    p, t = maps((160, 160)), maps((160, 160)).round()
    with pytest.raises(ValueError, match="must be larger"):
        compute_ms_ssim(p, t, 2)
    assert ms_ssim_loss(p, t).isfinite().all()


def test_a_scale_that_contradicts_leaves_a_gradient_to_the_others():
    """MONAI's product is then 0, and so is its gradient."""
    t = torch.zeros(1, 1, 176, 176)
    # At the finest scale the stripes contradict; at coarser ones they are gone.
    t[..., ::2] = 1
    p = (1 - t) * 0.9
    t[..., :88, :], p[..., :88, :] = 1, 0.6
    theirs, ours = p.clone().requires_grad_(), p.clone().requires_grad_()
    value = compute_ms_ssim(theirs, t, 2)
    value.sum().backward()
    assert value == 0
    assert theirs.grad.abs().sum() == 0
    loss = ms_ssim_loss(ours, t).sum()
    loss.backward()
    assert 0 < loss < 1
    assert ours.grad.isfinite().all()
    assert ours.grad.abs().sum() > 0


def test_contradiction_follows_the_formula_beyond_zero():
    t = (maps((44, 46), seed=1) > 0.5).float()
    p = (0.9 * (1 - t) + 0.1 * maps((44, 46))).requires_grad_()
    exponents = ms_ssim_scales((44, 46))
    expected = reference.ms_ssim_losses(
        p.detach().double().numpy(), t.double().numpy(), exponents, (11, 11)
    )
    loss = ms_ssim_loss(p, t)
    assert loss.item() == pytest.approx(expected[0], rel=1e-5)
    loss.sum().backward()
    assert p.grad.abs().sum() > 0


def test_a_coarse_pixel_counts_where_all_its_pixels_do():
    p, t = maps((44, 46)), (maps((44, 46), seed=1) > 0.5).float()
    counted = torch.ones(1, 1, 44, 46, dtype=torch.bool)
    counted[..., :3, :] = False
    p = 0.5 * (p + t)
    expected = reference.ms_ssim_losses(
        p.double().numpy(), t.double().numpy(), ms_ssim_scales((44, 46)), (11, 11),
        counted[:, 0].numpy(),
    )  # fmt: skip
    assert ms_ssim_loss(p, t, counted).item() == pytest.approx(expected[0], rel=1e-5)


def test_detail_lost_at_one_scale_alone_is_seen_more_weakly_than_by_ssim():
    t = torch.zeros(1, 1, 96, 96)
    t[..., 30:60, 30:60] = 1
    noisy = (t + 0.3 * (maps((96, 96)) - 0.5)).clamp(0, 1)
    assert ms_ssim_loss(noisy, t) < ssim_loss(noisy, t)


@pytest.mark.parametrize("spatial", [(24, 26, 22), (3, 64, 64)])
def test_three_axes_work(spatial):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 2, *spatial, generator=generator, requires_grad=True)
    target = torch.randint(0, 2, (1, *spatial), generator=generator)
    loss = MixedLoss(ce=0, ms_ssim=1)(logits, target)
    loss.backward()
    assert 0 < loss < 1.1
    assert logits.grad.abs().sum() > 0

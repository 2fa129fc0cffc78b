"""The distance from a teacher, by its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from medseg_reg.losses import distillation_loss
from tests.reference.losses import softmax


def pair(channels, theirs=None, spatial=(4, 5)):
    generator = torch.Generator().manual_seed(channels)
    logits = 2 * torch.randn(2, channels, *spatial, generator=generator)
    return logits, 2 * torch.randn(2, theirs or channels, *spatial, generator=generator)


def classes(logits):
    x = logits.double().numpy()
    return np.concatenate([np.zeros_like(x), x], axis=1) if x.shape[1] == 1 else x


def formula(logits, teacher, temperature):
    """Return the mean over pixels of tau^2 KL(q || p), in float64."""
    p, q = softmax(classes(logits) / temperature), softmax(classes(teacher) / temperature)
    total, pixels = 0.0, 0
    for index in np.ndindex(p.shape[0], *p.shape[2:]):
        for c in range(p.shape[1]):
            at = (index[0], c, *index[1:])
            total += q[at] * (np.log(q[at]) - np.log(p[at]))
        pixels += 1
    return temperature**2 * total / pixels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(
    ("channels", "theirs", "spatial"),
    [(3, 3, (4, 5)), (1, 1, (4, 5)), (1, 2, (4, 5)), (2, 1, (4, 5)), (2, 2, (2, 3, 4))],
)
def test_it_equals_its_formula(channels, theirs, spatial, temperature):
    logits, teacher = pair(channels, theirs, spatial)
    found = distillation_loss(logits, teacher, temperature)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(formula(logits, teacher, temperature), rel=1e-5)


def test_its_gradient_is_that_of_the_differences_and_the_teacher_gets_none():
    logits, teacher = pair(3)
    logits.requires_grad_(), teacher.requires_grad_()
    distillation_loss(logits, teacher, 2.0).backward()
    p, q = softmax(classes(logits.detach()) / 2), softmax(classes(teacher.detach()) / 2)
    # d/dz of tau^2 KL is tau (p - q), for each of the 40 pixels.
    np.testing.assert_allclose(logits.grad.numpy(), 2 * (p - q) / 40, atol=1e-7)
    assert teacher.grad is None


def test_of_itself_it_is_nothing_and_of_others_more():
    logits, teacher = pair(3)
    assert distillation_loss(logits, logits, 2.0).item() == pytest.approx(0, abs=1e-7)
    assert distillation_loss(logits, teacher, 2.0) > 0.1


def test_levels_are_enlarged_and_weighed_as_in_the_loss_of_the_run():
    logits, teacher = pair(3, spatial=(8, 6))
    coarse = torch.randn(2, 3, 4, 3)
    full = F.interpolate(coarse, size=(8, 6), mode="bilinear", align_corners=False)
    one, two = distillation_loss(logits, teacher, 2.0), distillation_loss(full, teacher, 2.0)
    for supervision, share in (("equal", 1 / 2), ("halving", 2 / 3), ((1.0, 3.0), 1 / 4)):
        found = distillation_loss([logits, coarse], teacher, 2.0, supervision)
        torch.testing.assert_close(found, share * one + (1 - share) * two)


def test_pixels_that_do_not_count_leave_no_trace():
    logits, teacher = pair(3)
    logits.requires_grad_()
    counted = torch.zeros(2, 4, 5, dtype=torch.bool)
    counted[:, 1:3, :2] = True
    found = distillation_loss(logits, teacher, 2.0, counted=counted)
    torch.testing.assert_close(
        found, distillation_loss(logits[:, :, 1:3, :2], teacher[:, :, 1:3, :2], 2.0)
    )
    found.backward()
    assert torch.equal((logits.grad != 0).any(1), counted)
    assert distillation_loss(logits, teacher, counted=torch.zeros_like(counted)) == 0


def test_half_precision_is_computed_in_single():
    logits, teacher = pair(3)
    half, theirs = logits.bfloat16(), teacher.bfloat16()
    expected = distillation_loss(half.float(), theirs.float(), 2.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(distillation_loss(half, theirs, 2.0), expected)


def test_what_does_not_fit_is_refused():
    logits, teacher = pair(3)
    with pytest.raises(ValueError, match="expected a temperature above 0, got 0"):
        distillation_loss(logits, teacher, 0)
    with pytest.raises(ValueError, match="expected the same images and classes"):
        distillation_loss(logits[:, :2], teacher)
    with pytest.raises(ValueError, match="expected the same images and classes"):
        distillation_loss(logits[:1], teacher)
    with pytest.raises(ValueError, match="an output has the shape"):
        distillation_loss([logits, logits[:, :2]], teacher)

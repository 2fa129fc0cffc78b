"""Which classes a slice shows: labels from masks, and losses of logits that say it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medseg_reg.losses import (
    presence_bce,
    presence_divergence,
    presence_logits,
    presence_targets,
)
from medseg_reg.networks.build import predicted_labels


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


@pytest.mark.parametrize("pixels", [1, 2, 4])
def test_a_class_is_unknown_where_ignored_pixels_decide(pixels: int) -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 2, 3, 255], p=[0.6, 0.1, 0.1, 0.05, 0.15], size=(40, 3, 4))
    found = presence_targets(torch.from_numpy(labels), 3, 255, pixels).numpy()
    for image, row in zip(labels, found, strict=True):
        for number, value in enumerate(row, start=1):
            # Of all that the ignored pixels may be, the least and the most of the class.
            least, most = (image == number).sum(), np.isin(image, (number, 255)).sum()
            possible = {bool(count >= pixels) for count in range(least, most + 1)}
            assert np.isnan(value) if len(possible) == 2 else {bool(value)} == possible
    assert np.isnan(found).any()


def test_the_cross_entropy_is_that_of_its_formula() -> None:
    rng = np.random.default_rng(1)
    z, y = rng.normal(0, 3, (5, 3)), rng.integers(0, 2, (5, 3)).astype(float)
    y[2, 1] = y[4, 0] = np.nan
    w = np.array([0.5, 2.0, 7.0])
    p = sigmoid(z)
    expected = np.nanmean(-(w * y * np.log(p) + (1 - y) * np.log(1 - p)))
    found = presence_bce(*(torch.from_numpy(one).float() for one in (z, y, w)))
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_pairs_that_are_not_known_get_no_gradient() -> None:
    logits = torch.zeros(1, 2, requires_grad=True)
    presence_bce(logits, torch.tensor([[1.0, torch.nan]])).backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[-0.5, 0.0]]
    nothing = presence_bce(torch.zeros(1, 2), torch.full((1, 2), torch.nan))
    assert nothing.item() == 0


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_the_divergence_is_that_of_bernoulli_variables(tau: float) -> None:
    rng = np.random.default_rng(2)
    z, t = rng.normal(0, 3, (4, 3)), rng.normal(0, 3, (4, 3))
    counted = rng.random((4, 3)) < 0.7
    p, q = sigmoid(z / tau), sigmoid(t / tau)
    each = q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))
    given = [torch.from_numpy(one).float() for one in (z, t)]
    found = presence_divergence(*given, tau, torch.from_numpy(counted))
    assert found.item() == pytest.approx(tau**2 * each[counted].mean(), rel=1e-4)
    assert presence_divergence(*given, tau).item() == pytest.approx(tau**2 * each.mean(), rel=1e-4)


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("pixels", [1, 3])
def test_a_segmentation_shows_a_class_where_so_many_pixels_are_predicted(
    channels: int, pixels: int
) -> None:
    torch.manual_seed(channels)
    logits = torch.randn(50, channels, 3, 4) + torch.tensor([1.5, *[0.0] * 3])[
        :channels, None, None
    ] * (1 if channels > 1 else -1)
    found = presence_logits(logits, pixels)
    labels = predicted_labels(logits)
    for number in range(found.shape[1]):
        counted = (labels == number + 1).flatten(1).sum(1)
        assert torch.equal(found[:, number] > 0, counted >= pixels)
    assert 0 < (found > 0).float().mean() < 1


def test_of_two_classes_it_is_the_log_odds_of_the_surest_pixel() -> None:
    logits = torch.randn(2, 2, 4, 5)
    surest = logits.softmax(1)[:, 1].flatten(1).max(1).values
    torch.testing.assert_close(presence_logits(logits)[:, 0], torch.logit(surest))

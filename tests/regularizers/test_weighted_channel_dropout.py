"""Weighted Channel Dropout against the paper's steps, its golden values and its edge cases."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from medseg_reg.regularizers import WeightedChannelDropout, weighted_channel_dropout
from tests.reference import weighted_channel_dropout as reference
from tests.regularizers.contract import RegularizerContract

SCORES = np.array([1.0, 2, 3, 4])


class WeightedContract(RegularizerContract):
    name = "weighted_channel_dropout"

    def test_the_gradient_is_the_transpose_of_the_forward_map(self) -> None:
        # of the map with its factor held fast: alpha depends on x, but counts as a constant
        layer = self.make(0.3)
        x = self.positive(2, 4, 3, 2, dtype=torch.float64).requires_grad_()
        y = layer(x)
        weight = torch.randn_like(y)
        (gradient,) = torch.autograd.grad(y, x, weight)
        torch.testing.assert_close(gradient, y.detach() / x.detach() * weight)
        assert (gradient == 0).any()


class TestWeightedChannelDropout(WeightedContract):
    pass


class TestSecondStep(WeightedContract):
    parameters = {"q": 0.9}  # noqa: RUF012
    calibrated = False  # the rate is 1 - (1 - p) * q


class TestFaithful(WeightedContract):
    parameters = {"faithful": True, "q": 0.9}  # noqa: RUF012
    calibrated = False


def draws(scores: Any, count: int) -> torch.Tensor:
    """``count`` equal samples whose channel means are the scores."""
    noise = torch.rand(4, 4) + 0.5
    noise = noise / noise.mean()
    scores = torch.as_tensor(scores, dtype=torch.float32)
    return (scores[:, None, None] * noise).expand(count, -1, -1, -1).contiguous()


def factor(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The factor (B, C) of each channel."""
    return (y.flatten(2).sum(-1)) / x.flatten(2).sum(-1)


def test_the_reference_has_the_golden_values() -> None:
    golden = [0.234524, 0.441270, 0.608333, 0.715873]
    np.testing.assert_allclose(reference.inclusion(SCORES, 2), golden, atol=1e-6)
    np.testing.assert_allclose(
        reference.mean_factor(SCORES, 2), [0.571, 0.868, 1.042, 1.142], atol=1e-3
    )


@pytest.mark.parametrize("faithful", [False, True])
def test_inclusion_and_mean_factor_are_the_golden_values(faithful: bool) -> None:
    torch.manual_seed(0)
    x = draws(SCORES, 40_000)
    f = factor(x, weighted_channel_dropout(x, 0.5, faithful=faithful))
    inclusion = (f != 0).float().mean(0).numpy()
    np.testing.assert_allclose(inclusion, reference.inclusion(SCORES, 2), atol=0.01)
    np.testing.assert_allclose(f.mean(0).numpy(), reference.mean_factor(SCORES, 2), atol=0.02)


@pytest.mark.parametrize("p", [0.2, 0.6, 0.8])
def test_every_set_is_selected_as_often_as_the_reference_says(p: float) -> None:
    torch.manual_seed(1)
    sample = torch.rand(5, 3, 4)
    sample[1] *= 4
    sample[3] = -sample[3]
    x = sample.expand(20_000, -1, -1, -1).contiguous()
    kept = factor(x, weighted_channel_dropout(x, p)) != 0
    expected = reference.selections(reference.scores(sample.numpy()), round((1 - p) * 5))
    for selected, chance in expected.items():
        member = torch.tensor([c in selected for c in range(5)])
        share = (kept == member).all(1).float().mean().item()
        assert share == pytest.approx(chance, abs=0.02), selected


def test_kept_channels_are_multiplied_by_the_ratio_of_the_scores() -> None:
    torch.manual_seed(2)
    x = torch.randn(50, 6, 5, 5)
    for faithful in (False, True):
        f = factor(x, weighted_channel_dropout(x, 0.5, faithful=faithful)).numpy()
        for sample, row in zip(x.numpy(), f, strict=True):
            selected = frozenset(np.flatnonzero(np.abs(row) > 1e-6).tolist())
            expected = reference.alpha(reference.scores(sample), selected)
            np.testing.assert_allclose(row[sorted(selected)], expected, rtol=1e-3)


def test_alpha_keeps_the_mean_activity_of_each_sample() -> None:
    x = torch.rand(30, 8, 5, 5)
    y = weighted_channel_dropout(x, 0.4)
    torch.testing.assert_close(y.flatten(1).mean(1), x.flatten(1).mean(1))


def test_active_channels_are_kept_more_often() -> None:
    torch.manual_seed(0)
    x = draws([1.0] * 4 + [5.0] * 4, 2000)
    kept = (factor(x, weighted_channel_dropout(x, 0.5)) != 0).float().mean(0)
    assert kept[4:].min() > 2 * kept[:4].max()
    assert kept[:4].min() > 0.05


@pytest.mark.parametrize("q", [0.5, 0.9])
@pytest.mark.parametrize("p", [0.1, 0.4])
def test_the_second_step_makes_the_rate_the_documented_one(p: float, q: float) -> None:
    torch.manual_seed(0)
    layer = WeightedChannelDropout(p, q)
    x = torch.rand(4000, 12, 2, 2) + 0.5
    y = layer(x)
    assert layer.measured_rate(x, y) == pytest.approx(1 - (1 - p) * q, abs=0.01)
    # and the activity stays what it was, on average
    assert (y.mean() / x.mean()).item() == pytest.approx(1.0, abs=0.02)
    published = weighted_channel_dropout(x, p, q, faithful=True)
    assert (published.mean() / x.mean()).item() == pytest.approx(q, abs=0.02)


def test_the_second_step_never_takes_the_last_channel() -> None:
    x = torch.rand(500, 3, 4, 4) + 0.1
    for faithful in (False, True):
        y = weighted_channel_dropout(x, 0.6, q=0.2, faithful=faithful)
        assert (y != 0).flatten(1).any(1).all()


@pytest.mark.parametrize("p", [0.1, 0.6, 0.99])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_at_least_one_channel_is_kept(channels: int, p: float) -> None:
    x = torch.rand(300, channels, 3, 3) + 0.1
    for faithful in (False, True):
        kept = factor(x, weighted_channel_dropout(x, p, faithful=faithful)) != 0
        assert (kept.sum(1) >= 1).all()
    if channels == 1:
        torch.testing.assert_close(weighted_channel_dropout(x, p), x)


@pytest.mark.parametrize(("channels", "counts"), [(3, {0, 1}), (10, {2}), (7, {1, 2})])
def test_the_number_is_rounded_up_or_down_at_random(channels: int, counts: set[int]) -> None:
    x = torch.rand(300, channels, 4, 4) + 0.1
    gone = (weighted_channel_dropout(x, 0.2) == 0).flatten(2).all(-1)
    assert set(gone.sum(1).tolist()) == counts


@pytest.mark.parametrize(("channels", "kept"), [(3, 2), (10, 8), (7, 6), (2, 2)])
def test_the_faithful_number_is_rounded_to_the_nearest(channels: int, kept: int) -> None:
    x = torch.rand(50, channels, 4, 4) + 0.1
    y = weighted_channel_dropout(x, 0.2, faithful=True)
    assert ((y != 0).flatten(2).any(-1).sum(1) == kept).all()


def test_dead_channels_are_the_first_to_go_in_the_faithful_rule_alone() -> None:
    x = torch.rand(200, 10, 4, 4) + 0.1
    x[:, :5] = 0
    layer, published = WeightedChannelDropout(0.4), WeightedChannelDropout(0.4, faithful=True)
    assert layer.measured_rate(x, layer(x)) == pytest.approx(0.4)  # 2 of the 5 that live
    assert published.measured_rate(x, published(x)) < 0.01


@pytest.mark.parametrize("value", [0.0, -1.0, 1.0])
@pytest.mark.parametrize("faithful", [False, True])
def test_a_constant_sample_is_finite_and_uniform(value: float, faithful: bool) -> None:
    torch.manual_seed(0)
    x = torch.full((2000, 4, 3, 3), value)
    y = weighted_channel_dropout(x, 0.25, faithful=faithful)
    if value == 0:
        assert torch.equal(y, x)
        return
    gone = (y == 0).flatten(2).all(-1)
    assert gone.float().mean(0).tolist() == pytest.approx([0.25] * 4, abs=0.05)
    torch.testing.assert_close(y[y != 0], (x / 0.75)[y != 0])


def test_channels_with_nan_or_infinity_stay() -> None:
    x = torch.rand(100, 6, 4, 4) + 0.1
    x[:, 1, 0, 0], x[:, 2, 0, 0] = math.nan, math.inf
    y = weighted_channel_dropout(x, 0.5)
    torch.testing.assert_close(y[:, 1:3], x[:, 1:3], equal_nan=True)
    others = y[:, [0, 3, 4, 5]]
    assert ((others == 0).flatten(2).all(-1).sum(1) == 2).all()


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_the_scale_of_a_map_does_not_matter(scale: float) -> None:
    x = torch.rand(20, 6, 4, 4)
    torch.manual_seed(3)
    expected = weighted_channel_dropout(x, 0.4) != 0
    torch.manual_seed(3)
    assert torch.equal(weighted_channel_dropout(x * scale, 0.4) != 0, expected)


@pytest.mark.parametrize("q", [0, -0.5, 1.5, math.nan, "1", True])
def test_a_bad_q_is_refused(q: Any) -> None:
    with pytest.raises(ValueError, match="WeightedChannelDropout: q "):
        WeightedChannelDropout(0.1, q)
    with pytest.raises(ValueError, match="weighted_channel_dropout: q "):
        weighted_channel_dropout(torch.rand(1, 4, 3, 3), 0.1, q)


def test_the_function_is_identity_outside_training() -> None:
    x = torch.rand(1, 4, 3, 3)
    assert weighted_channel_dropout(x, 0.5, training=False) is x
    assert weighted_channel_dropout(x, 0.0) is x

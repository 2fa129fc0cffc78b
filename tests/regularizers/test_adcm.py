"""The reconstruction of ADCM against its own formulas."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from medseg_reg.regularizers import (
    ADCM,
    adcm,
    channel_attention,
    position_attention,
    stochastic_pool,
)
from tests.reference import adcm as reference
from tests.regularizers.contract import RegularizerContract


class TestADCM(RegularizerContract):
    name = "adcm"


class TestADCMSharp(RegularizerContract):
    name = "adcm"
    parameters = {"temperature": 0.3}  # noqa: RUF012


@pytest.mark.parametrize("size", [(12,), (3, 4), (2, 3, 2)])
def test_stochastic_pooling_draws_positions_in_proportion_to_their_value(
    size: tuple[int, ...],
) -> None:
    torch.manual_seed(0)
    channel = torch.randperm(12).float().reshape(size) - 3  # some negative, all different
    x = channel.expand(200, 100, *size).contiguous()
    pooled = stochastic_pool(x).flatten()
    expected = reference.stochastic_pool(channel.numpy())
    for place in np.ndindex(*size):
        share = (pooled == channel[place]).float().mean().item()
        want = expected[place] if channel[place] > 0 else 0.0
        assert share == pytest.approx(want, abs=0.012), place


@pytest.mark.parametrize("value", [0.0, -2.0])
def test_a_channel_without_positive_values_pools_to_zero(value: float) -> None:
    assert (stochastic_pool(torch.full((2, 3, 4, 4), value)) == 0).all()


@pytest.mark.parametrize("size", [(9,), (7, 5), (4, 5, 2)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e25])
def test_the_attentions_equal_the_reference(size: tuple[int, ...], scale: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 6, *size) * scale
    torch.manual_seed(5)
    pooled = stochastic_pool(x).numpy()
    torch.manual_seed(5)
    channels, positions = channel_attention(x).numpy(), position_attention(x).numpy()
    for i, sample in enumerate(x.numpy()):
        expected = reference.channel_attention(sample, pooled[i].astype(np.float64))
        np.testing.assert_allclose(channels[i], expected, atol=1e-4)
        np.testing.assert_allclose(positions[i], reference.position_attention(sample), atol=1e-4)


def test_each_position_is_dropped_as_often_as_the_reference_says() -> None:
    torch.manual_seed(0)
    sample = torch.rand(8, 5, 4)
    x = sample.expand(6000, -1, -1, -1).contiguous()
    gone = (adcm(x, 0.3) == 0).all(1).float().mean(0).numpy()
    each = 1 - math.sqrt(0.7)
    expected = reference.rates(reference.position_attention(sample.numpy()), each, 1.0)
    assert expected.mean() == pytest.approx(each)
    np.testing.assert_allclose(gone, expected, atol=0.03)


def test_each_channel_is_dropped_as_often_as_the_reference_says() -> None:
    torch.manual_seed(0)
    level = torch.tensor([0.5, 1, 1.5, 2, 4])
    x = level[:, None, None].expand(6000, 5, 4, 4).contiguous()  # all three poolings agree
    gone = (adcm(x, 0.3) == 0).flatten(2).all(-1).float().mean(0).numpy()
    each = 1 - math.sqrt(0.7)
    attention = reference.channel_attention(x[0].numpy(), level.numpy().astype(np.float64))
    np.testing.assert_allclose(gone, reference.rates(attention, each, 1.0), atol=0.03)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_both_parts_together_drop_p_and_each_the_same_share(p: float) -> None:
    torch.manual_seed(0)
    x = torch.rand(600, 16, 8, 8) + 0.1
    zero = adcm(x, p) == 0
    each = 1 - math.sqrt(1 - p)
    assert zero.float().mean().item() == pytest.approx(p, abs=0.01)
    assert zero.all(1).float().mean().item() == pytest.approx(each, abs=0.02)
    assert zero.flatten(2).all(-1).float().mean().item() == pytest.approx(each, abs=0.02)


def test_weak_channels_and_weak_positions_are_dropped_more_often() -> None:
    torch.manual_seed(0)
    x = torch.rand(800, 8, 6, 6) + 0.1
    x[:, 4:] *= 4
    x[..., 3:] *= 4
    zero = adcm(x, 0.2) == 0
    channel = zero.flatten(2).all(-1).float().mean(0)
    position = zero.all(1).float().mean((0, 1))
    assert channel[:4].mean() > 3 * channel[4:].mean()
    assert position[:3].mean() > 3 * position[3:].mean()
    zero = adcm(x, 0.2, temperature=math.inf) == 0
    channel = zero.flatten(2).all(-1).float().mean(0)
    position = zero.all(1).float().mean((0, 1))
    assert channel[:4].mean().item() == pytest.approx(channel[4:].mean().item(), abs=0.04)
    assert position[:3].mean().item() == pytest.approx(position[3:].mean().item(), abs=0.04)


def test_a_part_with_a_single_unit_rests() -> None:
    torch.manual_seed(0)
    x = torch.rand(300, 64, 1, 1) + 0.1
    assert (adcm(x, 0.2) != 0).flatten(1).any(1).all()  # a pixel is never dropped whole
    y = adcm(torch.rand(300, 1, 8, 8) + 0.1, 0.2)
    assert (y != 0).flatten(1).any(1).all()  # nor is a channel
    assert (y == 0).float().mean().item() == pytest.approx(0.2, abs=0.01)
    alone = adcm(torch.rand(4000, 1, 1, 1) + 0.1, 0.2)
    assert (alone == 0).float().mean().item() == pytest.approx(0.2, abs=0.03)


def test_survivors_are_divided_by_the_nominal_share() -> None:
    x = torch.rand(4, 10, 6, 6) + 0.1
    y = adcm(x, 0.3)
    kept = y != 0
    torch.testing.assert_close(y[kept], (x / 0.7)[kept])
    assert not kept.all()


def test_it_says_that_it_is_a_reconstruction() -> None:
    assert "reconstruction" in ADCM.paper
    assert "A reconstruction" in str(ADCM.__doc__)


@pytest.mark.parametrize("temperature", [0, -1, math.nan, "1", True])
def test_a_bad_temperature_is_refused(temperature: Any) -> None:
    with pytest.raises(ValueError, match="ADCM: temperature must be a number above 0"):
        ADCM(0.1, temperature)
    with pytest.raises(ValueError, match="adcm: temperature must be a number above 0"):
        adcm(torch.rand(1, 4, 3, 3), 0.1, temperature)


@pytest.mark.parametrize("shape", [(3, 4), (1, 2, 3, 4, 5, 6)])
def test_the_attentions_refuse_other_shapes(shape: tuple[int, ...]) -> None:
    for attention in (channel_attention, position_attention, stochastic_pool):
        with pytest.raises(ValueError, match=attention.__name__):
            attention(torch.ones(shape))


def test_the_function_is_identity_outside_training() -> None:
    x = torch.rand(1, 4, 3, 3)
    assert adcm(x, 0.5, training=False) is x
    assert adcm(x, 0.0) is x

"""Dropout, InputDropout and SpatialDropout: torch's own rules under the contract."""

import pytest
import torch

from medseg_reg.regularizers import Dropout, InputDropout, SpatialDropout, spatial_dropout
from tests.regularizers.contract import RegularizerContract


class TestDropout(RegularizerContract):
    name = "dropout"


class TestInputDropout(RegularizerContract):
    name = "input_dropout"


class TestSpatialDropout(RegularizerContract):
    name = "spatial_dropout"


@pytest.mark.parametrize("layer", [Dropout(0.3), InputDropout(0.3)])
def test_the_element_wise_layers_follow_the_rule_of_torchs_dropout(layer: torch.nn.Module) -> None:
    torch.manual_seed(0)
    x = torch.rand(20, 30, 40, 5) + 0.5
    y, theirs = layer(x), torch.nn.Dropout(0.3)(x)
    torch.testing.assert_close(y[y != 0], x[y != 0] / 0.7, rtol=1e-4, atol=0)
    for axes in ((1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)):  # as independent along every axis
        spread = (y == 0).float().mean(axes).std().item()
        assert spread == pytest.approx((theirs == 0).float().mean(axes).std().item(), rel=0.8)


@pytest.mark.parametrize("layer", [Dropout(1e-4), Dropout(0.9999)])
def test_rates_that_rounding_would_change_are_torchs_own(layer: torch.nn.Module) -> None:
    x = torch.rand(2, 3, 8, 5)
    torch.manual_seed(0)
    expected = torch.nn.Dropout(layer.p)(x)
    torch.manual_seed(0)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_spatial_dropout_equals_torchs_own_of_that_dimension(spatial: int) -> None:
    x = torch.randn(3, 5, *[4] * spatial)
    theirs = [torch.nn.Dropout1d, torch.nn.Dropout2d, torch.nn.Dropout3d][spatial - 1](0.3)
    torch.manual_seed(0)
    expected = theirs(x)
    torch.manual_seed(0)
    assert torch.equal(SpatialDropout(0.3)(x), expected)


def test_spatial_dropout_reads_three_axes_as_a_batch_of_signals() -> None:
    y = spatial_dropout(torch.ones(200, 5, 7), p=0.5)
    whole = (y == 0).all(-1) == (y == 0).any(-1)
    assert whole.all()
    assert 0.4 < (y == 0).float().mean() < 0.6


def test_the_defaults_are_those_of_the_papers() -> None:
    assert (Dropout().p, InputDropout().p, SpatialDropout().p) == (0.5, 0.3, 0.1)


def test_the_function_is_identity_outside_training() -> None:
    x = torch.ones(1, 2, 3)
    assert spatial_dropout(x, 0.5, training=False) is x

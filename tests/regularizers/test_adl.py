"""The Attention-based Dropout Layer against its steps and its edge cases."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from medseg_reg.regularizers import ADL, adl
from tests.reference import adl as reference
from tests.regularizers.contract import RegularizerContract


class ADLContract(RegularizerContract):
    name = "adl"
    calibrated = False  # p is the probability of the drop mask, not the share it hides

    def test_a_schedule_may_assign_the_rate(self) -> None:
        layer, x = self.make(0.0), self.positive(1, 3, 4, 4)
        for p in (0.5, 0.9):
            layer.p = p
            hidden = [bool((layer(x) == 0).any()) for _ in range(1000)]
            assert sum(hidden) / len(hidden) == pytest.approx(p, abs=0.06)
        layer.p = 0
        assert layer(x) is x


class TestADL(ADLContract):
    pass


class TestADLFaithful(ADLContract):
    parameters = {"faithful": True, "gamma": 0.8}  # noqa: RUF012


def hidden(y: torch.Tensor) -> torch.Tensor:
    """Which positions (B, *spatial) are zero in every channel."""
    return (y == 0).all(1)


@pytest.mark.parametrize("size", [(9,), (7, 5), (4, 5, 3)])
@pytest.mark.parametrize("gamma", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("faithful", [False, True])
def test_each_sample_is_masked_or_weighted_as_in_the_reference(
    size: tuple[int, ...], gamma: float, faithful: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 4, *size)
    y = adl(x, 0.5, gamma, faithful=faithful).numpy()
    kinds = set()
    for sample, result in zip(x.numpy(), y, strict=True):
        masked = bool((result == 0).any())
        factor = reference.drop_mask(sample, gamma) if masked else reference.importance(sample)
        np.testing.assert_allclose(result, sample * factor, rtol=1e-4, atol=1e-6)
        kinds.add(masked)
    assert len(kinds) == (1 if faithful else 2)


def test_it_hides_the_most_active_region_from_all_channels() -> None:
    torch.manual_seed(0)
    x = torch.rand(300, 6, 8, 8)
    x[:, :, 2:4, 5:7] += 20
    gone = hidden(adl(x, 0.5))
    masked = gone.flatten(1).any(1)
    assert gone[masked][:, 2:4, 5:7].float().mean() > 0.8
    outside = gone.clone()
    outside[:, 2:4, 5:7] = False
    assert not outside.any()


@pytest.mark.parametrize("p", [0.25, 0.75])
def test_p_is_the_probability_of_the_mask_one_coin_for_each_sample(p: float) -> None:
    torch.manual_seed(0)
    masked = hidden(adl(torch.rand(4000, 2, 5, 5), p)).flatten(1).any(1)
    assert masked.float().mean().item() == pytest.approx(p, abs=0.03)


def test_the_published_coin_is_for_the_whole_batch() -> None:
    torch.manual_seed(0)
    x = torch.rand(8, 2, 5, 5)
    masked = torch.stack(
        [hidden(adl(x, 0.75, faithful=True)).flatten(1).any(1) for _ in range(400)]
    )
    assert torch.equal(masked.all(1), masked.any(1))
    assert masked.float().mean().item() == pytest.approx(0.75, abs=0.08)


def test_the_measured_rate_is_the_hidden_share_times_p() -> None:
    torch.manual_seed(0)
    layer, x = ADL(0.6, gamma=0.7), torch.rand(2000, 3, 6, 6) + 0.1
    share = np.mean([(reference.drop_mask(s, 0.7) == 0).mean() for s in x[:300].numpy()])
    assert layer.measured_rate(x, layer(x)) == pytest.approx(0.6 * share, abs=0.02)


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("value", [0.0, 2.0, -1.0])
def test_a_constant_map_is_never_hidden_whole(value: float, faithful: bool) -> None:
    x = torch.full((50, 3, 4, 4), value)
    for shape in ((50, 3, 4, 4), (50, 3, 1, 1)):
        y = adl(x[:, :, : shape[2], : shape[3]], 0.75, faithful=faithful)
        assert torch.equal(y == 0, torch.full(shape, value == 0))


@pytest.mark.parametrize("maximum", [-0.05, 0.0])
def test_without_a_positive_maximum_nothing_is_hidden(maximum: float) -> None:
    x = -torch.rand(50, 2, 4, 4) - 0.1
    x[:, :, 1, 2] = maximum + torch.tensor([1.0, -1.0])
    assert not hidden(adl(x, 0.75, gamma=1.0)).any()
    assert hidden(adl(x + 1, 0.75, gamma=1.0))[:, 1, 2].any()


def test_nothing_is_rescaled_and_the_importance_is_a_sigmoid_of_the_mean() -> None:
    torch.manual_seed(0)
    x = torch.tensor([1.0, 3.0]).view(1, 2, 1).expand(400, 2, 4).contiguous()
    x[:, :, 0] *= 2
    values = {round(v, 4) for v in adl(x, 0.5)[:, 0].unique().tolist()}
    low, high = 1 / (1 + math.exp(-2)), 2 / (1 + math.exp(-4))
    assert values == {0.0, 1.0, round(low, 4), round(high, 4)}


def test_the_gradient_flows_through_the_importance_but_not_through_the_mask() -> None:
    x = torch.rand(64, 2, 5, dtype=torch.float64, requires_grad=True)
    y = adl(x, 0.5)
    y.sum().backward()
    assert x.grad is not None
    masked = hidden(y).any(1)
    assert torch.equal(x.grad[masked], (y[masked] != 0).double())
    s = x.mean(1, keepdim=True).sigmoid()
    expected = s + x.sum(1, keepdim=True) * s * (1 - s) / 2
    torch.testing.assert_close(x.grad[~masked], expected.expand_as(x)[~masked])


def test_half_precision_hides_the_same_region_as_float32() -> None:
    x = torch.rand(16, 5, 6, 6).half()
    torch.manual_seed(1)
    expected = adl(x.float(), 0.5) == 0
    torch.manual_seed(1)
    assert torch.equal(adl(x, 0.5) == 0, expected)


def test_positions_with_nan_or_infinity_do_not_spread() -> None:
    x = torch.rand(100, 3, 5, 5) + 0.1
    x[:, 1, 2, 2], x[:, 1, 3, 3] = math.nan, math.inf
    y = adl(x, 0.5)
    assert y[:, [0, 2]].isfinite().all()
    assert hidden(y).any()


@pytest.mark.parametrize("gamma", [0, -1, 1.1, math.nan, "0.9", True])
def test_a_bad_gamma_is_refused(gamma: Any) -> None:
    with pytest.raises(ValueError, match="ADL: gamma"):
        ADL(0.1, gamma)
    with pytest.raises(ValueError, match="adl: gamma"):
        adl(torch.rand(1, 4, 3, 3), 0.1, gamma)


def test_the_function_is_identity_outside_training() -> None:
    x = torch.rand(1, 4, 3, 3)
    assert adl(x, 0.5, training=False) is x
    assert adl(x, 0.0) is x

"""DropHead: whole heads, one scale a sample, a rate that is p, and the V schedule."""

from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from medseg_reg.config_regularization import RateScheduleSpec
from medseg_reg.engine.rates import rate_factor
from medseg_reg.regularizers import DropHead, drop_head
from tests.reference import attention as reference
from tests.regularizers.contract import RegularizerContract


class TestDropHead(RegularizerContract):
    name = "drop_head"


class TestPublishedDropHead(RegularizerContract):
    """Where all heads of a sample fall, all are kept."""

    name = "drop_head"
    parameters: ClassVar[dict[str, Any]] = {"faithful": True}
    calibrated = False


@pytest.mark.parametrize("faithful", [False, True])
def test_heads_are_dropped_whole_and_the_others_scaled_by_their_number(faithful: bool) -> None:
    torch.manual_seed(0)
    x = torch.rand(200, 6, 9, 4, dtype=torch.float64) + 0.5
    y = drop_head(x, 0.4, faithful=faithful)
    keep = (y != 0).any(3).any(2)
    assert torch.equal((y != 0), keep[..., None, None].expand_as(y))
    np.testing.assert_allclose(y.numpy(), reference.drop_head(x.numpy(), keep.numpy()))
    assert len(keep.unique(dim=0)) > 30


@pytest.mark.parametrize("heads", [2, 3, 6, 12])
@pytest.mark.parametrize("p", [0.1, 0.2, 0.5])
def test_the_share_of_dropped_heads_is_p_for_any_number_of_heads(heads: int, p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(40_000, heads, 1)
    assert DropHead(p).measured_rate(x, drop_head(x, p)) == pytest.approx(p, abs=0.01)


def test_a_sample_never_loses_all_heads() -> None:
    for faithful in (False, True):
        y = drop_head(torch.ones(5000, 3, 1), 0.95, faithful=faithful)
        assert y.isfinite().all()
        assert (y.mean(1) > 0.99).all()
    x = torch.ones(100, 1, 4)
    assert torch.equal(drop_head(x, 0.9), x)


def test_published_all_heads_stay_where_all_would_fall() -> None:
    torch.manual_seed(0)
    y = drop_head(torch.ones(20_000, 3, 1), 0.5, faithful=True)
    whole = (y == 1).all(1).float().mean().item()
    assert whole == pytest.approx(2 * 0.5**3, abs=0.01)


def test_the_expectation_is_the_input() -> None:
    torch.manual_seed(0)
    x = torch.rand(1, 4, 3) + 0.5
    mean = drop_head(x.expand(100_000, -1, -1), 0.3).mean(0)
    torch.testing.assert_close(mean, x[0], atol=0.02, rtol=0)


def test_heads_left_out_of_their_sum_are_those_left_out_of_the_weights() -> None:
    torch.manual_seed(0)
    weights, values = torch.rand(2, 4, 9, 9).softmax(-1), torch.randn(2, 4, 9, 8)
    torch.manual_seed(1)
    one = drop_head(weights @ values, 0.5)
    torch.manual_seed(1)
    torch.testing.assert_close(one, drop_head(weights, 0.5) @ values, atol=1e-6, rtol=0)


def test_the_v_schedule_has_the_published_values() -> None:
    spec = RateScheduleSpec(name="v_shape", turn=0.1)
    rates = [0.2 * rate_factor(spec, step / 1000) for step in (0, 50, 100, 550, 1000)]
    assert rates == pytest.approx([0.2, 0.1, 0.0, 0.1, 0.2])

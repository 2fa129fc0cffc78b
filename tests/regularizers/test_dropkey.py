"""DropKey: rows that keep their sum, a rate that is p, and the published corner cases."""

import math
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from medseg_reg.regularizers import DropKey, drop_key
from medseg_reg.regularizers.attention_weights import hide_keys
from tests.reference import attention as reference
from tests.regularizers.contract import RegularizerContract


def attention(*shape: int, scale: float = 2.0) -> torch.Tensor:
    torch.manual_seed(0)
    return (scale * torch.randn(*shape)).softmax(-1)


class TestDropKey(RegularizerContract):
    """Of one key none can be hidden; the rates that can be reached are tested below."""

    name = "drop_key"
    calibrated = False


class TestDropKeyBesideAPrefix(RegularizerContract):
    name = "drop_key"
    parameters: ClassVar[dict[str, Any]] = {"prefix_tokens": 1}
    calibrated = False


class TestPublishedDropKey(RegularizerContract):
    name = "drop_key"
    parameters: ClassVar[dict[str, Any]] = {"faithful": True}
    calibrated = False


@pytest.mark.parametrize("keys", [2, 3, 4, 16, 49, 197])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_share_of_hidden_keys_is_p(keys: int, p: float) -> None:
    x = attention(40, 4, 2000 // keys, keys)
    layer = DropKey(p)
    rates = [layer.measured_rate(x, layer(x)) for _ in range(4)]
    assert sum(rates) / 4 == pytest.approx(p, abs=5 * math.sqrt(p / (4 * 320_000)) + 1e-3)


def test_half_of_two_keys_is_always_one_and_one_key_is_never_hidden() -> None:
    assert ((drop_key(attention(9, 2, 5, 2), 0.9) == 0).sum(-1) == 1).all()
    x = attention(9, 2, 5, 1)
    assert torch.equal(drop_key(x, 0.9), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_row_keeps_its_sum(dtype: torch.dtype) -> None:
    x = attention(2, 3, 36, 36).to(dtype)
    y = drop_key(x, 0.4)
    assert (y == 0).any()
    torch.testing.assert_close(y.float().sum(-1), x.float().sum(-1), atol=1e-2, rtol=0)


def test_weights_behind_the_softmax_are_those_of_logits_masked_before_it() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(2, 3, 20, 20, dtype=torch.float64)
    keep = torch.rand(2, 3, 20, 20) >= 0.4
    ours = hide_keys(logits.softmax(-1), keep).numpy()
    np.testing.assert_allclose(ours, reference.masked_softmax(logits.numpy(), keep.numpy()))


def test_gradients_are_those_of_logits_masked_before_it() -> None:
    torch.manual_seed(0)
    values = torch.randn(2, 3, 12, 8)
    keep = torch.rand(2, 3, 12, 12) >= 0.4
    grads = []
    for before in (True, False):
        torch.manual_seed(1)
        logits = (4 * torch.randn(2, 3, 12, 12)).requires_grad_()
        masked = logits.masked_fill(~keep, torch.finfo(torch.float32).min)
        weights = masked.softmax(-1) if before else hide_keys(logits.softmax(-1), keep)
        (weights @ values).square().sum().backward()
        grads.append(logits.grad)
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-4)


def test_a_row_that_is_left_without_weight_stays_as_it_is() -> None:
    row = torch.tensor([1.0, 0.0, 0.0, 1e-30]).requires_grad_()
    y = hide_keys(row, torch.tensor([False, True, True, True]))
    assert torch.equal(y, row)
    y.sum().backward()
    assert row.grad is not None
    assert row.grad.isfinite().all()


def test_a_shifted_window_gives_nothing_to_the_region_that_its_mask_hides() -> None:
    logits = torch.zeros(500, 1, 4, 4)
    logits[..., :2, 2:] = logits[..., 2:, :2] = -100.0
    y = drop_key(logits.softmax(-1), 0.6)
    assert y[..., :2, 2:].max() < 1e-20
    torch.testing.assert_close(y.sum(-1), torch.ones(500, 1, 4))


def test_tokens_of_the_prefix_are_never_hidden() -> None:
    y = drop_key(attention(20, 2, 10, 10), 0.9, prefix_tokens=2)
    assert (y[..., :2] > 0).all()
    assert (y[..., 2:] == 0).float().mean().item() == pytest.approx(0.9, abs=0.02)


def test_each_query_of_each_head_loses_keys_of_its_own() -> None:
    dropped = drop_key(attention(2, 3, 36, 36), 0.5) == 0
    rows = dropped.flatten(0, 2)
    assert len(rows.unique(dim=0)) == len(rows)


def test_published_a_query_that_loses_all_keys_attends_evenly() -> None:
    y = drop_key(attention(300, 1, 2, 3), 0.9, faithful=True)
    even = (y - 1 / 3).abs().amax(-1) < 1e-6
    assert even.float().mean().item() == pytest.approx(0.9**3, abs=0.06)
    assert y.isfinite().all()


@pytest.mark.parametrize("value", [-1, 1.0, True, "1"])
def test_a_wrong_number_of_prefix_tokens_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="DropKey: prefix_tokens must be a whole number"):
        DropKey(prefix_tokens=value)  # type: ignore[arg-type]

"""Attention-guided dropout: calibrated rates, keys hidden as a whole, unbiased residuals."""

from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from medseg_reg.regularizers import (
    GuidedKeyDropout,
    GuidedResidualDropout,
    Regularizer,
    guided_key_dropout,
    guided_rates,
    guided_residual_dropout,
    received_attention,
)
from medseg_reg.regularizers.coins import drop_exactly
from tests.reference import guided_dropout as reference
from tests.regularizers.contract import RegularizerContract

BETAS = (-1.0, 0.0, 1.0, 2.0)


def peaked(batch: int = 4, tokens: int = 196, seed: int = 0) -> torch.Tensor:
    """Scores of a log-normal distribution, with mean 1, as trained attention has them."""
    torch.manual_seed(seed)
    scores = (1.5 * torch.randn(batch, tokens)).exp()
    return scores / scores.mean(1, keepdim=True)


def attention(batch: int, heads: int, tokens: int, keys: int | None = None) -> torch.Tensor:
    torch.manual_seed(0)
    common = 2 * torch.randn(batch, 1, 1, keys or tokens)  # what all queries look at
    return (common + torch.randn(batch, heads, tokens, keys or tokens)).softmax(-1)


class TestGuidedKeyDropout(RegularizerContract):
    """A token always sees itself, so of few keys fewer are hidden; see the tests below."""

    name = "guided_key_dropout"
    calibrated = False


class TestKeysOfLittleAttention(RegularizerContract):
    name = "guided_key_dropout"
    parameters: ClassVar[dict[str, Any]] = {"beta": -1.0, "p_max": 0.9, "prefix_tokens": 1}
    calibrated = False


class ConstantAttention(GuidedResidualDropout):
    """Its rates do not follow the finite differences of the input."""

    def regularize(self, x: torch.Tensor) -> torch.Tensor:
        self.attention = 1.0 + torch.arange(x[0, 0].numel()).expand(len(x), -1)
        return super().regularize(x)


class TestGuidedResidualDropout(RegularizerContract):
    name = "guided_residual_dropout"

    def test_the_gradient_is_the_transpose_of_the_forward_map(self) -> None:
        def make(p: float) -> Regularizer:
            return ConstantAttention(p, **self.parameters).train()

        self.make = make  # type: ignore[method-assign]
        super().test_the_gradient_is_the_transpose_of_the_forward_map()


class TestResidualsOfLittleAttention(TestGuidedResidualDropout):
    parameters: ClassVar[dict[str, Any]] = {"beta": -1.0, "p_max": 0.9}


class TestExactlyManyResiduals(TestGuidedResidualDropout):
    parameters: ClassVar[dict[str, Any]] = {"exact": True}


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("p_max", [0.5, 0.9])
def test_the_mean_of_the_rates_is_p_whatever_beta(beta: float, p_max: float) -> None:
    rates = guided_rates(peaked(), 0.2, beta, p_max)
    torch.testing.assert_close(rates.mean(1), torch.full((4,), 0.2))
    assert rates.max() <= p_max + 1e-6
    assert rates.min() >= 0


@pytest.mark.parametrize("beta", [-1.5, -1.0, 0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("p", [0.1, 0.3])
def test_rates_are_those_of_the_formula(beta: float, p: float) -> None:
    u = peaked(2, 50, seed=1).double()
    ours = guided_rates(u, p, beta, 0.5)
    for row, scores in zip(ours, u.numpy(), strict=True):
        wanted = reference.guided_rates(scores, p, beta, 0.5)
        np.testing.assert_allclose(row.numpy(), wanted, atol=2e-5)


def test_clipping_without_calibration_would_drop_far_too_little() -> None:
    u = peaked()
    clipped = (0.2 * u**2 / (u**2).mean(1, keepdim=True)).clamp(max=0.5).mean().item()
    assert clipped < 0.06
    assert guided_rates(u, 0.2, 2.0).mean().item() == pytest.approx(0.2, abs=1e-5)


def test_the_attention_dropped_at_equal_rates_differs_thirtyfold() -> None:
    torch.manual_seed(0)
    u = (1.65 * torch.randn(200, 196)).exp()
    u = u / u.mean(1, keepdim=True)
    mass = [float((guided_rates(u, 0.2, beta, 0.9) * u).mean()) for beta in BETAS]
    assert mass == pytest.approx([0.023, 0.20, 0.689, 0.723], abs=0.03)


def test_beta_turns_from_the_least_to_the_most_attended() -> None:
    u = peaked()
    mass = [float((guided_rates(u, 0.2, beta, 0.9) * u).mean()) for beta in BETAS]
    assert mass == sorted(mass)
    assert mass[1] == pytest.approx(0.2, abs=1e-5)
    assert mass[0] < 0.06
    assert mass[2] > 0.5


def test_what_takes_no_part_has_no_rate_and_does_not_change_the_others() -> None:
    u = peaked(3, 20)
    area = torch.ones(3, 20)
    area[:, 15:] = 0
    rates = guided_rates(u, 0.2, 1.0, area=area)
    assert (rates[:, 15:] == 0).all()
    torch.testing.assert_close(rates[:, :15], guided_rates(u[:, :15], 0.2, 1.0))


@pytest.mark.parametrize("odd", ["nan", "zero", "one"])
@pytest.mark.parametrize("beta", BETAS)
def test_odd_scores_give_even_rates(odd: str, beta: float) -> None:
    u = torch.full((2, 8), {"nan": torch.nan, "zero": 0.0, "one": 1.0}[odd])
    torch.testing.assert_close(guided_rates(u, 0.3, beta), torch.full((2, 8), 0.3))


def test_received_attention_is_that_of_the_formula_and_has_mean_one() -> None:
    weights = attention(2, 3, 12, 7)
    u = received_attention(weights)
    np.testing.assert_allclose(u.numpy(), reference.received_attention(weights.numpy()), rtol=1e-5)
    torch.testing.assert_close(u.mean(1), torch.ones(2))


@pytest.mark.parametrize("keys", [None, 20])
def test_keys_are_hidden_from_all_queries_but_themselves(keys: int | None) -> None:
    x = attention(6, 3, 36, keys)
    y = guided_key_dropout(x, 0.4)
    alive = y != 0
    keep = alive.any(1).float().mean(1) > 0.5
    for b in range(6):
        for h in range(3):
            wanted = reference.hidden_keys(x[b, h].double().numpy(), keep[b].numpy())
            np.testing.assert_allclose(y[b, h].numpy(), wanted, atol=1e-6)
    if keys is None:
        assert alive.diagonal(dim1=2, dim2=3).all()
    torch.testing.assert_close(y.sum(-1), x.sum(-1))


@pytest.mark.parametrize("beta", BETAS)
def test_the_measured_rate_of_keys_is_p(beta: float) -> None:
    x, layer = attention(400, 2, 49), GuidedKeyDropout(0.2, beta)
    assert layer.measured_rate(x, layer(x)) == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize(("beta", "more"), [(1.0, True), (-1.0, False)])
def test_beta_decides_which_keys_are_hidden(beta: float, more: bool) -> None:
    x = attention(300, 2, 49)
    hidden = (guided_key_dropout(x, 0.2, beta) == 0).float().mean((1, 2))
    u = received_attention(x)
    high = u > u.median(1, keepdim=True).values
    ratio = float(hidden[high].mean() / hidden[~high].mean())
    assert ratio > 2 if more else ratio < 0.5


def test_hiding_keys_from_all_is_leaving_them_out_of_the_sequence() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 10, 8).unbind(0)
    weights = (q @ k.transpose(-2, -1)).softmax(-1)
    y = guided_key_dropout(weights, 0.5)
    kept = ((y != 0).float().mean((0, 1, 2)) > 0.5).nonzero().flatten()
    assert 1 < len(kept) < 10
    alone = (q[:, :, kept] @ k[:, :, kept].transpose(-2, -1)).softmax(-1) @ v[:, :, kept]
    torch.testing.assert_close((y @ v)[:, :, kept], alone, atol=1e-6, rtol=1e-5)


def test_tokens_of_the_prefix_and_of_the_padding_are_left_out() -> None:
    x = attention(200, 2, 20)
    padding = torch.zeros(200, 20, dtype=torch.bool)
    padding[:, 15:] = True
    layer = GuidedKeyDropout(0.3, prefix_tokens=2)
    layer.padding = padding
    hidden = layer(x) == 0
    assert layer.padding is None
    assert not hidden[..., :2].any()
    assert not hidden[..., 15:].any()
    off = ~torch.eye(20, dtype=torch.bool)[:, 2:15].expand(200, 2, 20, 13)
    assert hidden[..., 2:15][off].float().mean().item() == pytest.approx(0.3, abs=0.02)


def test_residuals_are_dropped_and_weighted_as_in_the_formula() -> None:
    torch.manual_seed(0)
    x, added, u = torch.randn(3, 30, 8), torch.randn(3, 30, 8), peaked(3, 30)
    rates = guided_rates(u, 0.3, 1.0)
    y = guided_residual_dropout(added.transpose(1, 2), 0.3, attention=u).transpose(1, 2)
    keep = (y != 0).any(2)
    assert 0 < keep.float().mean() < 1
    for b in range(3):
        parts = (part[b].double().numpy() for part in (x, added, keep, rates))
        wanted = reference.skipped_block(*parts)
        np.testing.assert_allclose((x + y)[b].numpy(), wanted, atol=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_what_is_added_is_unbiased(beta: float) -> None:
    torch.manual_seed(0)
    u, draws = peaked(1, 64), 8000
    y = guided_residual_dropout(torch.ones(draws, 1, 64), 0.2, beta, attention=u.expand(draws, -1))
    # The largest factor is 2, so one standard error is at most 1 / sqrt(draws).
    torch.testing.assert_close(y.mean(0), torch.ones(1, 64), atol=5 / draws**0.5, rtol=0)
    assert y.max() <= 2.0


@pytest.mark.parametrize("beta", BETAS)
def test_an_exact_number_of_residuals_is_as_unbiased(beta: float) -> None:
    torch.manual_seed(0)
    u, draws = peaked(1, 64), 8000
    given = {"beta": beta, "exact": True, "attention": u.expand(draws, -1)}
    y = guided_residual_dropout(torch.ones(draws, 1, 64), 0.2, **given)
    torch.testing.assert_close(y.mean(0), torch.ones(1, 64), atol=5 / draws**0.5, rtol=0)
    dropped = (y == 0).sum((1, 2))
    assert sorted(set(dropped.tolist())) == [12, 13]  # of 12.8


@pytest.mark.parametrize("beta", BETAS)
def test_an_exact_number_of_keys_is_hidden_in_every_sample(beta: float) -> None:
    x, layer = attention(50, 2, 52), GuidedKeyDropout(0.25, beta, prefix_tokens=4, exact=True)
    y = layer(x)
    hidden = (y == 0).float().mean((1, 2)) > 0.5
    assert (hidden.sum(1) == 12).all()
    assert not hidden[:, :4].any()
    assert layer.measured_rate(x, y) == pytest.approx(0.25, abs=0.003)


def test_the_tokens_of_an_exact_number_are_not_counted_among_the_padding() -> None:
    padding = torch.zeros(30, 20, dtype=torch.bool)
    padding[:10, 10:] = True
    layer = GuidedKeyDropout(0.3, exact=True)
    layer.padding = padding
    hidden = (layer(attention(30, 2, 20)) == 0).float().mean((1, 2)) > 0.5
    assert hidden.sum(1).tolist() == [3] * 10 + [6] * 20


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("beta", BETAS)
def test_the_attention_dropped_is_the_rates_weighted_by_attention(beta: float, exact: bool) -> None:
    x = attention(300, 2, 49)
    u = received_attention(x)
    wanted = float((guided_rates(u, 0.2, beta) * u).mean())
    layer = GuidedKeyDropout(0.2, beta, exact=exact)
    y = layer(x)
    off = ~torch.eye(49, dtype=torch.bool)
    lost = float((x * (y == 0))[..., off].sum() / x[..., off].sum())
    assert layer.attention_dropped(x, y) == pytest.approx(lost, abs=1e-5)
    assert lost == pytest.approx(wanted, abs=0.03)
    residual = GuidedResidualDropout(0.2, beta, exact=exact)
    added = torch.ones(300, 3, 49)
    residual.attention = u
    y = residual(added)
    lost = float((u * (y[:, 0] == 0)).sum() / u.sum())
    assert residual.attention_dropped(added, y) == pytest.approx(lost, abs=1e-5)
    assert lost == pytest.approx(wanted, abs=0.03)


def test_the_attention_dropped_leaves_the_prefix_and_the_padding_out() -> None:
    x = torch.zeros(1, 1, 6, 6)
    x[..., 0], x[..., 5], x[..., 1:5] = 0.6, 0.2, 0.05
    layer = GuidedKeyDropout(0.5, beta=0.0, prefix_tokens=1, exact=True)
    layer.padding = torch.tensor([[False] * 5 + [True]])
    # Each of four keys is seen by five others; two of the keys are hidden.
    assert layer.attention_dropped(x, layer(x)) == pytest.approx(0.5)
    residual = GuidedResidualDropout(0.5, beta=0.0, prefix_tokens=2, exact=True)
    residual.attention = torch.tensor([[5.0, 5.0, 1.0, 1.0, 1.0, 1.0]])
    added = torch.ones(1, 2, 6)
    assert residual.attention_dropped(added, residual(added)) == pytest.approx(0.5)


def test_of_a_map_alone_the_activity_dropped_is_told() -> None:
    torch.manual_seed(0)
    x, layer = torch.rand(50, 3, 6, 6), GuidedResidualDropout(0.3)
    y = layer(x)
    assert layer.attention_dropped(x, y) == pytest.approx(float((x * (y == 0)).sum() / x.sum()))
    assert layer.attention_dropped(0 * x, 0 * x) == 0.0


@pytest.mark.parametrize("beta", BETAS)
def test_gumbel_noise_would_drop_nearly_the_same_attention_but_knows_no_highest_rate(
    beta: float,
) -> None:
    torch.manual_seed(0)
    u = (1.65 * torch.randn(1, 196)).exp().expand(4000, -1)
    u = u / u.mean(1, keepdim=True)
    noise = -torch.empty(4000, 196).exponential_().log()
    ranks = (beta * u.log() + noise).argsort(1, descending=True).argsort(1)
    gumbel = (ranks < 39).float()
    ours = drop_exactly(guided_rates(u, 39 / 196, beta, 0.9), 39 / 196).float()
    assert (ours.sum(1) == 39).all()
    mass = [float((dropped * u).mean()) for dropped in (ours, gumbel)]
    assert mass[0] == pytest.approx(mass[1], abs=0.06)
    assert ours.mean(0).max() < 0.93  # 0.9, and five standard errors
    assert (gumbel.mean(0).max() > 0.97) == (beta != 0)


def test_alone_the_activity_of_the_map_is_its_attention() -> None:
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 4, 4)
    x[..., :2] = 4.0
    dropped = (guided_residual_dropout(x, 0.2) == 0).float().mean((0, 1))
    assert dropped[:, :2].mean() > 3 * dropped[:, 2:].mean()
    assert dropped.mean().item() == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("cls", [GuidedKeyDropout, GuidedResidualDropout])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": "1"}, "beta must be a finite number"),
        ({"beta": float("inf")}, "beta must be a finite number"),
        ({"p_max": 1.0}, "p_max: p is the share|p_max"),
        ({"p_max": 0.0}, "p_max must be above 0"),
        ({"prefix_tokens": -1}, "prefix_tokens must be a whole number"),
    ],
)
def test_wrong_parameters_are_named(cls: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        cls(**arguments)
    assert cls.__name__ in str(error.value)

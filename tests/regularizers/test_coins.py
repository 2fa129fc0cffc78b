"""Coins of which together always as many fall badly, each with its own rate."""

import pytest
import torch

from medseg_reg.regularizers.coins import drop_exactly


def draws(rates: list[float], p: float, times: int = 10_000) -> torch.Tensor:
    torch.manual_seed(0)
    return drop_exactly(torch.tensor(rates).expand(times, -1), p)


@pytest.mark.parametrize(
    ("rates", "p"),
    [
        ([0.9, 0.1, 0.5, 0.5], 0.5),
        ([0.3] * 10, 0.3),
        ([0.02, 0.9, 0.28, 0.0, 0.0], 0.4),  # two take no part
        ([0.05, 0.15, 0.1], 0.1),
        ([0.3], 0.3),
    ],
)
def test_each_unit_is_dropped_with_its_own_rate_and_always_as_many(
    rates: list[float], p: float
) -> None:
    dropped = draws(rates, p)
    torch.testing.assert_close(dropped.float().mean(0), torch.tensor(rates), atol=0.025, rtol=0)
    counts = dropped.sum(1).float()
    wanted = sum(rates)
    assert counts.mean().item() == pytest.approx(wanted, abs=0.025)
    assert counts.max() - counts.min() <= (0 if abs(wanted - round(wanted)) < 1e-6 else 1)
    assert (counts - wanted).abs().max() < 1


def test_units_are_dropped_together_about_as_often_as_alone() -> None:
    dropped = draws([0.25] * 8, 0.25).float()  # two of eight
    together = dropped.T @ dropped / len(dropped)
    pairs = together[~torch.eye(8, dtype=torch.bool)]
    torch.testing.assert_close(pairs, torch.full_like(pairs, 1 / 28), atol=0.01, rtol=0)


@pytest.mark.parametrize("units", [196, 5000])
def test_the_number_is_exact_for_many_units_too(units: int) -> None:
    torch.manual_seed(0)
    rates = torch.rand(200, units)
    rates = rates * (0.25 / rates.mean(1, keepdim=True))
    assert (drop_exactly(rates, 0.25).sum(1) == units // 4).all()


def test_without_units_nothing_is_dropped() -> None:
    assert drop_exactly(torch.zeros(3, 0), 0.2).shape == (3, 0)

"""Intervals over groups and seeds."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from medseg_reg.study.statistics.hierarchical import (
    Resamples,
    hierarchical_interval,
    variance_of_mean,
)


def slowly(values: np.ndarray, draws: Resamples) -> list[float]:
    """Resample by loops, as the sentence says it."""
    found = []
    for seeds, groups in zip(draws.of_seeds, draws.of_groups, strict=True):
        drawn = np.repeat(np.arange(len(seeds)), seeds)
        means = [np.nanmean(values[drawn, g]) if (~np.isnan(values[drawn, g])).any() else np.nan
                 for g in np.repeat(np.arange(len(groups)), groups)]  # fmt: skip
        found.append(np.nanmean(means) if not np.isnan(means).all() else np.nan)
    return found


@pytest.mark.parametrize("holes", [0, 3])
def test_resamples_are_those_of_plain_loops(holes):
    values = np.random.default_rng(0).normal(size=(3, 5))
    values.flat[: 2 * holes : 2] = np.nan
    draws = Resamples(3, 5, 200)
    np.testing.assert_allclose(draws.means(values), slowly(values, draws), rtol=1e-12)


def test_every_resample_draws_as_many_as_there_are():
    draws = Resamples(4, 9, 500, seed=3)
    assert set(draws.of_seeds.sum(axis=1)) == {4}
    assert set(draws.of_groups.sum(axis=1)) == {9}
    assert draws.of_groups.mean() == pytest.approx(1)


def test_the_variance_of_resamples_is_that_of_the_formula():
    # Of all resamples there are, not of some: 3^3 seeds times 4^4 groups.
    values = np.random.default_rng(1).normal(size=(3, 4))
    seeds = [list(one) for one in itertools.product(range(3), repeat=3)]
    groups = [list(one) for one in itertools.product(range(4), repeat=4)]
    every = [values[np.ix_(s, g)].mean() for s in seeds for g in groups]
    v_g, v_s, v_e = variance_of_mean(values)
    assert np.var(every) == pytest.approx(v_g * 3 / 4 + v_s * 2 / 3 + v_e * 6 / 12)


def test_the_parts_of_the_variance_are_those_of_the_two_way_layout():
    values = np.random.default_rng(2).normal(size=(5, 7))
    v_g, v_s, v_e = variance_of_mean(values)
    left = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    assert v_g * 35 == pytest.approx(5 * values.mean(0).var(ddof=1))
    assert v_s * 35 == pytest.approx(7 * values.mean(1).var(ddof=1))
    assert v_e * 35 == pytest.approx((left**2).sum() / 24)


def test_with_one_seed_and_many_groups_it_is_nearly_the_t_interval():
    values = np.random.default_rng(3).normal(5, 1, (1, 40))
    found = hierarchical_interval(values, Resamples(1, 40, 20_000))
    low, high = stats.t.interval(0.95, 39, values.mean(), stats.sem(values[0]))
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)


def test_a_spread_of_seeds_that_groups_share_widens_the_interval():
    rng = np.random.default_rng(4)
    plain = rng.normal(size=(4, 20))
    lucky = plain + 2 * rng.normal(size=(4, 1))
    draws = Resamples(4, 20)
    one, other = (hierarchical_interval(values, draws) for values in (plain, lucky))
    assert other.high - other.low > 2 * (one.high - one.low)
    # Nested, the luck would be averaged out over the 80 pairs.
    assert other.high - other.low > 2 * 2 * 1.96 * lucky.std() / math.sqrt(80)


def test_confidence_bounds_seed_and_equal_values():
    values = np.random.default_rng(5).uniform(0.9, 1, (3, 6))
    draws = Resamples(3, 6, 3000)
    wide, narrow = (hierarchical_interval(values, draws, c) for c in (0.99, 0.8))
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high
    again = hierarchical_interval(values, Resamples(3, 6, 3000), 0.99)
    assert again == wide
    cut = hierarchical_interval(values * 0 + np.eye(3, 6), draws, 0.99, (0.0, 1.0))
    assert cut.low == 0.0
    flat = hierarchical_interval(np.full((3, 6), 0.1 + 0.2), draws)
    assert flat.method == "constant"
    assert flat.low == flat.high == flat.mean


def test_what_is_missing_is_counted_and_two_groups_have_no_interval():
    values = np.random.default_rng(6).normal(size=(2, 4))
    values[0, 1] = np.nan
    values[:, 3] = np.nan
    found = hierarchical_interval(values, Resamples(2, 4, 500))
    assert (found.groups, found.seeds, found.left_out) == (3, 2, 3)
    assert found.low < found.mean < found.high
    few = hierarchical_interval(values[:, :2], Resamples(2, 2, 500))
    assert few.method == "none"
    assert math.isnan(few.low)
    none = hierarchical_interval(np.full((2, 3), np.nan), Resamples(2, 3, 50))
    assert math.isnan(none.mean)
    with pytest.raises(ValueError, match="expected \\(2, 3\\)"):
        hierarchical_interval(values, Resamples(2, 3, 50))

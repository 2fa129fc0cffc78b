"""Against simulated studies whose truth is known: errors, coverage and power.

Bounds are binomial: of N simulations with chance q, more than `most(N, q)` happen by accident less
than once in 10 000 tests, fewer than `least(N, q)` as well.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from medseg_reg.study.statistics import (
    compare,
    hierarchical_interval,
    is_supported,
    signed_rank,
)
from medseg_reg.study.statistics.hierarchical import Resamples
from medseg_reg.study.statistics.power import Spread, power_of
from medseg_reg.study.statistics.ranking import _bounds
from tests.study.statistics.made import noisy

# Of groups, of seeds, and of the rest; the last is the hardest: nearly all is the luck of seeds.
SPREADS = [(1.0, 0.0, 0.3), (1.0, 0.5, 1.0), (0.3, 1.0, 0.3)]


def most(trials: int, chance: float) -> int:
    return int(stats.binom.isf(1e-4, trials, chance))


def least(trials: int, chance: float) -> int:
    return int(stats.binom.ppf(1e-4, trials, chance))


def drawn(rng: np.random.Generator, seeds: int, groups: int, spread) -> np.ndarray:
    of_groups, of_seeds, rest = spread
    return (
        of_groups * rng.standard_normal(groups)
        + of_seeds * rng.standard_normal((seeds, 1))
        + rest * rng.standard_normal((seeds, groups))
    )


def covered(trials: int, seeds: int, groups: int, spread, confidence: float = 0.95) -> int:
    rng, draws = np.random.default_rng(0), Resamples(seeds, groups, 1000)
    found = (
        hierarchical_interval(drawn(rng, seeds, groups, spread), draws, confidence)
        for _ in range(trials)
    )
    return sum(one.low <= 0 <= one.high for one in found)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize(("seeds", "groups"), [(3, 5), (5, 12)])
def test_intervals_cover_the_truth(seeds, groups, spread):
    # Three seeds know their spread badly: 92 % are promised, not 95 %.
    assert covered(300, seeds, groups, spread) >= least(300, 0.92)


def test_intervals_are_not_simply_wide():
    # Where one kind of spread rules, they are as wide as they should be.
    assert covered(400, 5, 20, (1.0, 0.0, 0.0)) <= most(400, 0.95)
    assert covered(400, 5, 20, (1.0, 0.0, 0.0), 0.8) <= most(400, 0.82)


def test_the_test_over_groups_keeps_its_level_without_luck_of_seeds():
    rng = np.random.default_rng(1)
    ps = [signed_rank(drawn(rng, 3, 10, (1.0, 0.0, 1.0)).mean(axis=0)) for _ in range(600)]
    assert sum(p < 0.05 for p in ps) <= most(600, 0.05)


def test_with_luck_of_seeds_the_test_alone_errs_and_the_rule_of_both_does_not():
    rng, draws = np.random.default_rng(2), Resamples(5, 12, 1000)
    alone = both = 0
    for _ in range(300):
        values = drawn(rng, 5, 12, (0.3, 1.0, 0.3))
        shown = signed_rank(values.mean(axis=0)) < 0.05
        interval = hierarchical_interval(values, draws)
        alone += shown
        both += shown and not interval.low <= 0 <= interval.high
    assert alone > 100
    assert both <= most(300, 0.08)


def test_power_is_as_predicted_for_the_interval():
    rng, draws, spread = np.random.default_rng(3), Resamples(4, 10, 1000), (1.0, 0.6, 1.0)
    predicted = power_of(1.4, Spread(*spread), 10, 4)
    assert 0.5 < predicted < 0.9
    found = sum(
        hierarchical_interval(1.4 + drawn(rng, 4, 10, spread), draws).low > 0 for _ in range(300)
    )
    # The prediction is of a t test with known spread; 5 points are allowed on either side.
    assert least(300, predicted - 0.05) <= found <= most(300, predicted + 0.05)


def ranked(trials: int, seeds: int, groups: int, spread) -> tuple[float, float]:
    """Return in how many studies the rank of a method is covered, and how wide the intervals are.

    Of four nearly equal methods, whose true order is known; on average over them.
    """
    rng, draws = np.random.default_rng(5), Resamples(seeds, groups, 500)
    inside = width = 0.0
    for _ in range(trials):
        # The least is first.
        scores = [0.02 * n + drawn(rng, seeds, groups, spread) for n in range(4)]
        low, high = _bounds(np.stack(scores), draws, 0.95)
        inside += float(((low <= np.arange(1, 5)) & (np.arange(1, 5) <= high)).mean())
        width += float((high - low).mean()) / trials
    return inside, width


def test_intervals_of_ranks_cover_the_true_order_of_nearly_equal_methods():
    # Percentiles of the rank over resamples do so in about 80 % here: seeds decide, and are few.
    inside, width = ranked(150, 3, 10, (0.3, 1.0, 0.3))
    assert inside >= least(150, 0.95)
    assert width < 3  # of four methods; an interval of all ranks would cover without any data


@pytest.mark.slow
@pytest.mark.parametrize("spread", [(1.0, 0.0, 0.3), (1.0, 1.0, 1.0), (0.3, 1.0, 0.3)])
@pytest.mark.parametrize(("seeds", "groups"), [(3, 10), (5, 10)])
def test_coverage_of_ranks_over_designs(seeds, groups, spread):
    inside, width = ranked(200, seeds, groups, spread)
    print(f"{seeds} seeds, {groups} groups, {spread}: {inside / 2:.1f} %, width {width:.2f}")
    assert inside >= least(200, 0.95)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [*SPREADS, (0.0, 0.0, 1.0)])
@pytest.mark.parametrize(
    ("seeds", "groups"), [(1, 5), (3, 5), (5, 5), (3, 10), (5, 10), (3, 30), (5, 80)]
)
def test_coverage_over_many_designs(seeds, groups, spread):
    if seeds == 1 and spread[1]:
        pytest.skip("one seed says nothing about the spread over seeds")
    assert covered(2000, seeds, groups, spread) >= least(2000, 0.92)


@pytest.mark.slow
@pytest.mark.parametrize("luck", [0.0, 0.02, 0.06])
def test_few_studies_without_an_effect_support_one(luck):
    # A study errs if any of its three methods is called different.
    wrong = 0
    for number in range(400):
        gains = dict.fromkeys(("none", "a", "b", "c"), 0.0)
        table = noisy(gains, 5, 12, (0.02, luck, 0.02), rng=number)
        found = compare(table, "none", resamples=2000)
        wrong += any(is_supported(row) for _, row in found.iterrows())
    print(f"luck {luck}: {wrong / 400:.3f}")
    assert wrong <= most(400, 0.05)


@pytest.mark.slow
def test_a_planted_effect_is_supported_and_the_others_are_not():
    spread, found = (0.02, 0.01, 0.02), dict.fromkeys("abc", 0)
    # The interval is that of three methods together; Holm's p must agree, so a little is lost.
    predicted = power_of(0.03, Spread(*spread), 12, 5, alpha=0.05 / 3)
    for number in range(200):
        table = noisy({"none": 0.0, "a": 0.0, "b": 0.03, "c": 0.0}, 5, 12, spread, rng=number)
        for _, row in compare(table, "none", resamples=2000)[1:].iterrows():
            found[row["method"]] += is_supported(row)
    print(predicted, found)
    assert found["b"] >= least(200, predicted - 0.05)
    assert found["a"] + found["c"] <= most(200, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("shift", [2.0, 3.0])
def test_power_over_many_designs(spread, shift):
    rng, seeds, groups, trials = np.random.default_rng(4), 5, 15, 1500
    draws = Resamples(seeds, groups, 1000)
    v_g, v_s, v_e = Spread(*spread).of_mean(groups, seeds)
    gap = shift * np.sqrt(v_g + v_s - v_e)
    predicted = power_of(gap, Spread(*spread), groups, seeds)
    found = sum(
        hierarchical_interval(gap + drawn(rng, seeds, groups, spread), draws).low > 0
        for _ in range(trials)
    )
    assert least(trials, predicted - 0.06) <= found <= most(trials, predicted + 0.06)

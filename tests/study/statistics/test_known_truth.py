"""On simulated data with known truth: false positives, coverage and power are as stated."""

import numpy as np
import pytest
from scipy.stats import binom, false_discovery_control, wilcoxon

from medseg_reg.study.statistics import compare, seeds_needed
from medseg_reg.study.statistics.hierarchical import interval, resampled_means
from medseg_reg.study.statistics.paired import better_pairs, holm, rank_biserial, signed_rank_p
from medseg_reg.study.statistics.power import components, detectable, least_seeds, power_of
from tests.study.statistics.simulated import simulated


def differences(draw, groups, seeds, mean=0.0, spread=(0.01, 0.005, 0.01)):
    return (
        mean
        + draw.normal(0, spread[0], (groups, 1))
        + draw.normal(0, spread[1], (1, seeds))
        + draw.normal(0, spread[2], (groups, seeds))
    )


def test_resampled_means_are_those_of_drawn_groups_and_seeds():
    values = np.array([[1.0, 2.0], [4.0, np.nan]])
    found = {round(float(mean), 6) for mean in resampled_means(values, 4000)}
    possible = set()
    for groups in np.ndindex(2, 2):
        for seeds in np.ndindex(2, 2):
            drawn = values[np.ix_(groups, seeds)]
            if not np.isnan(drawn).all():
                possible.add(round(float(np.nanmean(drawn)), 6))
    assert found - possible <= {float("nan")} or all(np.isnan(x) for x in found - possible)
    assert possible <= found


def test_methods_are_resampled_in_pairs():
    values = np.random.default_rng(0).normal(size=(5, 3))
    means = resampled_means(np.stack([values, values + 1]), 50)
    np.testing.assert_allclose(means[:, 1] - means[:, 0], 1)


def test_p_and_corrections_are_those_of_scipy():
    draw = np.random.default_rng(0)
    for size in (5, 12, 60):
        d = draw.normal(0.3, 1, size)
        assert signed_rank_p(d) == wilcoxon(d).pvalue
    assert signed_rank_p(np.zeros(4)) == 1
    assert np.isnan(signed_rank_p(np.array([np.nan])))
    p = draw.uniform(size=9)
    brute = [min(1, max((9 - j) * q for j, q in enumerate(sorted(p)) if q <= one)) for one in p]
    np.testing.assert_allclose(holm(p), brute)
    # Never below the correction of false discoveries, which asks for less.
    assert (holm(p) >= false_discovery_control(p) - 1e-12).all()
    np.testing.assert_array_equal(holm([np.nan, 0.03]), [np.nan, 0.03])


def test_effect_sizes_are_those_of_brute_force():
    d = np.array([0.3, -0.1, 0.2, 0.0, 0.5, np.nan])
    # ranks of 0.1, 0.2, 0.3, 0.5 are 1, 2, 3, 4, of which 1 is negative
    assert rank_biserial(d) == pytest.approx((2 + 3 + 4 - 1) / 10)
    assert rank_biserial(np.zeros(3)) == 0
    assert np.nanmean(better_pairs(d)) == pytest.approx(3.5 / 5)


def test_variance_components_are_found_again():
    spread, draw = (0.02, 0.01, 0.03), np.random.default_rng(1)
    found = [components(differences(draw, 20, 10, spread=spread)) for _ in range(300)]
    np.testing.assert_allclose(np.mean(found, axis=0), np.square(spread), rtol=0.15)


def test_least_seeds_and_detectable_difference_agree_with_the_power():
    parts = components(differences(np.random.default_rng(2), 12, 8))
    seeds = int(least_seeds(0.015, parts, 12, 0.8, 0.05))
    assert power_of(0.015, parts, 12, seeds, 0.05) >= 0.8
    assert power_of(0.015, parts, 12, seeds - 1, 0.05) < 0.8
    least = detectable(parts, 12, 8, 0.8, 0.05)
    assert power_of(least, parts, 12, 8, 0.05) == pytest.approx(0.8, abs=1e-6)
    assert power_of(0, parts, 12, 8, 0.05) == pytest.approx(0.05)


def test_false_positives_of_the_test_over_patients_keep_their_level():
    draw, trials = np.random.default_rng(3), 1000
    wrong = sum(
        signed_rank_p(differences(draw, 12, 4, spread=(0.02, 0.0, 0.02)).mean(axis=1)) < 0.05
        for _ in range(trials)
    )
    assert wrong <= binom.ppf(0.999, trials, 0.05)


def test_intervals_over_patients_and_seeds_cover_the_truth():
    draw, trials = np.random.default_rng(4), 200
    covered = 0
    for _ in range(trials):
        found = interval(differences(draw, 15, 10, mean=0.02), resamples=400)
        covered += found.low <= 0.02 <= found.high
    # A bootstrap of ten seeds is a little too narrow: 90 % instead of 95 % are asked for.
    assert covered >= binom.ppf(0.001, trials, 0.90)


def test_seeds_alone_make_no_method_different():
    # Between seeds there is a large spread, between methods none: over patients alone a method
    # looks better or worse than the other nearly always; both rules together seldom say so.
    draw, trials, alone, both = np.random.default_rng(5), 200, 0, 0
    for _ in range(trials):
        d = differences(draw, 15, 5, spread=(0.005, 0.02, 0.005))
        p, found = signed_rank_p(d.mean(axis=1)), interval(d, resamples=300)
        alone += p < 0.05
        both += p < 0.05 and found.low * found.high > 0
    assert alone > 0.5 * trials
    assert both < 0.5 * alone


@pytest.mark.slow
@pytest.mark.parametrize("effect", [0.0, 0.02])
def test_a_study_finds_what_is_planted_and_nothing_else(effect):
    trials, found = 300, 0
    for trial in range(trials):
        results = simulated({"none": 0.0, "a": 0.0, "b": effect}, groups=15, seeds=8, seed=trial)
        table = compare(results, "none", resamples=500).set_index("method")
        ok = (table["p_holm"] < 0.05) & (table["difference_low"] * table["difference_high"] > 0)
        found += ok["b"] if effect else ok.any()
    if effect:
        predicted = seeds_needed(
            simulated({"none": 0.0, "b": effect}, groups=200, seeds=100), "none", effect
        )
        assert predicted["power"].iloc[0] > 0.99
        assert found >= binom.ppf(0.001, trials, 0.8)
    else:
        # Seeds count as a sample, so the family's rate stays near its level: 0.05, and 0.05 more
        # for the narrow bootstrap of eight seeds.
        assert found <= binom.ppf(0.999, trials, 0.10)


@pytest.mark.slow
def test_the_power_is_as_predicted():
    spread, groups, seeds, effect = (0.01, 0.01, 0.02), 12, 12, 0.012
    draw, trials = np.random.default_rng(6), 1500
    parts = components(differences(np.random.default_rng(7), 400, 400, spread=spread))
    predicted = power_of(effect, parts, groups, seeds, 0.05)
    seen = 0
    from scipy.stats import t

    for _ in range(trials):
        d = differences(draw, groups, seeds, effect, spread)
        own = components(d)
        error = np.sqrt(own.group / groups + own.seed / seeds + own.rest / (groups * seeds))
        seen += abs(d.mean()) / error > t.ppf(0.975, min(groups, seeds) - 1)
    assert 0.3 < predicted < 0.95
    assert abs(seen / trials - predicted) < 0.08


@pytest.mark.slow
@pytest.mark.parametrize(
    ("groups", "seeds", "spread", "low", "high"),
    [
        (30, 3, (0.005, 0.02, 0.01), 0.68, 0.82),
        (5, 3, (0.02, 0.005, 0.01), 0.78, 0.92),
        (15, 10, (0.01, 0.005, 0.01), 0.91, 0.99),
        (40, 20, (0.01, 0.01, 0.01), 0.90, 0.98),
    ],
)
def test_intervals_are_as_narrow_as_the_documentation_says(groups, seeds, spread, low, high):
    draw, trials, covered = np.random.default_rng(8), 400, 0
    for _ in range(trials):
        found = interval(differences(draw, groups, seeds, spread=spread), resamples=500)
        covered += found.low <= 0 <= found.high
    assert low < covered / trials < high

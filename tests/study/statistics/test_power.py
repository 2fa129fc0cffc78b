"""Seeds needed, and the least difference that can be shown."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from medseg_reg.errors import MedsegError
from medseg_reg.study.statistics import detectable_difference, seeds_needed
from medseg_reg.study.statistics.power import Spread, _chance, power_of, spread_of
from tests.study.statistics.made import noisy, results

PILOT = noisy({"none": 0.0, "dropout": 0.01}, seeds=5, groups=12)


def test_a_spread_is_found_again():
    rng = np.random.default_rng(0)
    found = [
        spread_of(
            3 * rng.normal(size=20) + 2 * rng.normal(size=(10, 1)) + 4 * rng.normal(size=(10, 20))
        )
        for _ in range(300)
    ]
    # The mean squares are unbiased; three standard errors of 300 draws are below 7 %.
    assert np.mean(np.square(found), axis=0) == pytest.approx([9, 4, 16], rel=0.1)


def test_with_one_kind_of_spread_it_is_the_textbook_t_test():
    # 10 groups without any spread of seeds: a t test of 10 differences.
    shift, limit = 0.02 / (0.03 / np.sqrt(10)), stats.t.isf(0.025, 9)
    wanted = stats.nct.sf(limit, 9, shift) + stats.nct.cdf(-limit, 9, shift)
    assert power_of(0.02, Spread(0.03, 0.0, 0.0), 10, 4) == pytest.approx(wanted)
    assert power_of(0.0, Spread(0.03, 0.01, 0.02), 10, 4) == pytest.approx(0.05)


@pytest.mark.parametrize("alpha", [0.05, 0.001])
@pytest.mark.parametrize("freedom", [1, 1.5, 2, 9, 400])
def test_the_chance_is_that_of_the_noncentral_t(freedom, alpha):
    limit = stats.t.isf(alpha / 2, freedom)
    for shift in (0.3, 2.0, 6.0):
        wanted = stats.nct.sf(limit, freedom, shift) + stats.nct.cdf(-limit, freedom, shift)
        assert _chance(shift, freedom, alpha) == pytest.approx(wanted, abs=1e-6)
    # Where scipy's is NaN, the chance still rises to 1.
    assert _chance(1e4, freedom, alpha) == pytest.approx(1, abs=1e-6)


def test_the_answer_is_the_least_number_that_is_enough():
    found = seeds_needed(PILOT, "none", 0.02)
    row = found.iloc[0]
    spread = Spread(row["sd_groups"], row["sd_seeds"], row["sd_rest"])
    needed = int(row["seeds_needed"])
    assert power_of(0.02, spread, 12, needed) >= 0.8
    assert needed == 2 or power_of(0.02, spread, 12, needed - 1) < 0.8
    assert power_of(row["detectable"], spread, 12, 5) == pytest.approx(0.8)
    assert row["detectable_limit"] <= row["detectable"]
    assert row["power"] == pytest.approx(power_of(0.02, spread, 12, 5))


def test_smaller_differences_and_more_power_need_more_seeds():
    numbers = [seeds_needed(PILOT, "none", d)["seeds_needed"].item() for d in (0.05, 0.03, -0.02)]
    assert numbers == sorted(numbers)
    more = seeds_needed(PILOT, "none", 0.02, power=0.95)["seeds_needed"].item()
    assert more >= numbers[-1]


def test_below_the_limit_of_the_groups_no_number_of_seeds_is_enough():
    limit = detectable_difference(PILOT, "none")["detectable_limit"].item()
    assert seeds_needed(PILOT, "none", 0.9 * limit)["seeds_needed"].item() == np.inf
    assert np.isfinite(seeds_needed(PILOT, "none", 1.1 * limit)["seeds_needed"].item())


def test_more_seeds_do_not_help_groups_too_few_for_the_signed_rank_test():
    gain = {"none": 0.0, "dropout": 0.05}
    few, enough = (noisy(gain, seeds=5, groups=groups) for groups in (5, 6))
    found = seeds_needed(few, "none", 0.5)
    assert found["power"].item() == 0
    assert (found[["seeds_needed", "detectable", "detectable_limit"]] == np.inf).all(axis=None)
    assert "5 groups cannot reach p < 0.05" in found.attrs["notes"][0]
    assert np.isfinite(seeds_needed(enough, "none", 0.5)["seeds_needed"].item())
    # As strictly as Holm for two methods: the least p of six groups is 0.031.
    assert seeds_needed(enough, "none", 0.5, alpha=0.025)["seeds_needed"].item() == np.inf


def test_what_cannot_be_answered_is_refused():
    one = PILOT[PILOT["seed"] == 0]
    with pytest.raises(MedsegError, match="one seed only"):
        seeds_needed(one, "none", 0.02)
    with pytest.raises(MedsegError, match="other than 0"):
        seeds_needed(PILOT, "none", 0.0)
    with pytest.raises(MedsegError, match="more than alpha"):
        seeds_needed(PILOT, "none", 0.02, power=0.05)


def test_groups_with_a_missing_value_are_left_out_by_name():
    table = PILOT.copy()
    table.loc[(table["group"] == "p03") & (table["seed"] == 1), "value"] = np.nan
    found = seeds_needed(table, "none", 0.02)
    assert found["groups"].item() == 11
    assert "dropout: 1 of 12 groups lack a value" in found.attrs["notes"][1]


def test_seeds_that_copy_each_other_are_no_pilot():
    table = results(lambda m, s, g: 0.6 + 0.01 * g + (m == "dropout") * (0.02 + 0.001 * g))
    found = seeds_needed(table, "none", 0.02)
    assert found[["sd_seeds", "power", "seeds_needed", "detectable"]].isna().all(axis=None)
    assert "all seeds have the same differences" in found.attrs["notes"][0]

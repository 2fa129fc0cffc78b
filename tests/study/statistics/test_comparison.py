"""A comparison says what is in the data; so do ranks and words."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from medseg_reg.study.statistics import compare, holm, is_supported, rank, verdict
from medseg_reg.study.statistics.comparison import COLUMNS
from tests.study.statistics.made import noisy, results


def test_a_planted_effect_is_found_and_the_baseline_is_not_compared():
    table = noisy({"none": 0.0, "dropout": 0.05, "drop_block": 0.0}, seeds=4, groups=12)
    found = compare(table, "none")
    assert tuple(found.columns) == COLUMNS
    assert found["method"].tolist() == ["none", "drop_block", "dropout"]
    first = found.iloc[0]
    assert first["difference":].isna().all()
    assert first["low"] < first["mean"] < first["high"]
    row = found.iloc[2]
    assert row["p_holm"] < 0.01
    assert row["difference_low"] > 0
    assert row["improvement_low"] > 0.5
    assert row["effect_size"] > 0.9
    assert verdict(row).startswith("dropout: the data support a difference from none: the dice is")
    assert "no difference is shown" in verdict(found.iloc[1])


def test_the_numbers_are_those_of_plain_means():
    table = noisy({"none": 0.0, "a": 0.01, "b": 0.02, "c": -0.01}, groups=7)
    found = compare(table, "none", resamples=200).set_index("method")
    wide = table.pivot(index=["method", "seed"], columns="group", values="value")
    for method in "abc":
        gap = wide.loc[method] - wide.loc["none"]
        assert found.loc[method, "mean"] == pytest.approx(wide.loc[method].to_numpy().mean())
        assert found.loc[method, "difference"] == pytest.approx(gap.to_numpy().mean())
        assert found.loc[method, "improvement"] == pytest.approx((gap > 0).to_numpy().mean())
    np.testing.assert_allclose(found.loc[list("abc"), "p_holm"], holm(found.loc[list("abc"), "p"]))


def test_methods_are_corrected_within_their_data_set_and_network():
    unet = noisy({"none": 0.0, "a": 0.02, "b": 0.01})
    plus = noisy({"none": 0.0, "a": 0.02}, network="unet3plus", rng=1)
    both = compare(pd.concat([unet, plus]), "none", resamples=100)
    alone = compare(plus, "none", resamples=100)
    part = both[both["network"] == "unet3plus"].reset_index(drop=True)
    pd.testing.assert_frame_equal(part, alone)


@pytest.mark.parametrize("metric", ["hd95", "ece", "volume_difference"])
def test_where_less_is_better_a_fall_is_an_improvement(metric):
    table = results(lambda m, s, g: 0.4 - 0.2 * (m == "dropout") + 0.01 * g, metric=metric)
    row = compare(table, "none", metric, resamples=200).iloc[1]
    assert row["difference"] == pytest.approx(-0.2)
    assert row["improvement"] == 1.0
    assert row["effect_size"] == 1.0
    assert "lower by 0.2 (less is better)" in verdict(row)
    assert rank(table, metric, resamples=50)["method"].tolist() == ["dropout", "none"]


def test_of_a_volume_difference_the_size_counts():
    table = results(lambda m, s, g: (-0.1 if m == "none" else 0.02) * (1 + g), groups=6,
                    metric="volume_difference")  # fmt: skip
    row = compare(table, "none", "volume_difference", resamples=100).iloc[1]
    assert row["difference"] < 0
    assert row["improvement"] == 1.0


def test_equal_methods_tie():
    row = compare(results(lambda m, s, g: 0.1 * g), "none", resamples=100).iloc[1]
    assert (row["difference"], row["p"], row["effect_size"], row["improvement"]) == (0, 1, 0, 0.5)
    assert "the mean dice is the same" in verdict(row)
    ranked = rank(results(lambda m, s, g: 0.1 * g), resamples=100)
    assert ranked["rank"].tolist() == [1.5, 1.5]
    assert ranked["best"].tolist() == [0.5, 0.5]


def test_ranks_follow_the_means_and_say_how_sure_they_are():
    found = rank(noisy({"none": 0.0, "a": 0.1, "b": 0.004}, groups=10), resamples=2000)
    assert found["method"].iloc[0] == "a"
    assert (found["low"] <= found["rank"]).all()
    assert (found["rank"] <= found["high"]).all()
    assert found["best"].sum() == pytest.approx(1)
    assert found["best"].iloc[0] > 0.99
    # Between equals the order is open.
    assert found["high"].iloc[1:].tolist() == [3, 3]


def test_the_interval_of_a_rank_counts_the_methods_that_are_surely_better_and_worse():
    table = noisy({"none": 0.0, "a": 0.05, "b": 0.06, "c": -0.05}, seeds=4, groups=12)
    found = rank(table, resamples=500).set_index("method")
    assert found["high"].max() - found["low"].min() == 3
    assert found["high"]["c"] - found["low"]["c"] == 0  # the order is not open for all of them
    for method, row in found.iterrows():
        # Each in turn as the baseline: the intervals hold for all three others together.
        others = compare(table, str(method), resamples=500)[1:]
        assert row["low"] == 1 + (others["simultaneous_low"] > 0).sum()
        assert row["high"] == 4 - (others["simultaneous_high"] < 0).sum()


def test_two_groups_leave_every_rank_open():
    found = rank(noisy({"none": 0.0, "a": 0.3, "b": -0.3}, groups=2), resamples=100)
    assert found["rank"].tolist() == [1, 2, 3]
    assert found["low"].tolist() == [1, 1, 1]
    assert found["high"].tolist() == [3, 3, 3]


def test_few_groups_are_told_that_they_can_show_nothing():
    row = compare(noisy({"none": 0.0, "dropout": 0.3}, groups=5), "none", resamples=500).iloc[1]
    assert row["p"] == 0.0625
    said = verdict(row)
    assert "5 groups cannot reach p < 0.05" in said
    assert "0.0625" in said
    assert "support a" not in said


def test_the_least_p_of_six_groups_does_not_survive_many_methods():
    gains = {"none": 0.0, **{f"m{n}": 0.3 for n in range(4)}}
    row = compare(noisy(gains, groups=6), "none", resamples=500).iloc[1]
    assert (row["p"], row["p_holm"]) == (0.03125, 0.125)
    assert "not small enough for so many methods" in verdict(row)


def test_a_lucky_seed_that_lifts_all_groups_is_no_finding():
    # The groups agree to the last one, the seeds do not.
    lift = [0.09, -0.02, 0.01]
    table = results(lambda m, s, g: 0.5 + 0.03 * g + (m == "dropout") * (lift[s] + 0.001 * g))
    row = compare(table, "none").iloc[1]
    assert row["p_holm"] < 0.05
    assert row["difference_low"] < 0 < row["difference_high"]
    assert "the groups agree, but seeds may turn it" in verdict(row)


def test_where_the_interval_of_all_methods_together_decides_it_is_told():
    # Its own interval is above 0; that of five methods together is not.
    lift = [0.05, 0.01, 0.03, 0.04, 0.005]
    methods = {"none": 0.0, **{f"m{n}": 1.0 for n in range(5)}}
    table = results(
        lambda m, s, g: 0.5 + 0.03 * g + methods[m] * (lift[s] + 0.001 * g),
        methods=tuple(methods),
        seeds=len(lift),
        groups=9,
    )
    row = compare(table, "none", resamples=2000).iloc[1]
    assert row["p_holm"] < 0.05
    assert row["simultaneous_low"] < 0 < row["difference_low"]
    assert not is_supported(row)
    low, high = f"{row['simultaneous_low']:.3g}", f"{row['simultaneous_high']:.3g}"
    wanted = f"the interval that holds for all methods together, {low} to {high}, covers 0"
    assert wanted in verdict(row)


@pytest.mark.parametrize(("metric", "high"), [("dice", 1.0), ("hd95", np.inf)])
def test_no_interval_of_a_difference_goes_beyond_what_scores_can_differ_by(metric, high):
    # Two seeds that fail, by turns: stretched percentiles reach far.
    luck = {"none": [0.9, 0.1], "dropout": [0.1, 0.9]}
    table = results(lambda m, s, g: luck[m][s] + 0.01 * g, seeds=2, metric=metric)
    row = compare(table, "none", metric, resamples=2000).iloc[1]
    for one in ("difference", "simultaneous"):
        if high == 1.0:
            assert (row[f"{one}_low"], row[f"{one}_high"]) == (-1.0, 1.0)
        else:
            assert row[f"{one}_low"] < -1.0 < 1.0 < row[f"{one}_high"]


def test_one_seed_shows_nothing_about_a_method():
    row = compare(noisy({"none": 0.0, "dropout": 0.2}, seeds=1, groups=9), "none").iloc[1]
    assert row["p_holm"] < 0.05
    assert row["difference_low"] > 0
    assert "nothing is shown about the method, because another seed may turn it" in verdict(row)


def test_a_difference_that_never_varies_is_no_evidence():
    table = results(lambda m, s, g: 0.6 + 0.03 * g + 0.01 * s + (m == "dropout") * 0.02, groups=9)
    row = compare(table, "none", resamples=50).iloc[1]
    assert row["p_holm"] < 0.05
    assert row["simultaneous_low"] == row["simultaneous_high"] == pytest.approx(0.02)
    assert row["distinct_seeds"] == 1
    assert not is_supported(row)
    said = verdict(row)
    assert "nothing is shown" in said
    assert "all 3 seeds have the same differences" in said
    assert "no spread was seen" in said
    assert "interval 0.02 to 0.02" not in said


def test_seeds_that_copy_each_other_count_once_and_are_told():
    def copied(method, seed, group):
        return 0.6 + 0.02 * group + (method == "dropout") * (0.02 + 0.001 * group)

    found = compare(results(copied, groups=9), "none", resamples=500)
    row = found.iloc[1]
    assert row["simultaneous_low"] > 0
    assert row["p_holm"] < 0.05
    assert not is_supported(row)
    assert found.attrs["notes"] == [
        "demo, unet: dropout: of 3 seeds only 1 has dice differences of its own; the "
        "others repeat them in every group, as copies of a run do."
    ]
    # A third that is no copy leaves two.
    table = results(lambda m, s, g: copied(m, s, g) + 0.001 * (m == "dropout") * (s == 2), groups=9)
    found = compare(table, "none", resamples=500)
    assert found.iloc[1]["distinct_seeds"] == 2
    assert "of 3 seeds only 2 have" in found.attrs["notes"][0]
    assert is_supported(found.iloc[1])


def test_methods_without_any_difference_are_told_so_and_not_taken_for_copies():
    found = compare(results(lambda m, s, g: 0.1 * g), "none", resamples=50)
    assert found.attrs["notes"] == []
    said = verdict(found.iloc[1])
    assert "no difference is shown: none is there in any of 8 groups" in said
    assert "cannot reach" not in said


def test_the_least_p_that_is_told_is_that_of_the_groups_that_differ():
    def few(method, seed, group):
        gain = (0.1 + 0.01 * group + 0.001 * seed) * (group < 4)
        return 0.2 + 0.01 * group + gain * (method == "dropout")

    row = compare(results(few, groups=14), "none", resamples=500).iloc[1]
    assert row["tested_groups"] == 4
    assert row["p"] == 0.125
    said = verdict(row)
    assert "only 4 of 14 groups differ, which cannot reach p < 0.05" in said
    assert "whose least p for them is 0.125" in said


def test_the_least_p_is_that_of_the_groups_that_both_methods_have():
    table = noisy({"none": 0.0, "dropout": 0.3}, groups=8)
    lost = (table["method"] == "none") & table["group"].isin(["p00", "p01", "p02"])
    row = compare(table.assign(value=table["value"].mask(lost)), "none", resamples=50).iloc[1]
    assert (row["groups"], row["tested_groups"], row["p"]) == (8, 5, 0.0625)
    assert "only 5 of 8 groups differ, which cannot reach" in verdict(row)


def test_a_method_without_any_score_is_told_so():
    table = noisy({"none": 0.0, "dropout": 0.1, "lost": 0.1})
    gone = table.assign(value=table["value"].mask(table["method"] == "lost"))
    row = compare(gone, "none", resamples=50).iloc[2]
    assert verdict(row) == "lost: no dice is known, because every value is missing."
    # Its scores are known, but none where the baseline has one.
    first = table["group"] < "p04"
    halves = table.assign(
        value=table["value"]
        .mask(first & (table["method"] == "none"))
        .mask(~first & (table["method"] == "lost"))
    )
    row = compare(halves, "none", resamples=50).iloc[2]
    assert "none of them where 'none' has one, so they cannot be compared" in verdict(row)
    assert "over 4 groups and 3 seeds" in verdict(row)


def test_the_baseline_has_words_of_its_own_and_a_plain_mapping_will_do():
    found = compare(noisy({"none": 0.0, "dropout": 0.2}), "none", resamples=100)
    assert "there is nothing to compare it with" in verdict(found.iloc[0])
    assert "from the baseline: the score is" in verdict(found.iloc[1].to_dict())
    assert "the DICE is" in verdict(found.iloc[1].to_dict(), metric="DICE")


def test_the_baseline_alone_and_two_groups_still_have_a_table():
    alone = compare(noisy({"none": 0.0}), "none", resamples=50)
    assert len(alone) == 1
    two = compare(noisy({"none": 0.0, "a": 0.1}, groups=2), "none", resamples=50).iloc[1]
    assert np.isnan(two["low"])
    assert "no interval below 3 groups" in verdict(two)

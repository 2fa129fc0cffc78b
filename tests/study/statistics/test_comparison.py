"""Methods are compared in pairs; what cannot be compared is refused."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import wilcoxon

from medseg_reg.study.statistics import balanced, compare, rank, seeds_needed, verdict
from tests.study.statistics.simulated import simulated

FAST = {"resamples": 500}


def test_the_table_holds_what_brute_force_gives():
    results = simulated({"none": 0.0, "drop": 0.01}, groups=7, seeds=3)
    row = compare(results, "none", **FAST).iloc[1]
    table = results.pivot_table(index="group", columns=["method", "seed"], values="value")
    change = (table["drop"] - table["none"]).to_numpy()
    assert row["mean"] == pytest.approx(table["drop"].to_numpy().mean())
    assert row["difference"] == pytest.approx(change.mean())
    assert row["p"] == wilcoxon(change.mean(axis=1)).pvalue
    assert row["improvement"] == pytest.approx((change > 0).mean())
    assert (row["seeds"], row["groups"]) == (3, 7)
    assert row["difference_low"] < row["difference"] < row["difference_high"]


def test_a_planted_effect_is_found_and_said():
    table = compare(simulated({"none": 0.0, "drop": 0.03, "worse": -0.03}), "none", **FAST)
    drop, worse = table.iloc[1], table.iloc[2]
    assert drop["p_holm"] < 0.05 < 0.5 < drop["improvement_low"]
    assert drop["difference_low"] > 0 > worse["difference_high"]
    assert drop["effect_size"] > 0.5 > -0.5 > worse["effect_size"]
    assert verdict(drop).endswith(f"support it (corrected p = {drop['p_holm']:.2g}).")


def test_the_baseline_has_scores_and_no_differences():
    row = compare(simulated({"none": 0.0, "drop": 0.03}), "none", **FAST).iloc[0]
    assert row["low"] < row["mean"] < row["high"]
    columns = ["difference", "difference_low", "p", "p_holm", "effect_size", "improvement"]
    assert row[columns].isna().all()
    assert verdict(row) == "none is the baseline."


def test_p_is_corrected_over_the_methods_of_one_data_set_and_network():
    one = simulated({"none": 0.0, "a": 0.01, "b": 0.004})
    other = simulated({"none": 0.0, "a": 0.0}, seed=5).assign(dataset="other")
    table = compare(pd.concat([one, other]), "none", **FAST)
    alone = table[table["dataset"] == "other"].iloc[1]
    assert alone["p_holm"] == alone["p"]
    first = table[(table["dataset"] == "made") & (table["method"] == "a")].iloc[0]
    assert first["p_holm"] == pytest.approx(2 * first["p"])


def test_less_is_better_for_distances():
    results = simulated({"none": 0.0, "near": -0.05}).assign(metric="hd95")
    row = compare(results, "none", "hd95", **FAST).iloc[1]
    assert row["difference"] < 0 < row["effect_size"]
    assert row["improvement"] > 0.5
    ranks = rank(results, "hd95", **FAST)
    assert ranks.set_index("method")["rank"].to_dict() == {"none": 2.0, "near": 1.0}


def test_of_volume_differences_the_size_counts():
    results = simulated({"none": 0.0, "less": 0.0}).assign(metric="volume_difference")
    results.loc[results["method"] == "none", "value"] = -0.4
    results.loc[results["method"] == "less", "value"] = 0.1
    row = compare(results, "none", "volume_difference", **FAST).iloc[1]
    assert row["difference"] == pytest.approx(-0.3)
    assert row["improvement"] == 1


def test_classes_and_cases_of_a_patient_are_averaged_first():
    results = simulated({"none": 0.0, "drop": 0.02}, groups=4, seeds=2)
    lower = results.assign(value=results["value"] - 0.2, **{"class": "tumour"})
    both = compare(pd.concat([results, lower]), "none", **FAST)
    one = compare(results, "none", **FAST)
    assert both["groups"].tolist() == [4, 4]
    np.testing.assert_allclose(both["mean"], one["mean"] - 0.1)
    np.testing.assert_allclose(both["difference"], one["difference"])


def test_a_missing_score_is_left_out_of_its_pair_alone():
    results = simulated({"none": 0.0, "drop": 0.02}, groups=4, seeds=3)
    gone = (results["method"] == "drop") & (results["group"] == "p001")
    results.loc[gone & (results["seed"] == 0), "value"] = np.nan
    row = compare(results, "none", **FAST).iloc[1]
    table = results.pivot_table(
        index="group", columns=["method", "seed"], values="value", dropna=False
    )
    assert row["difference"] == pytest.approx(np.nanmean(table["drop"] - table["none"]))
    assert row["groups"] == 4
    results.loc[gone, "value"] = np.nan
    assert compare(results, "none", **FAST).iloc[1]["groups"] == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.drop(columns="split"), "no column split"),
        (lambda r: r.assign(metric="iou"), "no metric 'dice'; there is iou"),
        (lambda r: r[r["method"] != "none"], "no method 'none' to compare with; there is a, b"),
        (lambda r: r[(r["method"] != "a") | (r["seed"] > 0)], "not the same seeds \\(0 of one"),
        (lambda r: r[(r["method"] != "b") | (r["group"] != "p001")], "not the same groups"),
        (
            lambda r: r.assign(split=np.where(r["method"] == "b", "x", "abc")),
            "'none' and 'b' have not the same splits",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(change, words):
    results = simulated({"none": 0.0, "a": 0.0, "b": 0.0}, groups=3, seeds=2)
    with pytest.raises(ValueError, match=words):
        compare(change(results), "none", **FAST)


def test_a_failed_run_can_be_left_out_and_is_named():
    results = simulated({"none": 0.0, "a": 0.0}, groups=3, seeds=3)
    results = results[(results["method"] != "a") | (results["seed"] != 1)]
    kept, notes = balanced(results)
    assert notes == ["made, unet: seed 1 is left out, because a has no run with it"]
    assert compare(kept, "none", **FAST)["seeds"].tolist() == [2, 2]


def test_ranks_are_shared_by_ties_and_sure_where_differences_are_large():
    table = rank(simulated({"a": 0.0, "b": 0.2, "c": 0.1}), **FAST).set_index("method")
    assert table["rank"].to_dict() == {"a": 3.0, "b": 1.0, "c": 2.0}
    assert table["best"].to_dict() == {"a": 0.0, "b": 1.0, "c": 0.0}
    same = simulated({"a": 0.0, "b": 0.0})
    same["value"] = 0.5
    table = rank(same, **FAST)
    assert table["rank"].tolist() == [1.5, 1.5]
    assert table["best"].tolist() == [0.5, 0.5]


def test_five_patients_cannot_show_anything_by_this_test():
    row = compare(simulated({"none": 0.0, "drop": 0.2}, groups=5), "none", **FAST).iloc[1]
    assert row["p"] == 0.0625
    assert "with 5 patients no test can reach p < 0.05" in verdict(row)


def test_one_seed_shows_nothing_about_a_method():
    row = compare(simulated({"none": 0.0, "drop": 0.2}, seeds=1), "none", **FAST).iloc[1]
    assert "another seed may turn it" in verdict(row)


def test_no_difference_is_not_said_to_be_shown():
    row = compare(simulated({"none": 0.0, "drop": 0.0}), "none", **FAST).iloc[1]
    assert "does not show that there is none" in verdict(row)


def test_seeds_needed_fall_with_the_difference():
    results = simulated({"none": 0.0, "drop": 0.01})
    table = [seeds_needed(results, "none", d).iloc[0] for d in (0.01, 0.02, 0.05)]
    needed = [row["seeds_needed"] for row in table]
    assert needed[0] > needed[1] >= needed[2] >= 2
    assert table[0]["power"] < table[2]["power"]


def test_seeds_do_not_replace_patients():
    results = simulated({"none": 0.0, "drop": 0.0}, groups=6, spread=(0.1, 0.001, 0.001))
    row = seeds_needed(results, "none", 0.005).iloc[0]
    assert row["seeds_needed"] == np.inf
    assert row["detectable"] > 0.05


def test_bad_questions_are_refused():
    results = simulated({"none": 0.0, "drop": 0.0}, seeds=1)
    with pytest.raises(ValueError, match="12 groups and 1 seeds: two of each"):
        seeds_needed(results, "none", 0.01)
    with pytest.raises(ValueError, match="power 1: expected"):
        seeds_needed(results, "none", 0.01, power=1.0)

"""What cannot be compared fairly is refused, by name."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from medseg_reg.errors import MedsegError
from medseg_reg.study.statistics import balanced, compare, rank, seeds_needed
from medseg_reg.study.statistics.table import blocks
from tests.study.statistics.made import noisy, results

PLAIN = noisy({"none": 0.0, "dropout": 0.01, "drop_block": 0.02})


def changed(where, **values) -> pd.DataFrame:
    table = PLAIN.copy()
    for name, value in values.items():
        table[name] = table[name].mask(where, value)
    return table


IS = {name: PLAIN[name] for name in ("method", "seed", "case", "group")}


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (changed(IS["method"] == "dropout", split="a0"), "seed 0: methods .*different splits"),
        (PLAIN[(IS["method"] != "dropout") | (IS["seed"] < 2)], "different seeds.*dropout: 0, 1"),
        (
            PLAIN[(IS["method"] != "dropout") | (IS["case"] != "c03.0")],
            "'dropout' seed 0 lacks case 'c03.0'",
        ),
        (
            PLAIN[(IS["method"] != "dropout") | (IS["case"] != "c03.0") | (IS["seed"] != 2)],
            "'dropout' seed 2 lacks case 'c03.0' in class 'organ', which 'drop_block' seed 0 has",
        ),
        (PLAIN[IS["group"] == "p01"], "only one group .*'p01'"),
        (pd.concat([PLAIN, PLAIN[:1]]), "two rows for \\(none, 0, 5f, c00.0, organ\\)"),
        (changed((IS["case"] == "c01.0") & (IS["seed"] == 1), group="p09"), "two groups"),
        (PLAIN.drop(columns=["split", "class"]), "lack the columns split, class"),
        (changed(IS["case"] == "c01.0", value=np.inf), "9 values of dice are infinite"),
        (changed(IS["case"] == "c01.0", split=None), "column 'split' has empty fields"),
        (PLAIN[:0], "hold no metric 'dice', but none"),
    ],
)
@pytest.mark.parametrize("function", [compare, rank, seeds_needed])
def test_what_cannot_be_compared_is_refused_by_name(table, said, function):
    arguments = {compare: ("none",), rank: (), seeds_needed: ("none", 0.01)}[function]
    with pytest.raises(MedsegError, match=said):
        function(table, *arguments)


def test_an_unknown_metric_or_baseline_is_told_with_the_nearest():
    with pytest.raises(MedsegError, match="Did you mean 'dice'"):
        compare(PLAIN, "none", "dise")
    with pytest.raises(MedsegError, match="hold no metric 'hd95', but dice"):
        compare(PLAIN, "none", "hd95")
    with pytest.raises(MedsegError, match="no method 'dropuot' .*Did you mean 'dropout'"):
        compare(PLAIN, "dropuot")


def test_a_baseline_that_one_network_lacks_is_told_with_the_network():
    other = results(lambda *_: 0.5, ("dropout", "drop_block"), network="unet3plus")
    with pytest.raises(MedsegError, match="demo, unet3plus: has no method 'none'"):
        compare(pd.concat([PLAIN, other]), "none")


def test_seeds_may_differ_in_split_as_long_as_the_methods_agree():
    table = PLAIN.assign(split=PLAIN["seed"].astype(str))
    assert compare(table, "none", resamples=100)["seeds"].tolist() == [3, 3, 3]


def folded(seeds: int = 3, folds: int = 2) -> pd.DataFrame:
    """Return results in which each fold of a seed tests a part of the cases."""
    table = results(lambda m, s, g: 0.5 + 0.01 * g + 0.1 * (m == "dropout"), seeds=seeds)
    fold = table["group"].str[1:].astype(int) % folds
    return table.assign(split="fold" + fold.astype(str))


def test_folds_of_a_seed_test_every_case_once():
    (block,), notes = blocks(folded(), "dice")
    assert block.seeds == (0, 1, 2)
    assert block.values.shape == (2, 3, 8)
    assert not np.isnan(block.values).any()
    assert notes == []
    plain = folded().assign(split="5f")
    left, right = compare(folded(), "none", resamples=100), compare(plain, "none", resamples=100)
    pd.testing.assert_frame_equal(left, right)


def test_splits_that_share_cases_are_trainings_of_their_own():
    one = folded().query("split == 'fold0' or group in ['p01', 'p03']").assign(split="drawn0")
    two = folded().query("split == 'fold1' or group in ['p00', 'p02']").assign(split="drawn1")
    (block,), notes = blocks(pd.concat([one, two]), "dice", missing="refuse")
    assert block.seeds[:2] == ("0 (drawn0)", "0 (drawn1)")
    assert block.values.shape == (2, 6, 8)
    # Not tested is not missing.
    assert notes == []
    found = compare(pd.concat([one, two]), "none", resamples=100).iloc[1]
    assert (found["seeds"], found["groups"]) == (6, 8)
    assert found["difference"] == pytest.approx(0.1)


def test_a_fold_that_one_method_lacks_is_refused_and_left_out_by_balanced():
    table = folded()
    table = table[
        ~((table["method"] == "none") & (table["seed"] == 1) & (table["split"] == "fold1"))
    ]
    with pytest.raises(MedsegError, match="seed 1: methods were computed on different splits"):
        compare(table, "none")
    kept, notes = balanced(table)
    assert "dropout: 1 (fold1)" in notes[0]
    assert len(kept) == len(folded()) - 8
    assert compare(kept, "none", resamples=100)["difference"].iloc[1] == pytest.approx(0.1)


def test_balanced_keeps_the_common_seeds_and_names_the_others():
    table = PLAIN[(IS["method"] != "dropout") | (IS["seed"] != 1)]
    kept, notes = balanced(table)
    assert sorted(kept["seed"].unique()) == [0, 2]
    assert len(notes) == 1
    assert "drop_block: 1; none: 1" in notes[0]
    assert compare(kept, "none", resamples=100)["seeds"].tolist() == [2, 2, 2]
    everything, nothing = balanced(PLAIN)
    pd.testing.assert_frame_equal(everything, PLAIN)
    assert nothing == []
    apart = PLAIN[(IS["method"] == "dropout") == (IS["seed"] == 1)]
    with pytest.raises(MedsegError, match="no seed is common"):
        balanced(apart)


def test_the_order_of_rows_and_the_type_of_names_change_nothing():
    shuffled = PLAIN.sample(frac=1, random_state=0).assign(seed=lambda t: t["seed"].astype(str))
    left, right = compare(PLAIN, "none", resamples=200), compare(shuffled, "none", resamples=200)
    pd.testing.assert_frame_equal(left, right)


def test_a_group_is_the_mean_over_cases_in_each_class_then_over_classes():
    table = results(lambda *_: 0.0, ("none",), 1, 2, cases=2, classes=("a", "b"))
    table["value"] = [0.1, 0.2, 0.3, 0.8, 0.5, np.nan, 0.7, np.nan]
    (block,), notes = blocks(table, "dice")
    found = block.scores(block.of("none"))
    np.testing.assert_allclose(found, [[((0.1 + 0.3) / 2 + (0.2 + 0.8) / 2) / 2, 0.6]])
    assert notes == ["demo, unet: 2 of 8 values of dice are missing, and left out."]


def test_a_missing_value_is_left_out_of_both_sides_noted_and_refused_on_request():
    table = results(lambda m, s, g: 0.5 + 0.01 * g + 0.1 * (m == "dropout"), groups=6)
    # Paired, the gap stays 0.1; by means alone the loss of the worst case would look like a gain.
    gone = (table["method"] == "dropout") & (table["case"] == "c00.0") & (table["seed"] == 0)
    table["value"] = table["value"].mask(gone)
    found = compare(table, "none", resamples=200)
    assert found["difference"].iloc[1] == pytest.approx(0.1)
    assert "1 of 36 values of dice are missing" in found.attrs["notes"][0]
    with pytest.raises(MedsegError, match="1 of 36 values of dice are missing.*leave_out"):
        compare(table, "none", missing="refuse")
    ranked = rank(table, resamples=200)
    assert ranked["method"].tolist() == ["dropout", "none"]
    assert ranked.attrs["notes"]


def test_a_method_without_any_value_has_no_numbers_and_no_crash():
    table = results(lambda m, s, g: np.nan if m == "dropout" else 0.5 + 0.01 * g)
    row = compare(table, "none", resamples=50).iloc[1]
    assert np.isnan([row["mean"], row["difference"], row["p"], row["p_holm"]]).all()
    assert rank(table, resamples=50)["rank"].isna().all()

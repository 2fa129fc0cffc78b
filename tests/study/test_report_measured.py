"""Losses without maps, correlated maps and gaps are compared with the baseline's, where honest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from medseg_reg.study.report.figures import MEASURES, forest
from medseg_reg.study.report.measured import compare_measures, correlations, gaps, losses
from medseg_reg.study.report.source import Source
from tests.study.made_study import METHODS, make_study, write_study

LOSS, CORRELATION, GAP = "coadaptation_loss", "channel_correlation", "train_val_gap"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_study(tmp_path, seeds=3, trained=False, datasets=("phantom",))


def rows_of(source: Source, metric: str) -> pd.DataFrame:
    found = compare_measures(source, resamples=2000)
    return found[found["metric"] == metric].set_index("method")


def test_the_planted_differences_are_found_with_intervals(path):
    source = Source.read(path)
    for metric, planted in ((LOSS, -0.075), (CORRELATION, -0.2), (GAP, -0.06)):
        rows = rows_of(source, metric)
        assert rows.index.tolist() == list(METHODS)
        others = rows.drop(index="none")
        assert others["difference"].to_numpy() == pytest.approx(planted, abs=0.015)
        assert (others["difference_low"] < others["difference"]).all()
        assert (others["difference"] < others["difference_high"]).all()
        assert (others["difference_high"] < 0).all()
    assert rows_of(source, CORRELATION)["groups"].unique().tolist() == [12]


def test_a_loss_is_that_of_a_patient_from_no_map_to_most_over_the_draws(path):
    table = pd.read_csv(path / "coadaptation.csv")
    rows = rows_of(Source.read(path), LOSS)
    for method, ours in table.groupby("method"):
        means = ours.groupby(["seed", "group", "rate"])["dice"].mean()
        lost = [means[s, g, 0.0] - means[s, g, 0.5] for s, g, r in means.index if r == 0.0]
        assert rows.loc[method, "mean"] == pytest.approx(np.mean(lost))
        assert (rows.loc[method, "groups"], rows.loc[method, "seeds"]) == (12, 3)


def test_without_a_run_of_all_maps_no_loss_is_told(path):
    table = pd.read_csv(path / "coadaptation.csv")
    table[table["rate"] > 0].to_csv(path / "coadaptation.csv", index=False)
    source = Source.read(path)
    measured = compare_measures(source, resamples=100)
    assert LOSS not in set(measured["metric"])
    assert losses(source, measured, "95 %") is None


def test_gaps_are_compared_over_trainings_alone_as_by_a_t_test(path):
    table = pd.read_csv(path / f"{GAP}.csv")
    table["gap"] += np.random.default_rng(0).normal(0, 0.01, len(table))
    table.to_csv(path / f"{GAP}.csv", index=False)
    row = rows_of(Source.read(path), GAP).loc["dropout"]
    wide = table.pivot(index="seed", columns="method", values="gap")
    paired = wide["dropout"] - wide["none"]
    assert (row["groups"], row["seeds"]) == (3, 1)
    assert row["difference"] == pytest.approx(paired.mean())
    half = stats.t.ppf(0.975, 2) * paired.std() / np.sqrt(3)
    # Percentiles of three values, stretched to the width of t's.
    width = row["difference_high"] - row["difference_low"]
    assert width == pytest.approx(2 * half, rel=0.25)


@pytest.mark.parametrize(("parts", "trainings"), [({"folds": 2}, 3), ({"splits": [0, 1]}, 6)])
def test_folds_of_a_seed_are_one_training_and_other_splits_are_others(path, parts, trainings):
    table = pd.read_csv(path / f"{GAP}.csv")
    table["gap"] = 0.1 * table["seed"]
    more = table.assign(split="another", gap=table["gap"] + 0.2)
    pd.concat([table, more]).to_csv(path / f"{GAP}.csv", index=False)
    write_study(path, **parts)
    row = rows_of(Source.read(path), GAP).loc["none"]
    assert row["groups"] == trainings
    assert row["mean"] == pytest.approx(0.1 + 0.1)


@pytest.mark.parametrize(("seeds", "known"), [(1, False), (2, True)])
def test_fewer_than_three_trainings_have_no_interval(path, seeds, known):
    table = pd.read_csv(path / f"{GAP}.csv")
    table[table["seed"] < seeds].to_csv(path / f"{GAP}.csv", index=False)
    source = Source.read(path)
    rows = rows_of(source, GAP)
    assert rows["mean"].notna().all()
    assert rows["difference"].drop(index="none").notna().all() == known
    assert rows[["low", "difference_low"]].isna().all(axis=None)
    shown = gaps(source, compare_measures(source, resamples=100), "95 %")
    assert len(shown.rows) == len(METHODS)


def test_a_method_that_lacks_a_seed_is_compared_on_the_others(path):
    table = pd.read_csv(path / f"{CORRELATION}.csv")
    gone = (table["method"] == "dropout") & (table["seed"] == 2)
    table[~gone].to_csv(path / f"{CORRELATION}.csv", index=False)
    assert rows_of(Source.read(path), CORRELATION)["seeds"].unique().tolist() == [2]


def test_tables_and_captions_say_what_they_show(path):
    source = Source.read(path)
    measured = compare_measures(source, resamples=200)
    maps, gap = correlations(source, measured, "95 %"), gaps(source, measured, "95 %")
    lost = losses(source, measured, "95 %")
    assert "50% of them" in lost.note
    assert "says nothing of the DICE with all maps" in lost.note
    assert "of the test part" in maps.note
    assert "the more the maps show the same" in maps.note
    assert "the higher, the more it over-fits" in gap.note
    assert gap.frame["train_dice"].to_numpy() == pytest.approx(0.85)
    assert "p_holm" not in gap.frame
    no_gain = "no gain in DICE by itself"
    for metric, words in ((LOSS, no_gain), (CORRELATION, no_gain), (GAP, "over-fits more")):
        rows = measured[measured["metric"] == metric]
        figure = forest(source, ("phantom", "unet"), rows, MEASURES[metric])
        assert words in figure.caption
        assert figure.alt.count("dropout") == 1
        assert set(figure.frame["method"]) == set(METHODS) - {"none"}


def test_without_the_tables_nothing_is_said(path):
    for name in ("coadaptation", CORRELATION, GAP):
        (path / f"{name}.csv").unlink()
    source = Source.read(path)
    measured = compare_measures(source)
    assert measured.empty
    assert all(one(source, measured, "95 %") is None for one in (losses, correlations, gaps))

"""The tables of a report hold what the statistics say, with every digit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from medseg_reg.study.report.comparing import compare_all
from medseg_reg.study.report.source import Source
from medseg_reg.study.report.tables import signed
from medseg_reg.study.statistics import compare, seeds_needed
from tests.study.made_study import METHODS, make_study


def page(path: Path) -> str:
    """Return the page of a study with its white space as single spaces."""
    return " ".join((path / "report.html").read_text("utf-8").split())


def test_the_table_of_methods_has_every_mean(made_study: Path) -> None:
    table = pd.read_csv(made_study / "tables" / "methods_by_networks.csv", keep_default_na=False)
    columns = ["dataset", "network", "method", "mean", "low", "high", "supported"]
    assert list(table) == columns
    results = pd.read_csv(made_study / "results.csv", keep_default_na=False)
    dice = results[results["metric"] == "dice"]
    means = dice.groupby(["dataset", "network", "method"])["value"].mean()
    found = table.set_index(columns[:3])
    assert len(found) == 2 * len(METHODS)
    np.testing.assert_allclose(found["mean"], means.reindex(found.index), rtol=1e-12)
    assert ((found["low"] < found["mean"]) & (found["mean"] < found["high"])).all()
    supported = set(table.loc[table["supported"], "method"])
    assert {"corrdrop", "heuristic_k2"} <= supported
    assert "none" not in supported
    best = table.loc[table["mean"].groupby(table["dataset"]).idxmax()]
    assert set(best["method"]) == {"heuristic_k2"}


def test_the_table_of_methods_is_shown_in_short_with_a_star(made_study: Path) -> None:
    row = pd.read_csv(made_study / "tables" / "methods_by_networks.csv").set_index(
        ["dataset", "method"]
    )
    mean, low, high = row.loc[("phantom", "heuristic_k2"), ["mean", "low", "high"]]
    text = f"{mean:.3f} ({low:.3f} to {high:.3f}) *"
    assert text in page(made_study)
    assert text in (made_study / "tables" / "methods_by_networks.tex").read_text("utf-8")


def test_iou_has_intervals_and_tests_of_its_own(made_study: Path) -> None:
    every = pd.read_csv(made_study / "tables" / "comparisons.csv", keep_default_na=False)
    found = every[(every["metric"] == "iou") & (every["dataset"] == "phantom")].set_index("method")
    results = Source.read(made_study).results
    results = results[(results["dataset"] == "phantom") & (results["metric"] == "iou")]
    wanted = compare(results, "none", "iou", resamples=10_000).set_index("method")
    numbers = ["mean", "low", "high", "difference", "simultaneous_low", "p_holm", "improvement"]
    others = [name for name in METHODS if name != "none"]
    pd.testing.assert_frame_equal(
        found.loc[others, numbers].astype(float), wanted.loc[others, numbers], check_names=False
    )
    assert found.loc["heuristic_k2", "p_holm"] != ""
    # What is said of DICE counts the comparisons of DICE alone.
    assert f"Of {2 * len(others)} comparisons with the baseline" in page(made_study)


def test_the_interval_that_decides_is_shown_beside_each_comparison(made_study: Path) -> None:
    every = pd.read_csv(made_study / "tables" / "comparisons.csv")
    row = every[(every["metric"] == "dice") & (every["method"] == "corrdrop")].iloc[0]
    low, high = signed(row["simultaneous_low"]), signed(row["simultaneous_high"])
    assert row["simultaneous_low"] < row["difference_low"]
    shown = page(made_study)
    assert f">{low} to {high}</td>" in shown
    assert f"for all together {low} to {high}" in shown  # in the words of the forest plot
    assert "where the thin line covers 0, no difference is supported" in shown


def test_the_scores_have_their_units_and_rules_beside_them(made_study: Path) -> None:
    assert (
        "phantom, gone: distances in px, surface DICE within 2.0 px, evaluation.missing is "
        "diagonal, evaluation.empty is one."
    ) in page(made_study)


def test_seeds_are_needed_for_the_level_that_a_finding_must_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_study: Path
) -> None:
    path = make_study(tmp_path / "small", seeds=2, trained=False)
    table = pd.read_csv(path / "results.csv")
    table = table[(table["method"] != "dropout") | (table["dataset"] == "phantom")]
    table.to_csv(path / "results.csv", index=False)
    asked = {}

    def note_alpha(results: pd.DataFrame, *_: object, alpha: float = 0.05) -> pd.DataFrame:
        asked[results["dataset"].iloc[0]] = alpha
        return results[["dataset", "network", "method"]].assign(seeds_needed=2).head(1)

    monkeypatch.setattr("medseg_reg.study.report.comparing.seeds_needed", note_alpha)
    compare_all(Source.read(path), resamples=20)
    others = len(METHODS) - 1
    assert asked == pytest.approx({"phantom": 0.05 / others, "gone": 0.05 / (others - 1)})
    assert "at a level of 0.05 divided by the number of methods" in page(made_study)
    one = Source.read(made_study).results
    one = one[(one["dataset"] == "phantom") & one["method"].isin(["none", "dropout"])]
    shown = pd.read_csv(made_study / "tables" / "ranks.csv").set_index(["dataset", "method"])
    (wanted,) = seeds_needed(one, "none", 0.01, alpha=0.05 / others)["seeds_needed"]
    assert shown.loc[("phantom", "dropout"), "seeds_needed"] == wanted

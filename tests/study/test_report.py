"""The report of a study: what it says, what it writes, and that names in files stay text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from medseg_reg.errors import MedsegError
from medseg_reg.study.report import write_report
from medseg_reg.study.report.comparing import compare_all
from medseg_reg.study.report.panels import choose_cases, compare_labels
from medseg_reg.study.report.provenance import runs
from medseg_reg.study.report.source import Source
from medseg_reg.study.report.sweeps import find_sweeps
from medseg_reg.study.report.tables import measures
from medseg_reg.study.report.words import summarize
from medseg_reg.study.results import COADAPTATION_COLUMNS
from medseg_reg.study.statistics import is_supported
from tests.study.made_study import DATASETS, GROUPS, METHODS, make_study, write_run, write_study

EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """The tags of a page, its text, and whether tags are closed in order."""

    VOID = frozenset({"meta", "link", "img", "br", "input"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text.replace("<wbr>", ""))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def page(made_study: Path) -> Page:
    return Page((made_study / "report.html").read_text("utf-8"))


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., Path]:
    """Give a small study to change, without its report, on one data set unless more are named."""

    def make(*datasets: str) -> Path:
        names = datasets or DATASETS[:1]
        return make_study(tmp_path / "small", seeds=2, trained=False, datasets=names)

    return make


def summary(path: Path) -> str:
    """Return the summary of a study, without the costly figures."""
    source = Source.read(path)
    found = summarize(source, compare_all(source, resamples=200))
    return " ".join([found.lead, found.headline, *found.supported, *found.open, *found.cautions])


def report(path: Path) -> Page:
    return Page(write_report(path).read_text("utf-8"))


def test_the_page_needs_no_network(page: Page) -> None:
    sources = [one.get("src") for one in page.of("img")] + [
        one.get("href") for one in page.of("link")
    ]
    assert sources
    assert all(source and source.startswith("data:") for source in sources)
    assert not any("src" in one for one in page.of("script"))
    assert all((one["href"] or "").startswith("#") for one in page.of("a"))


def test_the_page_forbids_every_connection_and_foreign_script(made_study: Path) -> None:
    text = (made_study / "report.html").read_text("utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy
    assert "default-src 'none'" in policy[1]
    assert re.search(r"script-src 'sha256-[A-Za-z0-9+/=]{44}'", policy[1])


def test_all_tags_are_closed_and_identifiers_are_unique(page: Page) -> None:
    assert page.open == []
    names = [one["id"] for _, one in page.tags if "id" in one]
    assert len(names) == len(set(names))


def test_the_summary_names_the_planted_effects(page: Page) -> None:
    supported = page.text.split("What the data support")[1].split("What the data do not show")[0]
    for dataset in ("phantom", "gone"):
        assert re.search(rf"{dataset}[^.]*heuristic_k2", supported)
        assert re.search(rf"{dataset}[^.]*corrdrop", supported)
    assert "96 finished runs" in page.text
    assert "12 on phantom" in page.text


def test_the_notes_of_the_runs_are_repeated(page: Page) -> None:
    assert "phantom: phantom is made up" in page.text


def test_every_table_is_there_as_csv_and_as_latex(made_study: Path) -> None:
    folder = made_study / "tables"
    names = {path.stem for path in folder.iterdir()}
    assert {"methods_by_networks", "comparisons", "scores", "ranks", "runs", "splits"} <= names
    assert {"coadaptation_loss", "channel_correlation", "train_val_gap"} <= names
    for name in names:
        text = (folder / f"{name}.tex").read_text("utf-8")
        assert r"\toprule" in text
        assert len(pd.read_csv(folder / f"{name}.csv")) > 0
        rows = text.split(r"\midrule")[1].split(r"\bottomrule")[0]
        assert not re.search(r"(?<!\\)_", rows), "an underscore alone is an error in LaTeX"
        outside = re.sub(r"(?<!\\)\$.*?\$", "", text)
        assert not re.search("[<>|−–]", outside), "other signs in LaTeX's usual fonts"  # noqa: RUF001


def test_every_figure_is_there_as_svg_png_and_csv(made_study: Path, page: Page) -> None:
    every = list((made_study / "figures").iterdir())
    files = [path for path in every if not path.name.startswith("panel-")]
    tests = ("coadaptation", "coadaptation_loss", "correlation", "gap")
    for kind in ("differences", "patients", "seeds", "sweep", "curves", *tests):
        for dataset in ("phantom", "gone"):
            found = {p.suffix for p in files if p.name.startswith(f"{kind}-{dataset}-unet")}
            assert found == {".svg", ".png", ".csv"}
    assert all(path.stat().st_size > 200 for path in files)
    drawn = [one for one in page.of("svg") if one.get("role") == "img"]
    assert len(drawn) == len(files) / 3
    assert all(len(one["aria-label"] or "") > 40 for one in drawn)


def test_the_alternative_of_a_figure_says_its_numbers(page: Page) -> None:
    labels = [one["aria-label"] or "" for one in page.of("svg")]
    found = [one for one in labels if one.startswith("Differences in DICE to none, phantom, unet")]
    assert len(found) == 1
    assert re.search(r"heuristic_k2 \+0\.0[34]\d \(\+0\.0", found[0])


def test_tables_have_captions_and_headers(page: Page) -> None:
    assert len(page.of("table")) == len(page.of("caption")) >= 8
    scopes = [one.get("scope") for one in page.of("th")]
    assert set(scopes) == {"col", "row"}


def test_pictures_show_the_cases_chosen_by_rule(page: Page, made_study: Path) -> None:
    source = Source.read(made_study)
    chosen = choose_cases(source.of(("phantom", "unet")), "none", 3)
    assert len(chosen) == 3
    for case in chosen:
        assert f"phantom, unet: {case}, slice" in page.text
    alts = [one["alt"] or "" for one in page.of("img")]
    assert len(alts) == 3 * (len(METHODS) + 2)
    assert sum("heuristic_k2 on" in one and "pixels" in one for one in alts) == 3


def test_runs_whose_data_are_gone_are_told_and_not_shown(page: Page) -> None:
    assert page.text.count("No pictures of gone, unet") == 1


def test_the_case_on_which_methods_differ_most_comes_first() -> None:
    values = {"a": (0.5, 0.51), "b": (0.8, 0.4), "c": (0.9, 0.91), "d": (0.7, 0.7)}
    rows = [
        {"case": case, "method": method, "value": value}
        for case, pair in values.items()
        for method, value in zip(("none", "new"), pair, strict=True)
    ]
    chosen = choose_cases(pd.DataFrame(rows), "none", 4)
    assert list(chosen) == ["b", "a", "c"]
    assert chosen["a"] == "the worst case of none"


def test_each_kind_of_error_has_its_own_value() -> None:
    labels, truth = np.array([[0, 1, 0, 2, 2]]), np.array([[0, 1, 1, 0, 1]])
    assert compare_labels(labels, truth).tolist() == [[0, 1, 2, 3, 4]]


def test_methods_that_differ_in_one_number_are_found(made_study: Path) -> None:
    sweeps = find_sweeps(Source.read(made_study), ("phantom", "unet"))
    assert [one.values for one in sweeps] == [
        {"heuristic_k1": 1, "heuristic_k2": 2, "heuristic_k4": 4}
    ]
    assert sweeps[0].label == "k of heuristic_dropout"


def test_placement_splits_versions_and_commands_are_shown(page: Page, made_study: Path) -> None:
    for text in ("encoder.0.between_convs", "0.098", "split-phantom", "2.15.0", "baseline: none"):
        assert text in page.text
    again = made_study.with_name("made_again")
    whole = f"python -m medseg_reg.study --config {made_study / 'study.yaml'} run={again}"
    assert whole in page.text


def test_names_from_files_never_become_markup(small: Callable[..., Path]) -> None:
    path = small()
    evil = f'{EVIL}"><img src=x onerror=alert(1)>$x_1$'
    for name in ("results", *COADAPTATION_COLUMNS):
        table = pd.read_csv(path / f"{name}.csv")
        for column in {"dataset", "network", "method", "case", "class", "split"} & set(table):
            last = table[column] == table[column].iloc[-1]
            table.loc[last, column] = evil
        table.to_csv(path / f"{name}.csv", index=False)
    (path / "failures.csv").write_text(f"method,error\n{EVIL},{EVIL}\n", "utf-8")
    write_study(path, name=evil, methods={"none": [], evil: []}, seeds=2)
    summary = {"notes": [EVIL], "valid_for_reporting": True}
    for file in path.rglob("summary.json"):
        file.write_text(json.dumps(summary), "utf-8")
    text = write_report(path).read_text("utf-8")
    page = Page(text)
    assert len(page.of("script")) == 1
    assert EVIL not in text
    assert not any("onerror" in one for _, one in page.tags)
    assert text.count("&lt;script&gt;") > 10
    assert page.open == []


def test_failures_missing_runs_and_no_coadaptation(small: Callable[..., Path]) -> None:
    path = small(*DATASETS)
    write_study(path, seeds=3)
    for name in COADAPTATION_COLUMNS:
        (path / f"{name}.csv").unlink()
    lines = ["dataset,network,method,seed,exit_code,error", "gone,unet,dropout,2,70,out of memory"]
    (path / "failures.csv").write_text("\n".join(lines), "utf-8")
    first = report(path)
    assert "12 of 36 runs are missing" in first.text
    assert "1 run failed" in first.text
    failures = first.text.split("Failures")[-1]
    assert "out of memory" in failures
    assert "exit code" in failures
    assert "exit_code" not in failures
    assert (path / "tables" / "failures.tex").exists()
    assert "Co-adaptation" not in first.text
    assert not any(p.name.startswith("coadaptation") for p in (path / "figures").iterdir())
    # A second report is the same.
    folders = (path, path / "tables", path / "figures")
    before = {p: p.read_bytes() for folder in folders for p in folder.iterdir() if p.is_file()}
    write_report(path)
    assert all(p.read_bytes() == content for p, content in before.items())


def test_no_finished_run_still_gives_a_page_with_the_failures(tmp_path: Path) -> None:
    header = "dataset,network,method,seed,split,run,case,group,class,metric,value\n"
    (tmp_path / "results.csv").write_text(header, "utf-8")
    (tmp_path / "failures.csv").write_text("method,error\nnone,no space left\n", "utf-8")
    write_study(tmp_path)
    page = report(tmp_path)
    assert "No run of this study is finished" in page.text
    assert "96 of 96 runs are missing" in page.text
    assert "no space left" in page.text


def test_scores_that_are_none_are_told_in_the_summary(small: Callable[..., Path]) -> None:
    path = small()
    run = path / "runs" / "phantom" / "unet" / "dropout" / "seed0"
    (run / "summary.json").write_text(json.dumps({"valid_for_reporting": False}), "utf-8")
    assert "INVALID FOR REPORTING: dropout" in summary(path)


def test_too_few_patients_for_any_significance_are_told(small: Callable[..., Path]) -> None:
    path = small()
    table = pd.read_csv(path / "results.csv")
    kept = table["case"].isin([f"case_{i:02d}" for i in range(5)])
    table[kept].to_csv(path / "results.csv", index=False)
    text = summary(path)
    assert "phantom, unet: with 5 patients and 5 methods the smallest p" in text
    assert GROUPS > 5


def test_unequal_splits_are_told(small: Callable[..., Path]) -> None:
    path = small()
    table = pd.read_csv(path / "results.csv")
    table.loc[table["method"] == "corrdrop", "split"] = "another"
    table.to_csv(path / "results.csv", index=False)
    assert "methods were computed on different splits" in summary(path)


def test_a_seed_that_one_method_lacks_is_left_out_and_told(small: Callable[..., Path]) -> None:
    path = small(*DATASETS)
    table = pd.read_csv(path / "results.csv")
    gone = (table["method"] == "dropout") & (table["seed"] == 1) & (table["dataset"] == "gone")
    table[~gone].to_csv(path / "results.csv", index=False)
    text = summary(path)
    assert "gone, unet: left out, because not every method has these seeds: corrdrop: 1;" in text
    assert "phantom, unet: left out" not in text


def test_one_seed_supports_nothing_nor_do_copies_of_one() -> None:
    row = {"p_holm": 0.001, "simultaneous_low": 0.1, "simultaneous_high": 0.2, "distinct_seeds": 5}
    assert is_supported(row)
    assert not is_supported({**row, "distinct_seeds": 1})
    assert not is_supported({**row, "simultaneous_low": -0.1})
    assert not is_supported({**row, "p_holm": 0.2})


def test_patients_without_a_difference_do_not_count_for_the_least_p(
    small: Callable[..., Path],
) -> None:
    path = small()
    table = pd.read_csv(path / "results.csv")
    equal = ~table["case"].isin([f"case_{i:02d}" for i in range(4)])
    table.loc[equal & (table["metric"] == "dice"), "value"] = 0.5
    table.to_csv(path / "results.csv", index=False)
    text = summary(path)
    assert (
        "phantom, unet: with 12 patients, of whom at most 4 differ from the baseline, and 5 "
        "methods the smallest p"
    ) in text


def test_a_method_without_any_dice_is_told(small: Callable[..., Path]) -> None:
    path = small()
    table = pd.read_csv(path / "results.csv")
    lost = table["method"] == "dropout"
    table.loc[lost, "value"] = float("nan")
    table.to_csv(path / "results.csv", index=False)
    assert "phantom, unet: dropout: no DICE is known" in summary(path)


def test_names_that_pandas_takes_for_missing_stay_names(small: Callable[..., Path]) -> None:
    path = small()
    table = pd.read_csv(path / "results.csv")
    table.loc[table["method"] == "corrdrop", "method"] = "None"
    table.to_csv(path / "results.csv", index=False)
    write_run(path / "runs" / "x", "phantom", [], 0)
    assert "None" in Source.read(path).methods


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MedsegError, match=r"is not a study directory \(no results.csv\)"):
        write_report(tmp_path)


def test_a_missing_column_is_named(small: Callable[..., Path]) -> None:
    path = small()
    pd.read_csv(path / "results.csv").drop(columns="group").to_csv(
        path / "results.csv", index=False
    )
    with pytest.raises(MedsegError, match="has no column group"):
        write_report(path)


def test_a_baseline_without_runs_is_named(small: Callable[..., Path]) -> None:
    path = small()
    write_study(path, baseline="plain")
    with pytest.raises(MedsegError, match="no run of the baseline 'plain', only of none, dropout"):
        write_report(path)


def test_no_half_written_page_is_left(
    small: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small()
    (path / "report.html").write_text("before", "utf-8")
    monkeypatch.setattr("medseg_reg.study.report.page.all_figures", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(path)
    assert (path / "report.html").read_text("utf-8") == "before"
    assert not (path / "tables").exists()


def test_one_method_has_one_dice_on_the_page_where_classes_lack_values(
    small: Callable[..., Path],
) -> None:
    path = small()
    table = pd.read_csv(path / "results.csv")
    second = table.assign(**{"class": "second", "value": table["value"] / 2})
    second.loc[second["case"].isin(["case_01", "case_05"]), "value"] = float("nan")
    pd.concat([table, second]).to_csv(path / "results.csv", index=False)
    source = Source.read(path)
    compared = compare_all(source, resamples=200).dice.set_index(["dataset", "network", "method"])
    shown = measures(source).frame.set_index(["dataset", "network", "method"])["dice"]
    pd.testing.assert_series_equal(shown, compared["mean"], check_names=False)
    listed = runs(source).frame.groupby(["dataset", "network", "method"])["dice"].mean()
    np.testing.assert_allclose(listed.reindex(shown.index), shown)

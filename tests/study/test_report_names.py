"""Names of figures, in files and in the page, are those of one data set and network alone."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pandas as pd
from matplotlib import pyplot

from medseg_reg.study.report.drawing import Figure, finish, slug, write_figures
from medseg_reg.study.report.page import breakable

# What is the same where every other sign becomes one hyphen.
ALIKE = ("a.b", "a-b", "a b", "a--b", "a.b.", "-a-b", "a", "b", "a_b", "ä", "ö", "", "-")


def drawn(*parts: str) -> Figure:
    figure, axes = pyplot.subplots(figsize=(1, 1))
    axes.plot([0, 1], [0, 1])
    axes.fill_between([0, 1], [0, 1], alpha=0.5)
    frame = pd.DataFrame({"of": ["/".join(parts)]})
    return finish(slug("curves", *parts), figure, "", "", frame)


def test_other_names_have_other_files_and_the_same_names_the_same():
    parts = list(product(ALIKE, ALIKE))
    names = [slug("curves", *pair) for pair in parts]
    assert len(set(names)) == len(parts)
    assert names == [slug("curves", *pair) for pair in parts]
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", name) for name in names)


def test_plain_names_are_read_in_the_name_of_the_file():
    assert slug("curves", "Pancreas_CT", "unet3plus") == "curves-Pancreas_CT-unet3plus"


def test_alike_names_overwrite_no_file_and_share_no_identifier(tmp_path: Path):
    figures = [drawn("a.b", "unet"), drawn("a-b", "unet"), drawn("a", "b-unet")]
    write_figures(figures, tmp_path)
    kept = {pd.read_csv(path)["of"].item() for path in tmp_path.glob("*.csv")}
    assert kept == {"a.b/unet", "a-b/unet", "a/b-unet"}
    identifiers = [re.findall(r'\bid="([^"]+)"', figure.inline) for figure in figures]
    assert all(identifiers)
    assert len(set().union(*identifiers)) == sum(map(len, identifiers))


def test_a_long_name_breaks_behind_its_signs_and_never_becomes_markup(made_study: Path):
    assert breakable("a_b-c.d/e") == "a_<wbr>b-<wbr>c.<wbr>d/<wbr>e"
    assert breakable("<b>&") == "&lt;b&gt;&amp;"
    assert "<b>heuristic_<wbr>k2</b>" in (made_study / "report.html").read_text("utf-8")

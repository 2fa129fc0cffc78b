"""The pages of the methods say what the classes say, and their pictures can be drawn."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medseg_reg.regularizers import base, build, catalogue, regularizer_class, regularizer_names

DOCS = Path(__file__).parents[1] / "docs"
NAMES = [one.name for one in catalogue.entries() if not one.plugin]


def module(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DOCS)
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def make_methods() -> ModuleType:
    return module("make_methods")


@pytest.fixture(scope="module")
def pages(make_methods: ModuleType) -> dict[str, str]:
    made: dict[str, str] = make_methods.pages()
    return made


@pytest.fixture(scope="module")
def markdown() -> ModuleType:
    return module("docstring_markdown")


def test_the_pages_are_up_to_date(make_methods: ModuleType) -> None:
    make_methods.main(["--check"])


def test_the_check_names_what_differs(
    make_methods: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_methods, "FOLDER", tmp_path / "methods")
    make_methods.main(["--no-pictures"])
    for name in NAMES:
        (tmp_path / "methods" / f"{name}.png").touch()
    make_methods.main(["--check"])
    (tmp_path / "methods" / "dropout.md").write_text("old")
    (tmp_path / "methods" / "gone.md").write_text("of a method that is no more")
    (tmp_path / "methods" / "spatial_dropout.png").unlink()
    with pytest.raises(SystemExit, match=r"missing: dropout.md, gone.md, spatial_dropout.png; run"):
        make_methods.main(["--check"])
    make_methods.main(["--no-pictures"])
    assert not (tmp_path / "methods" / "gone.md").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_page_tells_arguments_facts_and_everything_in_the_docstring(
    name: str, pages: dict[str, str]
) -> None:
    page = pages[f"{name}.md"]
    cls = regularizer_class(name)
    facts = dict(re.findall(r"^\| ([\w ]+) \| (.*) \|$", page, re.MULTILINE))
    assert facts["in a configuration"] == f"`{name}`"
    assert (facts["drops"], facts["paper"]) == (cls.unit, cls.paper)
    assert facts["needs"] == (cls.needs or "nothing beside its input")
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", page.partition("## Shapes")[0], re.MULTILINE)
    layer = build(name)
    assert rows == [(key, repr(getattr(layer, key))) for key in inspect.signature(cls).parameters]

    titles = {"Args", "Attributes", "Shapes", "Raises", "Paper", "Example"}
    told, shown = (Counter(re.findall(r"\w+", text)) for text in (inspect.getdoc(cls), page))
    assert {word for word in told if told[word] > shown[word]} <= titles


def test_every_picture_is_there_and_small() -> None:
    for name in [*NAMES, "corrdrop_selectivity"]:
        path = DOCS / "methods" / f"{name}.png"
        assert path.stat().st_size < 60_000, f"{path} is large"
        with Image.open(path) as image:
            assert image.width <= 1100
            image.verify()


def test_the_index_links_every_method_and_its_default_rate(pages: dict[str, str]) -> None:
    index = pages["index.md"]
    rows = re.findall(r"^\| \[(\w+)\]\(\1\.md\) \| .* \| (yes|no) \| ([\d.]+) \| ", index, re.M)
    assert [row[0] for row in rows] == NAMES
    for name, random, p in rows:
        assert float(p) == build(name).p
        assert (random == "yes") == regularizer_class(name).stochastic


def test_the_table_of_systems_holds_everything_and_links_what_it_was_compared_with(
    pages: dict[str, str],
) -> None:
    page = pages["../systems.md"]
    assert re.findall(r"^\| \[(\w+)\]\(methods/\1\.md\) \| ", page, re.M) == NAMES
    rows = [line for line in page.splitlines() if line.startswith("| ") and "| system" not in line]
    assert len(rows) > len(NAMES) + 10
    assert all("](../tests/" in row for row in rows)
    for name in NAMES:
        row = next(row for row in rows if f"(methods/{name}.md)" in row)
        assert regularizer_class(name).paper in row
        assert all(f"`{place}`" in row for place in regularizer_class(name).default_places)


def test_the_check_misses_a_method_a_network_a_loss_and_a_test(
    make_methods: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, systems = catalogue.entries(), module("systems")
    page = module("systems_page")
    twin = catalogue.Entry(**{**vars(found[0]), "name": "dropout_of_next_year"})
    with pytest.raises(SystemExit, match="each method: dropout_of_next_year"):
        page.check_systems([*found, twin])
    with pytest.raises(SystemExit, match="each method: tree_dropout"):
        page.check_systems([one for one in found if one.name != "tree_dropout"])
    for table, key, kind in (("NETWORKS", "unet", "network"), ("LOSSES", "iou", "loss")):
        less = {k: v for k, v in getattr(systems, table).items() if k != key}
        with monkeypatch.context() as patch:
            patch.setattr(page, table, less)
            with pytest.raises(SystemExit, match=f"each {kind}: {key}"):
                page.check_systems(found)
    with monkeypatch.context() as patch:
        patch.setattr(page, "TRAINING", {"regularization.mix_tokens": ()})
        with pytest.raises(SystemExit, match="no key regularization.mix_tokens"):
            page.check_systems(found)
    gone = systems.System("classification", {"formula": "test_docs.py::test_of_yesterday"})
    monkeypatch.setattr(page, "METHODS", {**page.METHODS, "dropout": gone})
    with pytest.raises(SystemExit, match="no test tests/test_docs.py::test_of_yesterday"):
        page.check_systems(found)


def test_a_new_method_gets_a_page_and_one_of_a_plugin_does_not(
    make_methods: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = catalogue.entries()
    monkeypatch.setattr(make_methods, "entries", lambda: real)
    before = make_methods.pages().keys()
    foreign = catalogue.Entry(**{**vars(real[0]), "name": "foreign", "plugin": "elsewhere 1.0"})
    monkeypatch.setattr(make_methods, "entries", lambda: (*real, foreign))
    assert make_methods.pages().keys() == before
    monkeypatch.setattr(base, "_REGISTRY", {**base._REGISTRY, "twin": regularizer_class("dropout")})
    twin = catalogue.entry("twin")
    monkeypatch.setattr(make_methods, "entries", lambda: (*real, twin))
    assert make_methods.pages().keys() == before | {"twin.md"}


def test_the_examples_of_the_converter_hold(markdown: ModuleType) -> None:
    assert doctest.testmod(markdown).attempted > 0
    assert doctest.testmod(markdown).failed == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see `Dropout` and ``p=0``", "see [`Dropout`](dropout.md) and `p=0`"),
        ("y = x * m / (1 - p), with m", "`y = x * m / (1 - p)`, with m"),
        ("y[:, :c] = x[:, :c] * n/c and", "`y[:, :c] = x[:, :c] * n/c` and"),
        ("F_i = (1/N) sum_j |a_i . a_j|, with", "`F_i = (1/N) sum_j |a_i . a_j|`, with"),
        ("A = mean of x over channels. For", "`A = mean of x over channels`. For"),
        ("n is p*C of 2*C", "n is `p*C` of `2*C`"),
        ("(B, C, *spatial) with", "`(B, C, *spatial)` with"),
        ("**not** the a * b of _x", "**not** the a \\* b of \\_x"),
        ("it is round(p*C) here", "it is `round(p*C)` here"),
    ],
)
def test_running_text_becomes_markdown(text: str, expected: str, markdown: ModuleType) -> None:
    assert markdown.inline(text, {"Dropout": "dropout.md"}) == expected


def test_lists_tables_and_blocks_stay_what_they_are(markdown: ModuleType) -> None:
    assert markdown.markdown("* one\n  more\n* two") == "* one more\n* two"
    assert markdown.markdown("    y = x\n      * 2") == "```text\ny = x\n  * 2\n```"
    assert markdown.markdown("=== ===\na   b\n=== ===").startswith("```text\n=== ===\n")
    wrapped = markdown.markdown("word " * 19 + "xx - - + 1. end " * 9)
    assert not re.search(r"^([-+*#>]|\d+\.)", wrapped, re.MULTILINE)


def random_scene(pictures: ModuleType) -> Any:
    torch.manual_seed(0)
    maps, labels = torch.rand(8, 16, 24, 24), torch.randint(2, (8, 48, 48))
    return pictures.Scene(torch.rand(8, 1, 48, 48), labels, maps, (maps, labels))


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_shows_what_was_dropped(name: str) -> None:
    pictures = module("method_pictures")
    image = np.asarray(pictures.draw(catalogue.entry(name), random_scene(pictures))).astype(int)
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    dropped = (red - green > 60) & (red - blue > 60)
    replaced = (blue - red > 60) & (blue - green > 30)
    legend = 13 * 13
    assert (dropped | replaced).sum() > 4 * legend
    middle = image.shape[1] // 2 - 8
    assert not (dropped | replaced)[:-30, :middle].any()  # nothing is marked before


def test_dropped_and_replaced_units_are_told_apart() -> None:
    choose_draw = module("method_pictures").choose_draw
    torch.manual_seed(0)
    x = (torch.randn(1, 16, 12, 12)).relu()
    x[:, 3, :6] = 0.0
    y, dropped, altered, rate = choose_draw(build("spatial_dropout", p=0.25), x)
    whole = (y == 0).all(3).all(2)
    assert torch.equal(dropped, whole[..., None, None].expand_as(x))  # not the zeros that stay
    assert rate == pytest.approx(0.25, abs=0.1)
    assert not altered.any()
    _, dropped, altered, rate = choose_draw(build("heuristic_dropout", p=0.25), x)
    assert not dropped.any()
    assert altered.float().mean().item() == rate == 0.25


def test_pictures_name_methods_that_exist() -> None:
    assert module("method_pictures").PARAMETERS.keys() <= set(regularizer_names())


def test_the_figure_shows_that_default_corrdrop_selects_and_the_published_hardly() -> None:
    pictures = module("method_pictures")
    torch.manual_seed(0)
    x = torch.randn(1, 16, 24, 24)
    x[..., :12] = torch.randn(1, 16, 1, 1)
    ratios = []
    for faithful in (False, True):
        correlation, frequency = pictures.selectivity(x, 0.25, faithful=faithful, draws=2000)
        low = correlation < correlation.median()
        assert frequency.mean().item() == pytest.approx(0.25, abs=0.02)
        ratios.append((frequency[low].mean() / frequency[~low].mean()).item())
    assert ratios[0] > 3
    assert ratios[1] == pytest.approx(1, abs=0.15)

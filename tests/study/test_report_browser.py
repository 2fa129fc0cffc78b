"""The page of a report in a real browser: what a reader clicks, types and sees."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

pytestmark = pytest.mark.slow

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    # A browser of root has no sandbox; the page is our own.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=arguments)
        yield started
        started.close()


@pytest.fixture
def page(browser: Any, made_study: Path) -> Iterator[Any]:
    """Give the page on a wide, light screen; errors and requests fail the test."""
    yield from _opened(browser, made_study)


def _opened(browser: Any, study: Path, width: int = 1280, scheme: str = "light") -> Iterator[Any]:
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, accept_downloads=True
    )
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((study / "report.html").as_uri())
    yield page
    context.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("data:", "file:", "blob:"))] == []


def column(page: Any, name: str, index: int) -> list[str]:
    rows = page.locator(f"[data-name={name}] tbody tr:not([hidden])")
    return [rows.nth(i).locator("th, td").nth(index).inner_text() for i in range(rows.count())]


def comparisons(study: Path) -> pd.DataFrame:
    """Return the table that the page shows, as its file has it."""
    return pd.read_csv(study / "tables" / "comparisons.csv", keep_default_na=False)


def background(page: Any) -> str:
    return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))


def test_a_column_sorts_by_number_both_ways_and_says_so(page: Any, made_study: Path) -> None:
    known = int((comparisons(made_study)["difference"] != "").sum())
    head = page.locator("[data-name=comparisons] thead th", has_text="difference")
    index = head.evaluate("one => one.cellIndex")
    for direction, down in (("ascending", False), ("descending", True)):
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == direction
        texts = column(page, "comparisons", index)
        numbers = [float(t.split(" ")[0].replace("−", "-")) for t in texts if t != "–"]  # noqa: RUF001
        assert numbers == sorted(numbers, reverse=down)
        assert len(numbers) == known
        # Rows without a value are last in both directions.
        assert set(texts[known:]) == {"–"}  # noqa: RUF001
    assert page.locator("[data-name=comparisons] [aria-sort]").count() == 1


def test_a_filter_keeps_rows_with_all_words_and_counts_them(page: Any, made_study: Path) -> None:
    number = len(comparisons(made_study))
    box = page.locator("[data-name=comparisons]")
    box.get_by_role("searchbox").fill("gone heuristic DICE")
    assert column(page, "comparisons", 2) == ["heuristic_k1", "heuristic_k2", "heuristic_k4"]
    assert box.locator("output").inner_text() == f"3 of {number} rows"
    box.get_by_role("searchbox").fill("")
    assert box.locator("output").inner_text() == f"{number} rows"


def test_the_rows_that_are_seen_are_saved(page: Any) -> None:
    box = page.locator("[data-name=comparisons]")
    box.get_by_role("searchbox").fill("gone dropout DICE none")
    box.get_by_role("searchbox").fill("phantom corrdrop DICE")
    with page.expect_download() as found:
        box.get_by_role("button", name="Save rows as CSV").click()
    lines = Path(found.value.path()).read_text("utf-8").splitlines()
    assert lines[0].startswith("data set,network,method")
    assert [line.split(",")[2] for line in lines[1:]] == ["corrdrop"]


def test_a_figure_is_saved_as_a_drawing(page: Any) -> None:
    with page.expect_download() as found:
        page.locator(".drawing button").first.click()
    text = Path(found.value.path()).read_text("utf-8")
    assert text.startswith("<svg")
    assert "heuristic_k2" in text


def test_the_theme_follows_the_system_and_the_button(
    page: Any, browser: Any, made_study: Path
) -> None:
    light = background(page)
    page.get_by_role("button", name="Dark page").click()
    dark = background(page)
    assert dark != light
    ink = page.evaluate("getComputedStyle(document.querySelector('.drawing svg')).color")
    assert ink == page.evaluate("getComputedStyle(document.body).color")
    page.get_by_role("button", name="Light page").click()
    assert background(page) == light
    other = _opened(browser, made_study, scheme="dark")
    assert background(next(other)) == dark
    next(other, None)


def test_the_slider_moves_between_two_chosen_methods(page: Any) -> None:
    panel = page.locator(".panel").first
    panel.get_by_label("Left", exact=True).select_option("truth")
    panel.get_by_label("Right", exact=True).select_option("heuristic_k2")
    tags = panel.locator(".tag").all_inner_texts()
    assert tags == ["truth", "heuristic_k2"]
    shown = panel.locator(".side").nth(1).locator("img")
    chosen = panel.locator(".view[data-name=heuristic_k2] img")
    assert shown.get_attribute("src") == chosen.get_attribute("src")
    panel.get_by_label("Slider", exact=True).fill("20")
    clip = panel.locator(".side").nth(1).evaluate("one => getComputedStyle(one).clipPath")
    assert "20%" in clip
    box = panel.locator(".stage").bounding_box()
    page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 50, steps=4)
    page.mouse.up()
    assert abs(float(panel.get_by_label("Slider", exact=True).input_value()) - 75) <= 1


def test_a_picture_zooms_and_moves_but_not_out_of_sight(page: Any) -> None:
    stage = page.locator(".panel .stage").first
    layer = stage.locator(".layer").first
    width = layer.bounding_box()["width"]
    page.locator(".panel").first.get_by_label("Zoom", exact=True).fill("4")
    assert layer.bounding_box()["width"] == pytest.approx(4 * width, rel=0.01)
    for _ in range(60):
        stage.press("ArrowRight")
    outer, inner = stage.bounding_box(), layer.bounding_box()
    assert inner["x"] + inner["width"] == pytest.approx(outer["x"] + outer["width"], abs=2)


def test_everything_is_done_from_the_keyboard(page: Any) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    stage = page.locator(".panel .stage").first
    slider = page.locator(".panel").first.get_by_label("Slider", exact=True)
    stage.focus()
    page.keyboard.press("ArrowRight")
    assert slider.input_value() == "55"
    page.keyboard.press("+")
    assert page.locator(".panel").first.get_by_label("Zoom", exact=True).input_value() == "1.5"
    page.keyboard.press("0")
    assert slider.input_value() == "50"
    head = page.locator("[data-name=scores] thead button").first
    head.focus()
    page.keyboard.press("Enter")
    assert head.locator("..").get_attribute("aria-sort") == "ascending"
    # Whatever can be clicked can be reached, and has a name.
    unreachable = page.evaluate(
        "[...document.querySelectorAll('button,select,input,summary,.scroll,.stage')]"
        ".filter(one => one.tabIndex < 0).length"
    )
    assert unreachable == 0
    nameless = page.evaluate(
        "[...document.querySelectorAll('select,input')]"
        ".filter(one => !one.labels.length && !one.getAttribute('aria-label')).length"
    )
    assert nameless == 0


@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_the_page_never_scrolls_sideways(browser: Any, made_study: Path, width: int) -> None:
    opened = _opened(browser, made_study, width)
    page = next(opened)
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    sizes = page.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert sizes[0] <= sizes[1]
    cut = page.evaluate(
        "[...document.querySelectorAll('.table')].map(one => [!one.querySelector('.more').hidden,"
        " one.querySelector('.scroll').scrollWidth > one.querySelector('.scroll').clientWidth,"
        " one.querySelector('.scroll').scrollHeight > one.querySelector('.scroll').clientHeight,"
        " one.querySelectorAll('tbody tr').length])"
    )
    assert [told for told, *_ in cut] == [aside or below for _, aside, below, _ in cut]
    assert any(told for told, *_ in cut)
    assert not any(below for *_, below, rows in cut if rows <= 30)  # a short table is seen whole
    next(opened, None)


def test_on_paper_everything_is_unfolded_and_dark_on_light(page: Any) -> None:
    page.get_by_role("button", name="Dark page").click()
    page.set_viewport_size({"width": 718, "height": 1000})  # A4 between its margins
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.documentElement.scrollWidth") <= 718
    cut = "one => one.scrollHeight > one.clientHeight + 1"
    assert page.evaluate(f"[...document.querySelectorAll('.scroll')].filter({cut}).length") == 0
    assert background(page) == "rgb(255, 255, 255)"
    assert not page.locator(".stage").first.is_visible()
    assert page.locator("[data-name=runs] table").is_visible()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 0


def test_without_scripts_all_content_is_there(browser: Any, made_study: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((made_study / "report.html").as_uri())
    assert page.locator(".view img").first.is_visible()
    assert page.locator("[data-name=comparisons] tbody tr").count() == len(comparisons(made_study))
    context.close()

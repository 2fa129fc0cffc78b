"""The pictures of a report, as files for a paper."""

from __future__ import annotations

import numpy as np
from PIL import Image

from medseg_reg.study.report.drawing import slug
from medseg_reg.study.report.panel_files import write_panels
from medseg_reg.study.report.panels import CLASSES, COLOURS, Panel, View, _overlay, _uri


def panel(case: str) -> Panel:
    """Return a panel of a gray image, on which one method is right and one misses all."""
    image = _uri(Image.fromarray(np.full((8, 8), 90, np.uint8)))
    right, missed = np.full((8, 8), 1, np.uint8), np.full((8, 8), 2, np.uint8)
    views = [
        View(name, f"DICE {n}.000", "", _overlay(values, COLOURS))
        for n, (name, values) in enumerate({"missing": missed, "hitting": right}.items())
    ]
    return Panel(("CT & MR", "unet"), case, "", 0, image, views)


def test_each_case_is_a_row_of_methods_as_png_and_as_svg(tmp_path):
    files = write_panels([panel("a"), panel("b/c")], tmp_path)
    names = [slug("panel", "CT & MR", "unet", f"{n}", case) for n, case in enumerate(("a", "b/c"))]
    assert [path.name for path in files] == [f"{n}.{s}" for n in names for s in ("png", "svg")]
    assert files[2].name.startswith("panel-CT-MR-unet-1-b-c-")
    pixels = np.asarray(Image.open(files[0]).convert("RGB")).astype(int)
    middle = pixels[pixels.shape[0] // 2]
    left, right = middle[pixels.shape[1] // 4], middle[3 * pixels.shape[1] // 4]
    assert left.argmax() == 2  # missed is blue, correct is green
    assert right.argmax() == 1
    assert "hitting" in files[1].read_text("utf-8")


def test_many_methods_stand_in_rows_as_wide_as_a_page(tmp_path):
    many = panel("a")
    many.views = [View(f"method{n}", "", "", many.views[0].overlay) for n in range(6)]
    picture = Image.open(write_panels([many], tmp_path)[0])
    assert picture.width / picture.info["dpi"][0] <= 7.25  # inches
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    blue = pixels[..., 2] - pixels[..., 0] > 60
    cells = [half for row in np.array_split(blue, 2) for half in np.array_split(row, 4, axis=1)]
    assert [bool(cell.sum() > 5000) for cell in cells] == [True] * 6 + [False] * 2


def test_the_classes_of_the_truth_stand_in_the_legend(tmp_path):
    one = panel("a")
    one.classes = [("left ventricle", CLASSES[0]), ("myocardium", CLASSES[1])]
    text = write_panels([one], tmp_path)[1].read_text("utf-8")
    assert all(word in text for word in ("truth: left ventricle", "truth: myocardium", "spurious"))


def test_the_same_pictures_are_the_same_bytes(tmp_path):
    first, second = (
        [path.read_bytes() for path in write_panels([panel("a")], tmp_path / name)]
        for name in ("one", "two")
    )
    assert first == second

"""The pictures of a report as files, for a paper: the methods side by side for each case."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot, rc_context
from matplotlib.patches import Patch
from PIL import Image

from medseg_reg.files import write_bytes
from medseg_reg.study.report.drawing import RC, slug
from medseg_reg.study.report.panels import COLOURS, NAMES, Panel

# A full row is as wide as the two columns of a paper, in which the words stay readable.
COLUMNS, INCHES = 4, 1.8


def write_panels(panels: Sequence[Panel], folder: Path) -> list[Path]:
    """Write one PNG and one SVG for each case: truth and methods side by side, four in a row.

    Args:
        panels: as in the report.
        folder: where the other figures lie.

    Returns:
        The files.
    """
    files = []
    for number, panel in enumerate(panels):
        name = slug("panel", *panel.pair, f"{number}", panel.case)
        for suffix, content in draw(panel).items():
            files.append(folder / f"{name}.{suffix}")
            write_bytes(files[-1], content)
    return files


def draw(panel: Panel) -> dict[str, bytes]:
    """Return the pictures of a case as PNG and SVG, the same bytes each time."""
    image = opened(panel.image)
    names: dict[Any, Any] = {"font.size": 7, "svg.hashsalt": "panel", "figure.facecolor": "white"}
    found = {}
    with rc_context({**RC, **names}):
        shown = [(f"truth: {name}", colour) for name, colour in panel.classes]
        shown += zip(NAMES, COLOURS, strict=True)
        marks = [Patch(color=(r / 255, g / 255, b / 255), label=text) for text, (r, g, b) in shown]
        below = 0.2 * -(-len(marks) // COLUMNS)
        columns = min(COLUMNS, len(panel.views))
        rows = -(-len(panel.views) // columns)
        size = (INCHES * columns, (INCHES + 0.35) * rows + below + 0.1)
        figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, view in zip(axes.flat, panel.views, strict=False):
            seen = Image.alpha_composite(image, opened(view.overlay))
            axis.imshow(np.asarray(seen.convert("RGB")), interpolation="none")
            axis.set_title(f"{view.name}\n{view.text}", fontsize=7)
        figure.legend(handles=marks, loc="lower center", ncols=COLUMNS, fontsize=7)
        figure.tight_layout(rect=(0, below / size[1], 1, 1))
        for suffix, about in (("png", {"Software": None}), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix, dpi=200, metadata=about)
            found[suffix] = buffer.getvalue()
        pyplot.close(figure)
    return found


def opened(uri: str) -> Image.Image:
    """Return the picture of a data URI."""
    content = base64.b64decode(uri.split(",", 1)[1])
    return Image.open(io.BytesIO(content)).convert("RGBA")

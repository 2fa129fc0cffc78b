"""The page of a report, in one file that needs no network."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from medseg_reg.files import write_text
from medseg_reg.study.report import besides, measured, panels, provenance, tables, words
from medseg_reg.study.report.comparing import CONFIDENCE, DIFFERENCE, compare_all
from medseg_reg.study.report.drawing import write_figures
from medseg_reg.study.report.figures import all_figures
from medseg_reg.study.report.panel_files import write_panels
from medseg_reg.study.report.source import Source
from medseg_reg.study.report.sweeps import find_sweeps

FOLDER = Path(__file__).parent


def write_report(study_dir: Path, cases: int = 3) -> Path:
    """Write `report.html`, `tables/` and `figures/` into a study directory.

    The same directory gives the same page, byte for byte: there is no date in it.

    Args:
        study_dir: holds results.csv, study.yaml and the run directories.
        cases: how many test cases of each data set and network are shown as pictures.

    Returns:
        The path of the page.

    Raises:
        MedsegError: results.csv is missing or damaged, or has no run of the baseline.
    """
    source = Source.read(Path(study_dir))
    content = _content(source, cases)
    summary = words.summarize(source, content["compared"])
    failed = provenance.failures(source)
    listed = [*content["tables"].values(), *([failed] if failed else [])]
    write_tables = [table for table in listed if table is not None]
    tables.write_tables(write_tables, source.path / "tables")
    drawn = [one for group in content["figures"].values() for one in group]
    write_figures(drawn, source.path / "figures")
    write_panels(content["panels"], source.path / "figures")
    page = render(source=source, summary=summary, failures=failed, **content)
    path = source.path / "report.html"
    write_text(path, page)
    return path


def render(**content: Any) -> str:
    """Fill the template. Whatever comes from a file is escaped; scripts are pinned by their hash.

    The page's own policy allows no connection at all, and no script but its own.
    """
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = lambda figure: Markup(figure.inline)  # noqa: S704
    environment.filters["breakable"] = breakable
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return environment.get_template("template.html").render(
        style=Markup((FOLDER / "page.css").read_text(encoding="utf-8")),  # noqa: S704
        script=Markup(script),  # noqa: S704
        digest=digest,
        commands=provenance.commands(content["source"]),
        errors=list(zip(panels.NAMES, panels.COLOURS, strict=True)),
        **content,
    )


def breakable(name: str) -> Markup:
    """Return a name that a narrow column breaks behind its signs, not within a word.

    >>> print(breakable("heuristic_dropout"))
    heuristic_<wbr>dropout
    """
    return Markup(re.sub(r"([_./-])", r"\1<wbr>", str(escape(name))))  # noqa: S704


def _content(source: Source, cases: int) -> dict[str, Any]:
    found = compare_all(source)
    if source.results.empty:
        return {"compared": found, "figures": {}, "panels": [], "problems": [], "tables": {}}
    confidence = f"{CONFIDENCE:.0%}".replace("%", " %")
    sweeps = {pair: find_sweeps(source, pair) for pair in source.pairs}
    shown, problems = panels.make_panels(source, cases)
    tested = measured.compare_measures(source)
    return {
        "compared": found,
        "figures": all_figures(source, found.dice, sweeps, tested),
        "panels": shown,
        "problems": problems,
        "tables": {
            "overview": tables.methods_by_networks(source, found.dice, confidence),
            "besides": besides.besides(source),
            "comparisons": tables.comparisons(source, found.every, confidence),
            "ranks": tables.ranks(found.ranked, found.needed, DIFFERENCE),
            "measures": tables.measures(source),
            "classes": tables.classes(source),
            "loss": measured.losses(source, tested, confidence),
            "correlation": measured.correlations(source, tested, confidence),
            "gap": measured.gaps(source, tested, confidence),
            "placement": provenance.placements(source),
            "splits": provenance.splits(source),
            "versions": provenance.versions(source),
            "runs": provenance.runs(source),
        },
    }

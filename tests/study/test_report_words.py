"""What the summary of a report says of many comparisons."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from medseg_reg.study.report.comparing import compare_all
from medseg_reg.study.report.source import Source
from medseg_reg.study.report.words import summarize


def cautions(source: Source) -> str:
    return " ".join(summarize(source, compare_all(source, resamples=200)).cautions)


def test_corrections_are_told_to_hold_within_one_data_set_and_network(made_study: Path) -> None:
    both = Source.read(made_study)
    assert "Over the 2 here a difference is shown by chance more often" in cautions(both)
    one = replace(both, results=both.results[both.results["dataset"] == "phantom"])
    assert "Holm's correction and the intervals" not in cautions(one)

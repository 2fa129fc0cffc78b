"""The commands of a report name what they repeat, and put it beside what is there."""

from __future__ import annotations

import shlex
from pathlib import Path

import pandas as pd
import pytest

from medseg_reg.study.report.provenance import commands
from medseg_reg.study.report.source import Source
from medseg_reg.study.results import COLUMNS

RUN = "runs/blobs/unet/none/split4/seed0"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "my studies" / "one"
    path.mkdir(parents=True)
    row = ("blobs", "unet", "none", 0, "5f", RUN, "c", "c", "organ", "dice", 0.5)
    pd.DataFrame([row], columns=list(COLUMNS)).to_csv(path / "results.csv", index=False)
    return path


def test_a_shell_reads_each_as_it_is_meant(study):
    whole, report, train, evaluate = (shlex.split(line) for line in commands(Source.read(study)))
    file, again = str(study / "study.yaml"), f"{study}_again"
    assert whole[1:] == ["-m", "medseg_reg.study", "--config", file, f"run={again}"]
    assert report[1:] == ["-m", "medseg_reg.study", "--config", file, "--only", "report"]
    repeated = f"run={again}_blobs-unet-none-split4-seed0"
    config = str(study / RUN / "config.yaml")
    assert train[1:] == ["-m", "medseg_reg.train", "--config", config, repeated]
    assert evaluate[1:] == ["-m", "medseg_reg.evaluate", "--run", str(study / RUN)]


def test_a_study_in_the_present_folder_is_repeated_beside_it(study, monkeypatch):
    monkeypatch.chdir(study)
    whole, report, train, _ = (shlex.split(line) for line in commands(Source.read(Path())))
    assert whole[-2:] == ["study.yaml", f"run={study}_again"]
    assert report[-3:] == ["study.yaml", "--only", "report"]
    assert train[-2:] == [f"{RUN}/config.yaml", f"run={study}_again_blobs-unet-none-split4-seed0"]


def test_without_a_finished_run_the_study_alone_is_named(study):
    pd.DataFrame(columns=list(COLUMNS)).to_csv(study / "results.csv", index=False)
    assert len(commands(Source.read(study))) == 2

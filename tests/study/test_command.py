"""The command of a study, as a user starts, kills and repeats it."""

from __future__ import annotations

import html
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml

from medseg_reg.study.__main__ import main
from medseg_reg.study.worker import THREADS
from tests.stores import make_store
from tests.study.studies import tiny_study
from tests.training import command, same_weights

ROOT = Path(__file__).parents[2]


def write_study(folder: Path, name: str, store: Path, **changes: object) -> Path:
    content = tiny_study(store, folder / name, run=str(folder / name), workers=2, **changes)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def children(process: int) -> list[int]:
    listed = Path(f"/proc/{process}/task/{process}/children")
    return [int(word) for word in listed.read_text().split()] if listed.exists() else []


def test_a_dry_run_lists_the_runs_and_writes_nothing(tmp_path, capsys):
    path = write_study(tmp_path, "study", tmp_path / "no_store")
    main(["--config", str(path), "--dry-run", "seeds=3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["to", "do", "blobs/unet/none/seed0"]
    assert lines[-1] == "6 runs, 0 done, 2 at a time"
    assert not (tmp_path / "study").exists()


def test_a_report_needs_no_file_of_the_data_sets(tmp_path, monkeypatch):
    path, told = tmp_path / "study.yaml", []
    content = {"name": "moved", "datasets": {"a": "no.yaml"}, "methods": {"none": []}}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    monkeypatch.setattr("medseg_reg.study.__main__.report", told.append)
    main(["--config", str(path), "--only", "report"])
    assert [study.name for study in told] == ["moved"]


def commands_of(report: Path) -> dict[str, list[str]]:
    """Return the commands of a report, by the module that they run, as lists of words."""
    block = re.search(r'aria-label="Commands">(.*?)</pre>', report.read_text("utf-8"), re.DOTALL)
    assert block
    lines = [shlex.split(html.unescape(line)) for line in block[1].splitlines()]
    return {words[2]: words for words in reversed(lines)}


@pytest.mark.slow
def test_the_commands_of_a_report_repeat_its_scores(tmp_path, monkeypatch):
    store = make_store(tmp_path / "store", cases=6, slices=6, size=32).path
    asked = {"part": "val", "rates": [0.0, 0.5], "draws": 2}
    only = {"methods": {"none": []}, "seeds": [3], "coadaptation": asked}
    path = write_study(tmp_path, "a study", store, **only)  # a name that a shell would part
    main(["--config", str(path)])
    study = tmp_path / "a study"
    told = commands_of(study / "report.html")
    first = study / "runs" / "blobs" / "unet" / "none" / "seed3"
    train = told["medseg_reg.train"]
    again = Path(train[-1].removeprefix("run="))
    assert not again.exists()
    # As many as a run of the study has: sums in another order give other last digits.
    for name in THREADS:
        monkeypatch.setenv(name, "1")
    done = command(train[2], *train[3:])
    assert done.returncode == 0, done.stdout + done.stderr
    scores = Path("evaluation") / "per_case.csv"
    assert same_weights(first, again)
    assert (again / scores).read_bytes() == (first / scores).read_bytes()
    # What the study measured of the run is there too, of the cases that were asked for.
    fallen, maps, gap = (
        pd.read_csv(study / f"{name}.csv")
        for name in ("coadaptation", "channel_correlation", "train_val_gap")
    )
    validated = pd.read_csv(study / "coadaptation.csv", dtype=str)["group"]
    cases = json.loads((first / "splits.json").read_text())["val"]
    assert len(maps) == len(set(validated)) == len(cases)
    assert set(fallen["part"]) == set(maps["part"]) == {"val"}
    assert gap["val_dice"].item() == pytest.approx(
        fallen.loc[fallen["rate"] == 0, "dice"].mean(), abs=1e-5
    )
    assert gap["gap"].item() == pytest.approx(
        gap["train_dice"].item() - gap["val_dice"].item(), abs=1e-5
    )
    metrics = pd.read_csv(first / "metrics.csv")
    assert gap["val_loss"].item() == pytest.approx(metrics["val_loss"].iloc[-1], abs=1e-5)
    assert "Correlation of feature maps" in (study / "report.html").read_text("utf-8")


def start_and_end(config: Path, sign: str, end: Callable[[int], None]) -> int:
    """Start a study as a user does, end it once a run has such a file; return its exit code."""
    runs = config.with_suffix("") / "runs"
    with subprocess.Popen(
        [sys.executable, "-m", "medseg_reg.study", "--config", str(config)],
        cwd=ROOT,
        start_new_session=True,
    ) as process:
        while process.poll() is None and not any(runs.glob(f"*/*/*/*/{sign}")):
            time.sleep(0.01)
        assert process.returncode is None, "the study ended before it could be ended"
        end(process.pid)
        return process.wait()


# When a study is ended, how, and its exit code.
WAYS = {
    "group": ("checkpoints/*.ckpt", lambda study: os.killpg(study, signal.SIGKILL), -9),
    "worker": ("config.yaml", lambda study: os.kill(children(study)[0], signal.SIGKILL), 1),
    "term": ("placement.json", lambda study: os.kill(study, signal.SIGTERM), 130),
}


@pytest.mark.slow
@pytest.mark.timeout(1800)  # on a busy machine
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc on this system")
def test_a_study_that_is_killed_in_any_way_ends_with_the_same_results(tmp_path, monkeypatch):
    monkeypatch.setattr("medseg_reg.study.__main__.report", lambda study: None)
    store = make_store(tmp_path / "store", cases=6, slices=6, size=32).path
    straight = write_study(tmp_path, "straight", store, seeds=1)
    main(["--config", str(straight)])
    wanted = (tmp_path / "straight" / "results.csv").read_bytes()
    for how, (sign, end, code) in WAYS.items():
        path = write_study(tmp_path, how, store, seeds=1)
        assert start_and_end(path, sign, end) == code, how
        if how == "worker":
            assert "SIGKILL" in (tmp_path / how / "failures.csv").read_text()
        main(["--config", str(path)])
        assert (tmp_path / how / "results.csv").read_bytes() == wanted, how
        assert not (tmp_path / how / "failures.csv").exists()

"""The command of a study, as a user starts, kills and repeats it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from medseg_reg.study.__main__ import main
from tests.stores import make_store
from tests.study.studies import tiny_study
from tests.training import command

ROOT = Path(__file__).parents[2]


def write_study(folder: Path, name: str, store: Path) -> Path:
    content = tiny_study(store, folder / name, run=str(folder / name), workers=2)
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


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc on this system")
def test_a_study_that_is_killed_in_any_way_ends_with_the_same_results(tmp_path):
    store = make_store(tmp_path / "store", cases=6, slices=6, size=32).path
    began = time.monotonic()
    done = command("medseg_reg.study", "--config", write_study(tmp_path, "straight", store))
    took = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    wanted = (tmp_path / "straight" / "results.csv").read_bytes()
    moments, codes = random.Random(5), []
    for how in ("group", "worker", "term", "group"):
        name = f"killed_{how}_{moments.random():.6f}"
        path = write_study(tmp_path, name, store)
        with subprocess.Popen(
            [sys.executable, "-m", "medseg_reg.study", "--config", str(path)],
            cwd=ROOT,
            start_new_session=True,
        ) as process:
            time.sleep(moments.uniform(0.2, 0.6) * took)
            if how == "group":
                os.killpg(process.pid, signal.SIGKILL)
            elif how == "term":
                process.terminate()
            elif workers := children(process.pid):
                os.kill(workers[0], signal.SIGKILL)
            code = process.wait()
        # Too late, a signal finds a study that has ended.
        assert code in {"group": (-9, 0), "term": (130, -15, 0), "worker": (1, 0)}[how]
        codes.append(code)
        if code == 1:
            assert "SIGKILL" in (tmp_path / name / "failures.csv").read_text()
        again = command("medseg_reg.study", "--config", path)
        assert again.returncode == 0, again.stdout + again.stderr
        assert (tmp_path / name / "results.csv").read_bytes() == wanted, how
    assert -9 in codes

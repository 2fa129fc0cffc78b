"""Processes of a study get their share of the machine, and none outlives the study."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medseg_reg.errors import MedsegError
from medseg_reg.study import worker
from medseg_reg.study.failures import last_error
from medseg_reg.study.lock import locked
from medseg_reg.study.pool import Job, LocalPool

LEASHED = "from medseg_reg.study.worker import hold_leash; hold_leash(); import time; "


def ended(pool: LocalPool, count: int) -> dict[str, int]:
    found: dict[str, int] = {}
    end = time.monotonic() + 60
    while len(found) < count and time.monotonic() < end:
        found |= {job.name: code for job, code in pool.ended()}
    return found


def alive(process: int) -> bool:
    """Whether a process is there, and not only its exit code."""
    status = Path(f"/proc/{process}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def job(name: str, code: str, folder: Path) -> Job:
    return Job(name, (sys.executable, "-c", code), folder / "logs" / f"{name}.log")


def test_a_process_gets_its_threads_and_its_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c")
    code = "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['CUDA_VISIBLE_DEVICES'])"
    pool = LocalPool(4, threads=3, gpus=2)
    for number in range(4):
        pool.start(job(f"{number}", code, tmp_path))
    assert set(ended(pool, 4).values()) == {0}
    said = sorted((tmp_path / "logs" / f"{n}.log").read_text().splitlines()[-1] for n in range(4))
    assert said == ["3 GPU-a", "3 GPU-a", "3 GPU-b", "3 GPU-b"]


def test_without_gpus_a_process_sees_none():
    assert worker.environment(1, None, {"CUDA_VISIBLE_DEVICES": "3"})["CUDA_VISIBLE_DEVICES"] == ""


def test_a_stop_reaches_a_process_as_one_signal(tmp_path):
    code = (
        "import signal, sys; got = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: got.append(1))\n"
        f"{LEASHED}\nprint('ready', flush=True)\n"
        "while not got: time.sleep(0.01)\n"
        "time.sleep(0.3); sys.exit(100 + len(got))"
    )
    pool = LocalPool(1, threads=1)
    pool.start(job("a", code, tmp_path))
    log = tmp_path / "logs" / "a.log"
    while "ready" not in log.read_text():
        time.sleep(0.02)
    pool.stop()
    assert ended(pool, 1) == {"a": 101}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc on this system")
def test_no_process_outlives_a_study_that_is_killed(tmp_path):
    child = f"{LEASHED}\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(__import__('os').getpid()))"
    child += "\ntime.sleep(600)"
    parent = (
        "import sys, time; from pathlib import Path\n"
        "from medseg_reg.study.pool import Job, LocalPool\n"
        "from medseg_reg.study.lock import locked\n"
        f"with locked(Path({str(tmp_path)!r})) as lock:\n"
        "    pool = LocalPool(1, 1, lock=lock)\n"
        f"    log = Path({str(tmp_path / 'log')!r})\n"
        f"    pool.start(Job('a', (sys.executable, '-c', {child!r}), log))\n"
        "    time.sleep(600)"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", parent], cwd=root) as process:
        pid_file = tmp_path / "pid"
        while not (pid_file.exists() and pid_file.read_text()):
            assert process.poll() is None
            time.sleep(0.02)
        message = r"another study is at work there \(process \d+ on"
        with pytest.raises(MedsegError, match=message), locked(tmp_path, patience=0.2):
            pass
        process.send_signal(signal.SIGKILL)
    # The lock is free only when the last process has ended, so another study cannot meet it.
    with locked(tmp_path):
        assert not alive(int(pid_file.read_text()))


def test_an_error_of_an_earlier_attempt_is_not_that_of_this_one(tmp_path):
    pool = LocalPool(1, 1)
    for number, text in enumerate(("error: the store is missing.", "RuntimeError: out of memory")):
        program = f"import sys; print({text!r}); sys.exit({number + 1})"
        job = Job("one", (sys.executable, "-c", program), tmp_path / "log")
        pool.start(job)
        assert last_error(job.log, ended(pool, 1)["one"]) == text


@pytest.mark.parametrize("visible", ["4", "", "-1"])
def test_hidden_gpus_are_not_taken(visible, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(MedsegError, match="gpus: 2 are asked for, but CUDA_VISIBLE_DEVICES shows"):
        LocalPool(2, 1, gpus=2)

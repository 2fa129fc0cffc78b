"""The processes of a conversion end with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SLOW_CONVERSION = """
import argparse, sys, time
from pathlib import Path
from data_prep.convert import convert
from medseg_reg.data.store_writer import CaseSource
from tests.data_prep.test_workers import read_forever
from tests.stores import describe

if __name__ == "__main__":
    out = Path(sys.argv[1])
    sources = [CaseSource(name, name, (Path(sys.argv[0]),)) for name in "ab"]
    options = argparse.Namespace(out=out / "store", workers=2, skip=[])
    convert(sources, read_forever, describe(2, "uint8"), options, {"pids": str(out)})
"""


def read_forever(source):
    Path(os.environ["PIDS"], str(os.getpid())).touch()
    time.sleep(600)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_workers_do_not_outlive_a_conversion_that_is_killed(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SLOW_CONVERSION)
    pids = tmp_path / "pids"
    pids.mkdir()
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PIDS": str(pids), "PYTHONPATH": str(root)}
    with subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        end = time.monotonic() + 60
        while len(list(pids.iterdir())) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        workers = [int(path.name) for path in pids.iterdir()]
        assert len(workers) == 2
        process.send_signal(signal.SIGKILL)
    end = time.monotonic() + 20
    while any(alive(pid) for pid in workers) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in workers)

"""What a training sets for its process keeps to what the container allows."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medseg_reg.engine import host
from tests.training import write_config

on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for glibc alone")

FAULTS = """
import resource, sys, torch
from medseg_reg.engine.host import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def clone():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x.clone()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
x = torch.zeros(64 << 20, dtype=torch.uint8)
# A copy finds its place after some others: small blocks lie between them at first.
print([clone() for _ in range(12)][-1])
"""


def faults(how: str) -> int:
    """Return the pages that the system hands out while 64 MiB are copied again."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, how],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    return int(done.stdout)


@on_glibc
def test_kept_memory_is_not_asked_of_the_system_again():
    assert faults("keep") < 100
    assert faults("return") >= 32  # at least one for each huge page


def test_nothing_is_done_without_glibc(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not host.keep_freed_memory()


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_the_quota_of_a_container_is_read(tmp_path, files, cores):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert host.core_quota(tmp_path) == cores


@pytest.mark.parametrize(("given", "expected"), [(None, 2), ("5", 5)])
def test_a_quota_lowers_the_threads_unless_the_user_gave_them(monkeypatch, given, expected):
    set_to = [5]
    monkeypatch.setattr(host, "core_quota", lambda: 1.5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: set_to[-1])
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert host.use_allowed_cores() == expected


@pytest.mark.parametrize("wanted", [True, False])
def test_the_training_command_keeps_memory_unless_told_not_to(monkeypatch, tmp_path, wanted):
    from medseg_reg import train
    from tests.training import tiny_config

    called = []
    monkeypatch.setattr(host, "keep_freed_memory", lambda: called.append(True))
    content = tiny_config(tmp_path / "absent", tmp_path / "run", training__keep_memory=wanted)
    config = write_config(tmp_path / "c.yaml", content)
    monkeypatch.setattr(sys, "argv", ["train", "--config", str(config)])
    with pytest.raises(SystemExit):
        train.command()
    assert called == [True] * wanted


def test_a_training_called_from_python_leaves_its_process_alone(monkeypatch, tmp_path):
    from medseg_reg import train
    from medseg_reg.errors import MedsegError
    from tests.training import tiny_config

    for name in ("keep_freed_memory", "use_allowed_cores"):
        monkeypatch.setattr(host, name, lambda: pytest.fail("the process was changed"))
    content = tiny_config(tmp_path / "absent", tmp_path / "run")
    with pytest.raises(MedsegError, match="is not a slice store"):
        train.main(["--config", str(write_config(tmp_path / "c.yaml", content))])

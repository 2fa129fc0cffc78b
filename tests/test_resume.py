"""A run that is killed at any moment ends with the weights of one that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from tests.stores import make_store
from tests.training import command, same_weights, tiny_config, train_in_child, write_config

# Imported before the children are forked, so that they need not.
import medseg_reg.train  # noqa: F401  isort: skip
import albumentations  # noqa: F401  isort: skip


def kill_again_and_again(folder: Path, kills: int, number: int, seed: int) -> None:
    """Compare a run with others, `kills` of which are killed at a random moment and resumed."""
    store = make_store(folder / "store", cases=6, slices=6, size=32)

    def config(name: str) -> Path:
        return write_config(folder / f"{name}.yaml", tiny_config(store.path, folder / name))

    began = time.monotonic()
    assert train_in_child(config("straight"), log=folder / "straight.log") == 0
    took = time.monotonic() - began
    epochs = pd.read_csv(folder / "straight" / "metrics.csv").drop(columns="seconds")
    moments, killed, attempt = random.Random(seed), 0, 0
    while killed < kills:
        assert attempt < 4 * kills, "the runs end before they can be killed"
        name, attempt = f"killed_{attempt}", attempt + 1
        began, after = time.monotonic(), moments.uniform(0, took)
        code = train_in_child(config(name), after=after, number=number, log=folder / f"{name}.log")
        if code == 0:
            took = time.monotonic() - began  # faster than the first: kill the next ones earlier
            continue
        killed += 1
        # Another number of loader processes must not matter.
        again = train_in_child(
            config(name), f"data.workers={attempt % 2}", log=folder / f"{name}.log"
        )
        assert again == 0, (folder / f"{name}.log").read_text()[-2000:]
        assert same_weights(folder / "straight", folder / name), f"killed after {after:.3f} s"
        table = pd.read_csv(folder / name / "metrics.csv").drop(columns="seconds")
        pd.testing.assert_frame_equal(table, epochs, check_exact=True)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    kill_again_and_again(tmp_path, kills=2, number=signal.SIGKILL, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_twenty_killed_runs_go_on_bit_for_bit(tmp_path):
    kill_again_and_again(tmp_path, kills=20, number=signal.SIGKILL, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_ten_terminated_runs_go_on_bit_for_bit(tmp_path):
    kill_again_and_again(tmp_path, kills=10, number=signal.SIGTERM, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_that_are_killed_go_on_bit_for_bit(tmp_path):
    store = make_store(tmp_path / "store", cases=6, slices=6, size=32)
    names = ("straight", "killed")
    configs = {
        name: write_config(
            tmp_path / f"{name}.yaml",
            tiny_config(store.path, tmp_path / name, training__devices=2, training__epochs=6),
        )
        for name in names
    }
    assert command("medseg_reg.train", "--config", configs["straight"]).returncode == 0
    with subprocess.Popen(
        [sys.executable, "-m", "medseg_reg.train", "--config", str(configs["killed"])],
        cwd=Path(__file__).parents[1],
        start_new_session=True,
    ) as process:
        table = tmp_path / "killed" / "metrics.csv"
        while process.poll() is None and not (table.exists() and len(pd.read_csv(table)) >= 2):
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    assert not (tmp_path / "killed" / "weights.safetensors").exists()
    again = command("medseg_reg.train", "--config", configs["killed"])
    assert again.returncode == 0, again.stderr
    assert same_weights(*(tmp_path / name for name in names))

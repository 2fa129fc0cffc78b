"""A run that is killed at any moment ends with the weights of one that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

# Imported before the children are forked, so that they need not.
import medseg_reg.engine.fit
from tests.stores import make_store
from tests.training import command, same_weights, tiny_config, train_in_child, write_config

import medseg_reg.inference.evaluation  # noqa: F401  isort: skip
import albumentations  # noqa: F401  isort: skip


# All that changes over a training: rates, coins, weight decay, what layers remember.
CHANGING = {
    "training__accumulate": 2,
    "regularization__penalty": {"weight_decay": 1e-3, "l1": 1e-5},
    "regularization__architecture": [
        {"name": "spatial_dropout", "places": "encoder", "p": 0.3, "schedule": "linear"},
        {"name": "corrdrop_channel", "p": 0.2, "schedule": "v_shape", "depth_ramp": {"first": 0.5}},
        {"name": "focused_dropout", "p": 0.5, "magnified_weight_decay": 0.01},
        {"name": "nsdropout", "places": "decoder", "p": 0.3},
    ],
}


def kill_again_and_again(
    folder: Path, kills: int, number: int, seed: int, changes: dict[str, Any] | None = None
) -> None:
    """Compare a run with others, `kills` of which are killed at a random moment and resumed."""
    store = make_store(folder / "store", cases=6, slices=6, size=32)

    def config(name: str) -> Path:
        content = tiny_config(store.path, folder / name, **(changes or {}))
        return write_config(folder / f"{name}.yaml", content)

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


def test_a_killed_run_with_schedules_coins_and_memory_goes_on_bit_for_bit(tmp_path):
    changes = {**CHANGING, "training__checkpoint_minutes": 1e-6}  # a checkpoint after each step
    kill_again_and_again(tmp_path, kills=2, number=signal.SIGKILL, seed=2, changes=changes)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_twenty_killed_runs_go_on_bit_for_bit(tmp_path):
    kill_again_and_again(tmp_path, kills=20, number=signal.SIGKILL, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("changes", [{}, CHANGING])
def test_ten_terminated_runs_go_on_bit_for_bit(tmp_path, changes):
    kill_again_and_again(tmp_path, kills=10, number=signal.SIGTERM, seed=0, changes=changes)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("changes", [{}, CHANGING])
def test_two_processes_that_are_killed_go_on_bit_for_bit(tmp_path, changes):
    store = make_store(tmp_path / "store", cases=6, slices=6, size=32)
    names = ("straight", "killed")
    configs = {
        name: write_config(
            tmp_path / f"{name}.yaml",
            tiny_config(
                store.path, tmp_path / name, training__devices=2, training__epochs=4, **changes
            ),
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

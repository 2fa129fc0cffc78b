"""Runs of the training command for tests: tiny, in a child process, killed when asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from safetensors.numpy import load_file


def tiny_config(store: Path, run: Path, **changes: Any) -> dict[str, Any]:
    """Return the configuration of a training that takes about two seconds."""
    content: dict[str, Any] = {
        "name": "tiny",
        "run": str(run),
        "data": {
            "store": str(store),
            "split": {"kind": "counts", "train": 3, "val": 1, "test": 2},
            "batch_size": 2,
        },
        "network": {"channels": [4, 8]},
        "regularization": {
            "data": [{"name": "Rotate", "limit": 20, "p": 0.5}],
            "architecture": [
                {"name": "spatial_dropout", "places": "between_convs", "p": 0.2},
                {"name": "heuristic_dropout", "places": "after_block", "p": 0.3},
            ],
            "error": {"ce": 1.0, "dice": 1.0},
        },
        "schedule": {"name": "cosine", "warmup_epochs": 0.5},
        "training": {"epochs": 3, "progress": False, "accelerator": "cpu"},
    }
    for key, value in changes.items():
        group = content
        *groups, last = key.split("__")
        for name in groups:
            group = group.setdefault(name, {})
        group[last] = value
    return content


def write_config(path: Path, content: dict[str, Any]) -> Path:
    """Write a configuration file."""
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def command(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `python -m module` as a user would, and return what it said."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )


def train_in_child(
    config: Path,
    *overrides: str,
    after: float | None = None,
    number: int = signal.SIGKILL,
    log: Path | None = None,
) -> int:
    """Train in a forked child, send it a signal `after` some seconds, and return its exit code.

    Forked, the child need not import everything again; nothing has run yet that a fork harms.
    """
    from medseg_reg.errors import run_main
    from medseg_reg.train import main

    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        try:
            target = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(target, 1)
            os.dup2(target, 2)
            sys.argv = ["train", "--config", str(config), *overrides]
            run_main(main)
        except SystemExit as end:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(end.code or 0))
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
            os._exit(70)
    if after is not None:
        end = time.monotonic() + after
        while time.monotonic() < end:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def same_weights(left: Path, right: Path) -> bool:
    """Whether two runs ended with the same weights, bit for bit."""
    a, b = load_file(left / "weights.safetensors"), load_file(right / "weights.safetensors")
    return a.keys() == b.keys() and all(a[k].tobytes() == b[k].tobytes() for k in a)

"""Runs of the training command for tests: tiny, in a child process, killed when asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import load_file

from medseg_reg.errors import Interrupted, run_main


def tiny_unetr(size: int) -> dict[str, Any]:
    """Return the group `network` of MONAI's UNETR for images of a size, as small as it goes."""
    return {
        "name": "monai.UNETR",
        "img_size": size,
        "feature_size": 4,
        "hidden_size": 12,
        "mlp_dim": 16,
        "num_heads": 3,
    }


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


def trained(path: Path, content: dict[str, Any]) -> None:
    """Train and evaluate by the command, in this process."""
    from medseg_reg.train import main

    content["evaluation"] = {"resamples": 100}
    main(["--config", str(write_config(path, content))])


def fork(
    main: Callable[[Sequence[str]], None], arguments: Sequence[str], log: Path | None = None
) -> int:
    """Run a command in a forked child, and return the child's process id.

    Forked, it need not import everything again; nothing may have run yet that a fork harms.

    Args:
        main: of the command.
        arguments: of the command.
        log: the file to which its output is added; by default that is lost.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        with Path(log or os.devnull).open("a", encoding="utf-8") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            sys.stdout = sys.stderr = output  # pytest may have put others there
            sys.argv = ["command", *arguments]
            run_main(main)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def train_in_child(
    config: Path,
    *overrides: str,
    after: float | None = None,
    number: int = signal.SIGKILL,
    log: Path | None = None,
) -> int:
    """Train in a forked child, send it a signal `after` some seconds, and return its exit code."""
    from medseg_reg.train import main

    child = fork(main, ["--config", str(config), *overrides], log)
    if after is not None:
        end = time.monotonic() + after
        while time.monotonic() < end:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextmanager
def interrupted_at(
    epoch: int,
    batch: int,
    said: str | None = None,
    *,
    module: type[Any] | None = None,
    how: str = "terminated",
) -> Iterator[None]:
    """Ask the training inside to stop, as a scheduler does, at a batch; it must obey and say so.

    Args:
        epoch: from 0; likewise `batch`.
        batch: of the epoch.
        said: what it says.
        module: whose training; that of a segmentation by default.
        how: `terminated`, or `killed`, which ends it in the middle of the batch.
    """
    from medseg_reg.engine.module import SegmentationModule

    module = module or SegmentationModule
    original = module.training_step

    def asked(self: Any, data: Any, index: int) -> Any:
        if (self.current_epoch, index) == (epoch, batch):
            if how == "killed":
                raise MemoryError
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, data, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "training_step", asked)
        with pytest.raises(MemoryError if how == "killed" else Interrupted, match=said):
            yield


def same_weights(left: Path, right: Path) -> bool:
    """Whether two runs ended with the same weights, bit for bit."""
    a, b = load_file(left / "weights.safetensors"), load_file(right / "weights.safetensors")
    return a.keys() == b.keys() and all(a[k].tobytes() == b[k].tobytes() for k in a)

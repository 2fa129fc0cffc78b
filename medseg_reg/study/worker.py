"""One run of a study, in a process of its own: what `python -m medseg_reg.train` does, on a leash.

    python -m medseg_reg.study.worker --config runs/studies/demo/configs/.../seed0.yaml

With `--leash`, standard input is a pipe from the process that started this one. A byte in it asks
for a stop after a checkpoint; its end says that the other process is gone, and this one goes too.
So no run is left behind, even where the study itself is killed without warning.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medseg_reg.errors import run_main

STOP = b"s"
_GONE = 137
# The tables of the tests of co-adaptation.
COADAPTATION = ("coadaptation", "channel_correlation", "train_val_gap")
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def command(config: Path, *, train_only: bool = False, coadaptation: Any = None) -> list[str]:
    """Return the command line of a worker on a leash."""
    words = [sys.executable, "-m", "medseg_reg.study.worker", "--leash", "--config", str(config)]
    if train_only:
        words.append("--train-only")
    if coadaptation is not None:
        words += ["--coadaptation", json.dumps(coadaptation)]
    return words


def environment(threads: int, gpu: str | None, base: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a worker: so many threads, and one GPU or none."""
    found = {**base, **dict.fromkeys(THREADS, str(threads)), "PYTHONUNBUFFERED": "1"}
    # Outside of the repository too, a worker finds the package that its study came from.
    root = str(Path(__file__).parents[2])
    found["PYTHONPATH"] = os.pathsep.join(filter(None, (root, base.get("PYTHONPATH"))))
    found["CUDA_VISIBLE_DEVICES"] = "" if gpu is None else gpu
    return found


def hold_leash() -> None:
    """Watch standard input from a thread: stop when asked to, end when the other end is gone."""

    def watch() -> None:
        while True:
            said = os.read(0, 1)
            if not said:
                os._exit(_GONE)
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def main(arguments: Sequence[str]) -> None:
    """Train and, unless told otherwise, evaluate one run."""
    parser = argparse.ArgumentParser(
        prog="python -m medseg_reg.study.worker", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--leash", action="store_true", help="watch standard input")
    parser.add_argument("--train-only", action="store_true", help="leave the test part alone")
    parser.add_argument("--coadaptation", type=json.loads, help="its settings, as JSON")
    parsed = parser.parse_args(arguments)
    if parsed.leash:
        hold_leash()
    # Imported here: a stop that comes during the seconds of these imports is obeyed at once.
    from medseg_reg.config import load_config
    from medseg_reg.engine.fit import fit
    from medseg_reg.engine.run_directory import RunDirectory
    from medseg_reg.train import main as train
    from medseg_reg.train import make_phantom

    config = load_config(parsed.config)
    if parsed.train_only:
        make_phantom(config)
        fit(config)
        return
    train(["--config", str(parsed.config)], own_process=True)
    if parsed.coadaptation is not None:
        write_coadaptation(RunDirectory(config.run_path), parsed.coadaptation)


def coadaptation_files(run: Path) -> tuple[dict[str, Path], Path]:
    """Return the tables of the tests of co-adaptation in a run directory, and their settings."""
    folder = run / "evaluation"
    return {name: folder / f"{name}.csv" for name in COADAPTATION}, folder / "coadaptation.json"


def write_coadaptation(run: Any, settings: dict[str, Any]) -> None:
    """Test a finished run for co-adaptation and keep the tables in its directory."""
    from medseg_reg.files import replacing, write_json
    from medseg_reg.study.coadaptation import channel_correlation, coadaptation, gaps

    tables, done = coadaptation_files(run.path)
    part = settings["part"]
    found = {
        "coadaptation": coadaptation(
            run, settings["rates"], settings["draws"], settings["seed"], part
        ),
        "channel_correlation": channel_correlation(run, part),
        "train_val_gap": gaps(run),
    }
    for name, path in tables.items():
        with replacing(path) as temporary:
            found[name].to_csv(temporary, index=False, float_format="%.6f")
    # Last, because its presence says that the tables are there.
    write_json(done, settings)


if __name__ == "__main__":
    run_main(main)

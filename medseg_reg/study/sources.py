"""What the runs of a study learn from elsewhere is looked for before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from medseg_reg.config import Config
from medseg_reg.data.splits import make_splits
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.run_directory import DataFacts, RunDirectory
from medseg_reg.errors import MedsegError
from medseg_reg.study.grid import Cell
from medseg_reg.study.placeholders import WEIGHTS


def require_sources(cells: Iterable[Cell[Any]]) -> None:
    """Refuse to start where a run lacks its teacher or weights, or may not learn from them.

    Runs that are trained already need them no more.

    Raises:
        MedsegError: names the first such run, what is wrong, and how many there are.
    """
    known: dict[tuple[Any, ...], str] = {}
    lacking = []
    for cell in cells:
        run, config = RunDirectory(cell.config.run_path), cell.config
        if run.finished or not any(_sources(config)):
            continue
        data = config.data
        # Runs that have begun keep their split; of the others many have one source and one split.
        own = run.path if run.path.exists() else None
        key = (*_sources(config), data.store, data.split, data.image, own)
        if key not in known:
            known[key] = _lack(config, run)
        if known[key]:
            lacking.append((cell.path, known[key]))
    if lacking:
        path, why = lacking[0]
        others = len(lacking) - 1
        more = f" {others} more of the runs cannot begin either." if others else ""
        raise MedsegError(f"run {path}: {why}{more} Nothing was trained.")


def _sources(config: Config) -> tuple[Path | None, ...]:
    """Return the files of weights, the teacher and the coarse run of a run."""
    teacher, network = config.regularization.error.distillation, config.network
    named = teacher.teacher if teacher else None
    coarse = network.reuse.run if network.reuse else None
    return (network.pretrained, network.encoder_weights, named, coarse)


def _lack(config: Config, run: RunDirectory) -> str:
    """Say what a run lacks of what it shall learn from; nothing where all is there."""
    from medseg_reg.engine.coarse import check_coarse  # seconds to import
    from medseg_reg.engine.distillation import check_teacher
    from medseg_reg.engine.origins import weights_origin

    for key, path in zip(WEIGHTS, _sources(config)[:2], strict=True):
        if path is not None and not run.begun and not path.is_file():
            return f"{key}: {path}: {_why(path)}"
    store = SliceStore(config.data.store)
    splits = run.splits(store) or make_splits(store, config.data.split)
    facts = DataFacts.of(store, store.manifest.cases[0].channels)
    try:
        check_teacher(config, facts, splits, store)
        check_coarse(run, config, facts, splits, store)
        if not run.begun:  # else its weights are there
            weights_origin(config, splits, store)
    except MedsegError as error:
        return str(error)
    return ""


def _why(path: Path) -> str:
    if (path.parent / "config.yaml").is_file():
        return f"{path.parent} is not finished. Start it again: it goes on."
    return "does not exist. Make it first: pre-train (`python -m medseg_reg.pretrain`), or train."

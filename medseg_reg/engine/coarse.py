"""The coarse run whose answer a training takes in, and what is kept of it."""

from __future__ import annotations

import shutil

from medseg_reg.config import Config
from medseg_reg.data.preprocessing import ImageSpec
from medseg_reg.data.splits import Splits
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.earlier_run import check_earlier, load_earlier, same_run
from medseg_reg.engine.network import coarse_network
from medseg_reg.engine.origins import Origin, origin_of_run
from medseg_reg.engine.run_directory import DataFacts, RunDirectory
from medseg_reg.errors import MedsegError
from medseg_reg.files import read_json, replacing_folder, sha256_of, write_json
from medseg_reg.networks.reuse import Coarse

_KEY = "network.reuse.run"
# Of a run, what it needs to predict, and to say what it has learned from.
_KEPT = ("config.yaml", "data.json", "weights.safetensors")
_KEPT_IF_THERE = (
    "splits.json",
    "seen.json",
    "metrics.csv",
    "memory.safetensors",
    "teacher.json",
    "pretrained.json",
    "coarse.json",
)


def check_coarse(
    run: RunDirectory, config: Config, facts: DataFacts, splits: Splits, store: SliceStore
) -> Origin | None:
    """Return what is known of the coarse run that a configuration names, if it names any.

    A run that goes on takes what it has kept.

    Raises:
        MedsegError: see `check_earlier`; or the coarse run would see images other than those that
            it was trained on.
    """
    if config.network.reuse is None:
        return None
    source = _source(run, config)
    origin = check_earlier(source, _KEY, "coarse", config, facts, splits, store)
    if problem := _misfit(source.config().data.image, config.data.image):
        raise MedsegError(f"{_KEY}: {source.path}: {problem}")
    return origin


def load_coarse(
    run: RunDirectory, config: Config, facts: DataFacts, splits: Splits, store: SliceStore
) -> Coarse | None:
    """Load the coarse network that a configuration names, if it names any.

    Random states are not what they were afterwards.

    Raises:
        MedsegError: see `check_coarse` and `load_earlier`.
    """
    if check_coarse(run, config, facts, splits, store) is None:
        return None
    source = _source(run, config)
    network = load_earlier(source, _KEY)
    return coarse_network(network, config, source.config(), len(facts.classes))


def keep_coarse(run: RunDirectory, config: Config, splits: Splits, store: SliceStore) -> None:
    """Copy what is needed of the coarse run into the run directory, and note which one it was.

    Raises:
        MedsegError: what was kept has changed since.
    """
    spec = config.network.reuse
    if spec is None:
        return
    source, note = _source(run, config), run.path / "coarse.json"
    origin = origin_of_run(source, "coarse", splits, store)
    found = same_run(spec.run, source.weights, note, _KEY, origin)
    if source.path != run.coarse.path:
        _copy(source, run.coarse)
    write_json(note, found)


def takes_in(run: RunDirectory, coarse: RunDirectory) -> bool:
    """Whether a finished run takes in the answer of this coarse run, by the hash of its weights."""
    note = run.path / "coarse.json"
    if not note.exists() or not coarse.finished:
        return False
    return bool(read_json(note).get("sha256") == sha256_of(coarse.weights))


def _source(run: RunDirectory, config: Config) -> RunDirectory:
    spec = config.network.reuse
    if spec is None or run.coarse.path.exists():
        return run.coarse
    return RunDirectory(spec.run)


def _copy(source: RunDirectory, target: RunDirectory) -> None:
    with replacing_folder(target.path) as folder:
        for name in _KEPT:
            shutil.copyfile(source.path / name, folder / name)
        for name in _KEPT_IF_THERE:
            if (source.path / name).exists():
                shutil.copyfile(source.path / name, folder / name)
        if source.coarse.path.exists():  # a third stage
            shutil.copytree(source.coarse.path, folder / source.coarse.path.name)


def _misfit(coarse: ImageSpec, fine: ImageSpec) -> str:
    """Say why a coarse network would see images that it does not know; empty if it would not."""
    if (coarse.size, coarse.fit) == (fine.size, fine.fit):
        return ""
    own = "" if fine.size is None else f"{fine.size[0]}x{fine.size[1]}, fit {fine.fit}"
    if coarse.size is None or coarse.fit == "crop":
        if fine.size is None or fine.fit == "crop":
            return ""
        return (
            "was trained on slices of their own resolution, and this run scales them (data.image "
            f"size {own}). Train it with a size too."
        )
    if fine.size is None:
        return ""
    theirs = f"{coarse.size[0]}x{coarse.size[1]}, fit {coarse.fit}"
    even = coarse.size[0] * fine.size[1] == coarse.size[1] * fine.size[0]
    if coarse.fit != fine.fit or (fine.fit == "letterbox" and not even):
        return (
            f"was trained on slices of {theirs}, this run has {own}, of which it would see other "
            "images. Train both with one fit" + (" and one shape." if not even else ".")
        )
    return ""

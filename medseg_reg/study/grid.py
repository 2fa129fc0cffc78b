"""From a study to its runs: each cell of the grid is an ordinary run with its own configuration."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from medseg_reg.config import Config, parse_config
from medseg_reg.config_file import origins, read_yaml, with_overrides
from medseg_reg.config_network import FOREIGN_NAMES
from medseg_reg.data.splits import make_splits
from medseg_reg.data.store import SliceStore
from medseg_reg.errors import MedsegError
from medseg_reg.study.idle_keys import KEPT_OF_SPLIT
from medseg_reg.study.placeholders import filled_sources
from medseg_reg.study.spec import MethodSpec, StudySpec


class Spotted(Protocol):
    """Where a run stands among many: a named tuple, as `Spot`."""

    @property
    def path(self) -> str:
        """Where the run lies below `runs/`, with slashes; its name too."""

    def __iter__(self) -> Iterator[Any]:
        """Go through the columns that say so in a table."""


SpotT = TypeVar("SpotT", bound=Spotted)


class Spot(NamedTuple):
    """Where a run stands in the grid of a study.

    Attributes:
        dataset: name of the data set; likewise `network` and `method`.
        seed: of the training.
        part: `fold2` or `split1` where there are several splits, else empty.
    """

    dataset: str
    network: str
    method: str
    seed: int
    part: str

    @property
    def path(self) -> str:
        """Where the run lies below `runs/`, with slashes."""
        names = (self.dataset, self.network, self.method, self.part, f"seed{self.seed}")
        return "/".join(filter(None, names))


@dataclass(frozen=True)
class Cell(Generic[SpotT]):
    """One run of a study, or of a search.

    Attributes:
        spot: where it stands in the grid of the study.
        config: the configuration of the run.
        overrides: what makes the run of the data set's file.
    """

    spot: SpotT
    config: Config
    overrides: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """Where the run lies below `runs/`, with slashes."""
        return self.spot.path

    @property
    def title(self) -> str:
        """The run in words."""
        return self.path.replace("/", " ")


def spots(study: StudySpec) -> Iterator[Spot]:
    """Go through the grid of a study, seeds outermost, so that early results compare all."""
    pairs = [
        (dataset, network)
        for dataset, data in study.datasets.items()
        for network in study.networks
        if data.networks is None or network in data.networks
    ]
    for seed, part, (dataset, network), method in product(
        study.seeds, _parts(study), pairs, study.methods
    ):
        yield Spot(dataset, network, method, seed, part)


def expand(study: StudySpec) -> list[Cell[Spot]]:
    """Return all runs of a study, in the order of `spots`.

    Raises:
        MedsegError: a file or value is wrong; the message names the cell.
    """
    files = {
        name: read_yaml(data.config) if data.config is not None else ({}, {})
        for name, data in study.datasets.items()
    }
    return [_cell(study, spot, *files[spot.dataset]) for spot in spots(study)]


def _cell(study: StudySpec, spot: Spot, content: Any, lines: Any) -> Cell[Spot]:
    """Return the run at a spot, made of what the data set's file holds."""
    file = study.datasets[spot.dataset].config or Path(spot.dataset)
    try:
        overrides = [
            *_overrides(study, spot, content),
            f"name={flow(study.name)}",
            f"seed={spot.seed}",
            f"run={flow((study.directory / 'runs' / spot.path).as_posix())}",
        ]
        whole = with_overrides(content, overrides)
        overrides += _written(filled_sources(whole, spot))
        places = origins(file, lines, overrides)
        config = parse_config(with_overrides(content, overrides), spot.path, places)
    except MedsegError as error:
        raise MedsegError(f"run {spot.path}: {error}") from None
    return Cell(spot, config, tuple(overrides))


def _parts(study: StudySpec) -> dict[str, int]:
    """Return the names of the splits, and the number of the fold or the seed of each."""
    if study.folds is not None:
        return {f"fold{number}": number for number in range(study.folds)}
    return {f"split{seed}": seed for seed in study.splits} or {"": 0}


def _split(study: StudySpec, part: str, content: Any, changed: Mapping[str, Any]) -> list[str]:
    """Return what makes a part of the split that the data set's file has, with what is changed."""
    if not part:
        return []
    number = _parts(study)[part]
    whole = with_overrides(content, _written(changed))
    given = (whole.get("data") or {}).get("split") or {}
    if study.folds is not None:
        kept = {key: given[key] for key in KEPT_OF_SPLIT if key in given}
        split = {"kind": "kfold", "folds": study.folds, "fold": number, **kept}
        return [f"data.split={flow(split)}"]
    _require_drawn(study, given)
    return [f"data.split.seed={number}"]


def _require_drawn(study: StudySpec, split: Mapping[str, Any]) -> None:
    """Refuse several draws of a split of which nothing is drawn."""
    if split.get("kind") == "file" and split.get("train_frames") is None:
        raise MedsegError(
            f"splits: the study asks for the draws {list(study.splits)}, but data.split.kind is "
            f"'file' ({split.get('file')}): nothing is drawn, and all of them would be the same "
            "split. Leave out 'splits'; or let the split be drawn (data.split.kind 'counts' or "
            "'fractions'), or its training slices (data.split.train_frames)."
        )


def _overrides(study: StudySpec, spot: Spot, content: Any) -> list[str]:
    data, spec = study.datasets[spot.dataset], study.methods[spot.method]
    changed: dict[str, Any] = {**data.overrides, **study.overrides}
    split = _split(study, spot.part, content, changed)
    wanted = study.networks[spot.network]
    if wanted.get("name") in FOREIGN_NAMES:
        changed["network"] = wanted  # nothing of another network's keys has a meaning there
    else:
        changed |= {f"network.{key}": value for key, value in wanted.items()}
    budget = {"training.epochs": study.budget.epochs, "data.batch_size": study.budget.batch_size}
    changed |= {key: value for key, value in budget.items() if value is not None}
    changed["training.progress"] = False
    changed["regularization.architecture"] = _layers(spec, study.equal_rates)
    changed |= spec.overrides
    return [*_written(changed), *split]


def _written(changed: Mapping[str, Any]) -> list[str]:
    return [f"{key}={flow(value)}" for key, value in changed.items()]


def _layers(method: MethodSpec, rate: float | None) -> list[dict[str, Any]]:
    layers = [one.model_dump(mode="json", exclude_defaults=True) for one in method.architecture]
    return layers if rate is None else [{**one, "p": rate} for one in layers]


def flow(value: Any) -> str:
    """Return plain types as YAML on one line, as an override has it.

    >>> flow({"p": 0.1, "places": ["encoder"], "limit": float("inf"), "on": True})
    '{"p": 0.1, "places": ["encoder"], "limit": .inf, "on": true}'
    """
    if isinstance(value, dict):
        return "{" + ", ".join(f"{flow(str(k))}: {flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(flow(one) for one in value) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else (".inf" if value > 0 else "-.inf")
    return json.dumps(value, ensure_ascii=False, default=str)


def require_splits(cells: Iterable[Cell[Any]]) -> None:
    """Refuse to start where the data of a run cannot be divided as it asks for.

    Each run would find that out by itself, one after another.

    Args:
        cells: runs whose data are there.

    Raises:
        MedsegError: more patients are asked for than there are, and the like; names a run.
    """
    seen = set()
    for cell in cells:
        data = cell.config.data
        if (asked := (data.store, data.split)) in seen:
            continue
        seen.add(asked)
        try:
            make_splits(SliceStore(data.store), data.split)
        except MedsegError as error:
            raise MedsegError(f"run {cell.path}: {error}") from None


def require_stores(cells: Iterable[Cell[Any]]) -> None:
    """Refuse to start where the data of a run are missing and are not made by the run itself."""
    seen = set()
    for cell in cells:
        data = cell.config.data
        if data.store in seen or data.phantom is not None:
            continue
        seen.add(data.store)
        try:
            SliceStore(data.store)
        except MedsegError as error:
            raise MedsegError(f"run {cell.path}: {error}") from None

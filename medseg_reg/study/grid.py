"""From a study to its runs: each cell of the grid is an ordinary run with its own configuration."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg_reg.config import Config, parse_config
from medseg_reg.config_file import Origins, origins, read_yaml, with_overrides
from medseg_reg.config_network import FOREIGN_NAMES
from medseg_reg.data.store import SliceStore
from medseg_reg.errors import MedsegError
from medseg_reg.study.spec import MethodSpec, StudySpec


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        dataset: name of the data set; likewise `network` and `method`.
        seed: of the training.
        part: `fold2` or `split1` where there are several splits, else empty.
        config: the configuration of the run.
        overrides: what makes the run of the data set's file.
    """

    dataset: str
    network: str
    method: str
    seed: int
    part: str
    config: Config
    overrides: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """Where the run lies below `runs/`, with slashes."""
        return _path(self.dataset, self.network, self.method, self.part, self.seed)

    @property
    def title(self) -> str:
        """The run in words."""
        return self.path.replace("/", " ")


def _path(dataset: str, network: str, method: str, part: str, seed: int) -> str:
    return "/".join(one for one in (dataset, network, method, part, f"seed{seed}") if one)


def expand(study: StudySpec) -> list[Cell]:
    """Return all runs of a study, seeds in the outer loop, so that early results compare all.

    Raises:
        MedsegError: a file or value is wrong; the message names the cell.
    """
    files = {
        name: read_yaml(data.config) if data.config is not None else ({}, {})
        for name, data in study.datasets.items()
    }
    cells = []
    for seed in study.seeds:
        for part, part_overrides in _parts(study):
            for dataset, data in study.datasets.items():
                for network in study.networks:
                    if data.networks is not None and network not in data.networks:
                        continue
                    for method in study.methods:
                        where = _path(dataset, network, method, part, seed)
                        content, lines = files[dataset]
                        overrides = [
                            *_overrides(study, dataset, network, method, content),
                            *(part_overrides(content) if part else ()),
                            f"name={flow(study.name)}",
                            f"seed={seed}",
                            f"run={flow((study.directory / 'runs' / where).as_posix())}",
                        ]
                        places = origins(data.config or Path(dataset), lines, overrides)
                        config = _config(where, content, overrides, places)
                        cells.append(
                            Cell(dataset, network, method, seed, part, config, tuple(overrides))
                        )
    return cells


def _parts(study: StudySpec) -> Iterator[tuple[str, Any]]:
    """Return the names of the splits, and for each what gives its overrides."""

    def fold(number: int) -> Any:
        def overrides(content: Any) -> list[str]:
            given = (content.get("data") or {}).get("split") or {}
            kept = {key: given[key] for key in ("seed", "train_frames") if key in given}
            split = {"kind": "kfold", "folds": study.folds, "fold": number, **kept}
            return [f"data.split={flow(split)}"]

        return overrides

    if study.folds is not None:
        yield from ((f"fold{number}", fold(number)) for number in range(study.folds))
    elif study.splits:
        for seed in study.splits:
            yield f"split{seed}", lambda _, seed=seed: [f"data.split.seed={seed}"]
    else:
        yield "", None


def _overrides(
    study: StudySpec, dataset: str, network: str, method: str, content: Any
) -> list[str]:
    data, spec = study.datasets[dataset], study.methods[method]
    changed: dict[str, Any] = {**data.overrides, **study.overrides}
    wanted = study.networks[network]
    if wanted.get("name") in FOREIGN_NAMES:
        changed["network"] = wanted  # nothing of another network's keys has a meaning there
    else:
        changed |= {f"network.{key}": value for key, value in wanted.items()}
    budget = {"training.epochs": study.budget.epochs, "data.batch_size": study.budget.batch_size}
    changed |= {key: value for key, value in budget.items() if value is not None}
    changed["training.progress"] = False
    changed["regularization.architecture"] = _layers(spec, study.equal_rates)
    changed |= spec.overrides
    return [f"{key}={flow(value)}" for key, value in changed.items()]


def _layers(method: MethodSpec, rate: float | None) -> list[dict[str, Any]]:
    layers = [one.model_dump(mode="json", exclude_defaults=True) for one in method.architecture]
    return layers if rate is None else [{**one, "p": rate} for one in layers]


def _config(cell: str, content: Any, overrides: list[str], places: Origins) -> Config:
    try:
        return parse_config(with_overrides(content, overrides), cell, places)
    except MedsegError as error:
        raise MedsegError(f"run {cell}: {error}") from None


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


def require_stores(cells: list[Cell]) -> None:
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

"""What a study directory holds, read once for the whole report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from pydantic import ValidationError

from medseg_reg.errors import MedsegError
from medseg_reg.files import read_json
from medseg_reg.study.grid import spots
from medseg_reg.study.results import COADAPTATION_COLUMNS, COLUMNS
from medseg_reg.study.spec import StudySpec
from medseg_reg.study.statistics import group_scores

# How the scores are called in words, in the order in which they are shown.
METRICS = {
    "dice": "DICE",
    "iou": "IoU",
    "precision": "precision",
    "recall": "recall",
    "surface_dice": "surface DICE",
    "hd95": "HD95",
    "assd": "ASSD",
    "volume_difference": "volume difference",
    "volume_difference_ml": "volume difference (ml)",
    "ece": "ECE",
}

# Columns of the tests of co-adaptation that hold no numbers.
_TEXTS = ("dataset", "network", "method", "split", "part", "group")

Pair = tuple[str, str]


@dataclass(frozen=True, eq=False)
class Source:
    """The content of a study directory.

    Attributes:
        path: the directory.
        settings: study.yaml, resolved.
        text: study.yaml as it is written.
        results: results.csv; names are text, `seed` is an integer, `value` a number or NaN.
        coadaptation: the tables of the tests of co-adaptation, as far as there are some, by the
            names of their files.
        failures: failures.csv as text, where there is one.
    """

    path: Path
    settings: dict[str, Any]
    text: str
    results: pd.DataFrame
    coadaptation: dict[str, pd.DataFrame]
    failures: pd.DataFrame | None

    @classmethod
    def read(cls, path: Path) -> Source:
        """Read a study directory.

        Raises:
            MedsegError: a file is missing, damaged, or lacks a column.
        """
        if not (path / "results.csv").exists():
            raise MedsegError(
                f"{path}: is not a study directory (no results.csv). "
                "`python -m medseg_reg.study --config FILE` makes one."
            )
        settings, text = _settings(path / "study.yaml")
        results = _read(path / "results.csv", COLUMNS, ("seed", "value"))
        results["value"] = results["value"].astype(float)
        failures = path / "failures.csv"
        tests = {
            name: _read(path / f"{name}.csv", columns, [c for c in columns if c not in _TEXTS])
            for name, columns in COADAPTATION_COLUMNS.items()
            if (path / f"{name}.csv").exists()
        }
        return cls(
            path,
            settings,
            text,
            results,
            tests,
            _read(failures, (), ()) if failures.exists() else None,
        )

    @property
    def name(self) -> str:
        """Name of the study."""
        return str(self.settings.get("name") or self.path.resolve().name)

    @cached_property
    def baseline(self) -> str:
        """The method that the others are compared with.

        Raises:
            MedsegError: no run of it is finished.
        """
        named = str(self.settings.get("baseline", "none"))
        found = list(dict.fromkeys(self.results["method"]))
        if found and named not in found:
            raise MedsegError(
                f"{self.path / 'results.csv'}: has no run of the baseline '{named}', only of "
                f"{', '.join(found)}. Finish the baseline's runs, or name another as `baseline`."
            )
        return named

    @cached_property
    def methods(self) -> tuple[str, ...]:
        """All methods with a finished run, the baseline first, then as in study.yaml."""
        found = list(dict.fromkeys(self.results["method"]))
        listed = [str(name) for name in self.settings.get("methods") or ()]
        order = [self.baseline, *listed, *found]
        return tuple(name for name in dict.fromkeys(order) if name in found)

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """All pairs of data set and network with a finished run."""
        known = self.results[["dataset", "network"]].drop_duplicates()
        return tuple(known.itertuples(index=False, name=None))

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """The scores with at least one value, the known ones first."""
        found = set(self.results.dropna(subset=["value"])["metric"])
        return (*(m for m in METRICS if m in found), *sorted(found - METRICS.keys()))

    @cached_property
    def runs(self) -> pd.DataFrame:
        """One row a finished run: dataset, network, method, seed, split, run."""
        columns = ["dataset", "network", "method", "seed", "split", "run"]
        return self.results[columns].drop_duplicates().reset_index(drop=True)

    @property
    def expected(self) -> int | None:
        """How many runs the study asks for; None where study.yaml is missing or not valid."""
        try:
            return sum(1 for _ in spots(StudySpec.model_validate(self.settings)))
        except ValidationError:
            return None

    def of(self, pair: Pair, metric: str = "dice") -> pd.DataFrame:
        """Return the rows of one data set, network and score."""
        r = self.results
        return r[(r["dataset"] == pair[0]) & (r["network"] == pair[1]) & (r["metric"] == metric)]

    def scores(self, pair: Pair, metric: str = "dice") -> pd.DataFrame:
        """Return method, seed, group, value: a patient's mean over cases, then over classes."""
        return group_scores(self.of(pair, metric), ["method", "seed"]).reset_index()

    def ordered(self, table: pd.DataFrame) -> pd.DataFrame:
        """Return the rows of a table in the order of scores, data sets, networks and methods."""
        orders = {
            "metric": self.metrics,
            "dataset": tuple(dict.fromkeys(self.results["dataset"])),
            "network": tuple(dict.fromkeys(self.results["network"])),
            "method": self.methods,
        }
        keys = [key for key in orders if key in table]
        places = table[keys].apply(lambda c: c.map({v: i for i, v in enumerate(orders[c.name])}))
        return table.loc[places.sort_values(keys, kind="stable").index].reset_index(drop=True)

    def file(self, run: str, name: str) -> Any:
        """Return a JSON or YAML file of a run; None where it is missing or damaged."""
        path = self.path / run / name
        try:
            if path.suffix == ".json":
                return read_json(path)
            return yaml.safe_load(path.read_text(encoding="utf-8"))
        except (MedsegError, OSError, ValueError, yaml.YAMLError):
            return None


def _settings(path: Path) -> tuple[dict[str, Any], str]:
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except FileNotFoundError:
        return {}, ""
    except (ValueError, yaml.YAMLError) as error:
        raise MedsegError(f"{path}: is not valid YAML ({error}).") from None
    if not isinstance(content, dict):
        raise MedsegError(f"{path}: holds no study, but {type(content).__name__}.")
    return content, text


def _read(path: Path, columns: Sequence[str], numbers: Sequence[str]) -> pd.DataFrame:
    # As text first: a method may be called None, a case 007.
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (ValueError, OSError) as error:
        raise MedsegError(f"{path}: cannot be read ({error}).") from None
    if missing := [name for name in columns if name not in table]:
        raise MedsegError(
            f"{path}: has no column {', '.join(missing)}; it needs {', '.join(columns)}. Make it "
            "again with `python -m medseg_reg.study --config FILE --only results`."
        )
    for name in numbers:
        try:
            table[name] = pd.to_numeric(table[name].replace("", None))
        except (ValueError, TypeError) as error:
            raise MedsegError(f"{path}: column {name}: {error}.") from None
    return table

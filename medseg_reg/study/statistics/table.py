"""The results of a study as arrays: one block a data set and network, checked for fairness."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from medseg_reg.errors import MedsegError, nearest

Array = npt.NDArray[np.float64]
Missing = Literal["leave_out", "refuse"]

COLUMNS = ("dataset", "network", "method", "seed", "split", "case", "group", "class")

# What is better. Volume differences are signed; their absolute value is judged. The last two are
# no scores: less is less co-adapted, and less over-fitted.
METRICS: dict[str, Literal["more", "less"]] = {
    **dict.fromkeys(("dice", "iou", "precision", "recall", "surface_dice"), "more"),
    **dict.fromkeys(("hd95", "assd", "ece", "volume_difference", "volume_difference_ml"), "less"),
    **dict.fromkeys(("coadaptation_loss", "channel_correlation", "train_val_gap"), "less"),
}
# What a score cannot leave.
_BOUNDS = {
    **dict.fromkeys(("dice", "iou", "precision", "recall", "surface_dice", "ece"), (0.0, 1.0)),
    **dict.fromkeys(("hd95", "assd", "volume_difference", "volume_difference_ml"), (0.0, math.inf)),
    "coadaptation_loss": (-1.0, 1.0),
    "channel_correlation": (0.0, 1.0),
    "train_val_gap": (-1.0, 1.0),
}
_ABSOLUTE = ("volume_difference", "volume_difference_ml")


@dataclass(frozen=True, eq=False)
class Block:
    """All runs of one data set and network, case by case.

    Attributes:
        dataset: name.
        network: name.
        methods: names, sorted.
        seeds: of the runs, the same for each method; where cases are tested by several splits of
            a seed, pairs of seed and split, because each is a training of its own.
        groups: patients or videos, sorted.
        values: (methods, seeds, items), an item being a case and class; NaN where undefined or
            not tested by a split.
        cells: the cell of each item: a group's number times the classes, plus the class's.
        classes: number of classes.
        where: "DATASET, NETWORK", for messages.
    """

    dataset: str
    network: str
    methods: tuple[str, ...]
    seeds: tuple[Any, ...]
    groups: tuple[str, ...]
    values: Array
    cells: npt.NDArray[np.intp]
    classes: int

    @property
    def where(self) -> str:
        """Data set and network."""
        return f"{self.dataset}, {self.network}"

    def of(self, method: str) -> Array:
        """Return the values (seeds, items) of a method."""
        found: Array = self.values[self.methods.index(method)]
        return found

    def scores(self, values: Array) -> Array:
        """Return group scores (..., groups) of item values (..., items).

        The mean over a group's cases in each class, then over classes, as in the evaluation of a
        run. NaN is left out of means; a group without any value is NaN.
        """
        shape, groups = values.shape[:-1], len(self.groups)
        known = ~np.isnan(values)
        member = np.zeros((len(self.cells), groups * self.classes))
        member[np.arange(len(self.cells)), self.cells] = 1
        sums, counts = np.where(known, values, 0) @ member, known.astype(float) @ member
        means = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
        return nan_mean(means.reshape(*shape, groups, self.classes), axis=-1)


def group_scores(rows: pd.DataFrame, keys: list[str]) -> pd.Series:
    """Return the score of each group within `keys`, as `Block.scores` has it.

    Args:
        rows: of one metric, or with `metric` among the keys.
        keys: columns beside the group; with `seed` among them one score a seed.
    """
    classes = rows.groupby([*keys, "group", "class"], sort=False)["value"].mean()
    found: pd.Series = classes.groupby([*keys, "group"], sort=False).mean()
    return found


def nan_mean(values: Array, axis: int) -> Array:
    """Return means without NaN; NaN, without a warning, where nothing is left.

    >>> nan_mean(np.array([[1.0, np.nan, 3.0], [np.nan, np.nan, np.nan]]), axis=1)
    array([ 2., nan])
    """
    known = ~np.isnan(values)
    total, count = np.where(known, values, 0).sum(axis), known.sum(axis)
    found: Array = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return found


def blocks(
    results: pd.DataFrame, metric: str, missing: Missing = "leave_out"
) -> tuple[list[Block], list[str]]:
    """Return the blocks of a metric, and notes on what they leave out.

    Args:
        results: tidy, one row a run, case, class and metric, as in results.csv.
        metric: one of `METRICS`.
        missing: what to do with empty values: `leave_out`, which is noted, or `refuse`.

    Raises:
        MedsegError: unknown metric; missing columns; doubled rows; methods with different splits,
            seeds, cases or classes; fewer than two groups; infinities.
    """
    rows = _rows_of(results, metric)
    found, notes = [], []
    for (dataset, network), part in rows.groupby(["dataset", "network"], sort=True):
        block = _block(str(dataset), str(network), part)
        empty = int(part["value"].isna().sum())
        if empty:
            said = f"{block.where}: {empty} of {len(part)} values of {metric} are missing"
            if missing == "refuse":
                raise MedsegError(
                    f"{said}. Choose a policy of the evaluation that gives each case a score "
                    "(evaluation.empty, evaluation.missing), or missing='leave_out'."
                )
            notes.append(f"{said}, and left out.")
        found.append(block)
    return found, notes


def balanced(results: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Keep the seeds that all methods of a data set and network have, and name the others.

    For a study in which runs failed: the other functions refuse unequal seeds. Where a seed has
    several splits, each is kept or left out by itself.

    Returns:
        The rows kept, and one sentence for each data set and network that lost some.

    Raises:
        MedsegError: a column is missing, or no seed is common.
    """
    _require_columns(results, ("dataset", "network", "method", "seed", "split"))
    keep, notes = [], []
    for (dataset, network), part in results.groupby(["dataset", "network"], sort=True):
        trainings = pd.Series(_trainings(part), index=part.index)
        have = {str(m): set(some) for m, some in trainings.groupby(part["method"], sort=True)}
        common = set.intersection(*have.values())
        if not common:
            raise MedsegError(
                f"results: {dataset}, {network}: no seed is common to all methods "
                f"({_listed(have)}). Run the missing ones, or leave a method out."
            )
        keep.append(part[trainings.isin(common)])
        gone = {m: seeds - common for m, seeds in have.items() if seeds - common}
        if gone:
            notes.append(
                f"{dataset}, {network}: left out, because not every method has these seeds: "
                f"{_listed(gone)}."
            )
    return pd.concat(keep).sort_index(), notes


def lower_is_better(metric: str) -> bool:
    """Whether less of a metric is better."""
    return METRICS.get(metric) == "less"


def bounds_of(metric: str) -> tuple[float, float]:
    """Return what the mean of a metric cannot leave."""
    return _BOUNDS[metric]


def require_baseline(block: Block, baseline: str) -> None:
    """Refuse a block without the baseline."""
    if baseline not in block.methods:
        raise MedsegError(
            f"results: {block.where}: has no method '{baseline}' to compare with; methods are "
            f"{', '.join(block.methods)}.{nearest(baseline, block.methods)}"
        )


def require_fraction(name: str, value: float) -> None:
    """Refuse what is not between 0 and 1."""
    if not 0 < value < 1:
        raise ValueError(f"{name} is {value}, expected a number between 0 and 1")


def _rows_of(results: pd.DataFrame, metric: str) -> pd.DataFrame:
    _require_columns(results, (*COLUMNS, "metric", "value"))
    if metric not in METRICS:
        raise MedsegError(
            f"metric '{metric}': is not known.{nearest(metric, METRICS)} Known: "
            f"{', '.join(METRICS)}."
        )
    rows = results[results["metric"] == metric]
    if rows.empty:
        held = ", ".join(sorted(map(str, results["metric"].unique()))) or "none"
        raise MedsegError(
            f"results: hold no metric '{metric}', but {held}. Evaluate the runs with it "
            "(evaluation.metrics)."
        )
    if np.isinf(values := rows["value"].to_numpy(dtype=float)).any():
        raise MedsegError(f"results: {int(np.isinf(values).sum())} values of {metric} are infinite")
    if metric in _ABSOLUTE:
        rows = rows.assign(value=rows["value"].abs())
    return rows


def _require_columns(results: pd.DataFrame, wanted: tuple[str, ...]) -> None:
    if lacking := [name for name in wanted if name not in results]:
        raise MedsegError(
            f"results: lack the columns {', '.join(lacking)}; found {', '.join(map(str, results))}."
        )
    names = [name for name in wanted if name != "value"]
    if (holes := results[names].isna().any()).any():
        raise MedsegError(
            f"results: the column '{holes.idxmax()}' has empty fields; only 'value' may have some. "
            "The file was changed; gather the results of the study again."
        )


def _block(dataset: str, network: str, rows: pd.DataFrame) -> Block:
    where = f"results: {dataset}, {network}"
    keys = ["method", "seed", "split", "case", "class"]
    if (doubled := rows.duplicated(keys)).any():
        shown = ", ".join(str(rows.loc[doubled, key].iloc[0]) for key in keys)
        raise MedsegError(f"{where}: two rows for ({shown}). Gather the results anew.")
    _require_equal_splits(where, rows)
    _require_equal_cases(where, rows)
    members = rows.drop_duplicates(["case", "group"])
    if (several := members.duplicated("case")).any():
        name = members.loc[several, "case"].iloc[0]
        raise MedsegError(f"{where}: case '{name}' is in two groups. Its rows were changed.")
    # Folds of a seed test each case once; of other splits each is a training of its own.
    if rows.duplicated(["method", "seed", "case", "class"]).any():
        rows = rows.assign(seed=_trainings(rows))
    wide = rows.pivot(index=["method", "seed"], columns=["case", "class"], values="value")
    wide = wide.sort_index(axis=0).sort_index(axis=1)
    methods, seeds = (tuple(wide.index.unique(level)) for level in ("method", "seed"))
    group_of = dict(zip(members["case"], members["group"].astype(str), strict=True))
    groups = sorted(set(group_of.values()))
    if len(groups) < 2:
        raise MedsegError(
            f"{where}: only one group (patient or video), '{groups[0]}', was tested: nothing can "
            "be said of others. Put more into the test part of the split."
        )
    classes = list(wide.columns.unique("class"))
    cells = [
        groups.index(group_of[case]) * len(classes) + classes.index(name)
        for case, name in wide.columns
    ]
    values = wide.to_numpy(dtype=float).reshape(len(methods), len(seeds), -1)
    names = tuple(map(str, methods))
    return Block(
        dataset, network, names, seeds, tuple(groups), values, np.array(cells), len(classes)
    )


def _trainings(rows: pd.DataFrame) -> list[str]:
    """Name the training of each row: the seed, and the split where the seed has several."""
    several = rows.groupby("seed")["split"].transform("nunique") > 1
    return [
        f"{seed} ({split[:8]})" if more else str(seed)
        for seed, split, more in zip(rows["seed"], rows["split"].astype(str), several, strict=True)
    ]


def _require_equal_splits(where: str, rows: pd.DataFrame) -> None:
    """Refuse methods that were trained and tested on other cases; seeds may differ in split."""
    for seed, part in rows.groupby("seed", sort=True):
        have = {str(m): set(r["split"]) for m, r in part.groupby("method", sort=True)}
        if len({frozenset(one) for one in have.values()}) > 1:
            raise MedsegError(
                f"{where}: seed {seed}: methods were computed on different splits "
                f"({_listed(have)}), so their scores cannot be compared. Give all runs one "
                "splits.json; of a study that is not finished keep what all methods have by "
                "`balanced`."
            )


def _require_equal_cases(where: str, rows: pd.DataFrame) -> None:
    """Refuse methods with other seeds, and runs of one split with other cases or classes."""
    seeds = {str(m): set(part["seed"]) for m, part in rows.groupby("method", sort=True)}
    if len({frozenset(one) for one in seeds.values()}) > 1:
        raise MedsegError(
            f"{where}: methods have different seeds ({_listed(seeds)}). Run the missing ones, or "
            "keep what all have by `balanced`, which says what it leaves out."
        )
    for _, same in rows.groupby("split", sort=True):
        runs = {key: _items(part) for key, part in same.groupby(["method", "seed"], sort=True)}
        (first, wanted), *others = runs.items()
        for key, items in others:
            if odd := sorted(items ^ wanted):
                case, name = odd[0]
                (lacks, has) = (key, first) if odd[0] in wanted else (first, key)
                raise MedsegError(
                    f"{where}: runs have different cases: {_run(lacks)} lacks case '{case}' in "
                    f"class '{name}', which {_run(has)} has ({len(odd)} such). Evaluate the same "
                    "part of the same split in all runs."
                )


def _items(rows: pd.DataFrame) -> set[tuple[str, str]]:
    return set(zip(rows["case"].astype(str), rows["class"].astype(str), strict=True))


def _run(key: Hashable) -> str:
    method, seed = key if isinstance(key, tuple) else (key, "?")
    return f"'{method}' seed {seed}"


def _listed(sets: dict[str, set[Any]]) -> str:
    def lines() -> Iterator[str]:
        for name, some in sets.items():
            yield f"{name}: {', '.join(str(one)[:12] for one in sorted(some)) or 'none'}"

    return "; ".join(lines())

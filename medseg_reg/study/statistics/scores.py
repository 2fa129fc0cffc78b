"""The scores of methods as arrays of groups and seeds, checked to be comparable."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

Array = np.ndarray[Any, np.dtype[np.float64]]

# Metrics of which less is better, and signed ones of which the size counts.
LOWER = frozenset({"hd95", "assd", "ece", "volume_difference", "volume_difference_ml"})
SIGNED = frozenset({"volume_difference", "volume_difference_ml"})

COLUMNS = ("dataset", "network", "method", "seed", "split", "group", "metric", "value")


@dataclass(frozen=True)
class Scores:
    """Scores of several methods on one data set with one network.

    Attributes:
        dataset: name of the data set.
        network: name of the network.
        methods: names of the methods.
        groups: names of the patients or videos.
        seeds: the seeds.
        values: (methods, groups, seeds); NaN where there is none.
    """

    dataset: str
    network: str
    methods: tuple[str, ...]
    groups: tuple[str, ...]
    seeds: tuple[int, ...]
    values: Array

    def of(self, method: str) -> Array:
        """Return the scores (groups, seeds) of a method."""
        found: Array = self.values[self.methods.index(method)]
        return found


def lower_is_better(metric: str) -> bool:
    """Whether less of a metric is better."""
    return metric in LOWER


def scores_of(results: pd.DataFrame, metric: str) -> Iterator[Scores]:
    """Yield the scores of each data set and network.

    The score of a group (patient or video) with a seed is the mean over its classes, cases and
    splits. Of the volume difference the absolute value is taken first.

    Args:
        results: one row a run, case, class and metric, as in `results.csv`.
        metric: name of the metric.

    Raises:
        ValueError: a column is missing, the metric is unknown, or the methods of a data set and
            network have not the same splits, groups and seeds.
    """
    if missing := [name for name in COLUMNS if name not in results]:
        raise ValueError(f"the results have no column {', '.join(missing)}")
    rows = results[results["metric"] == metric]
    if rows.empty:
        known = ", ".join(sorted(map(str, results["metric"].unique()))) or "none"
        raise ValueError(f"the results have no metric '{metric}'; there is {known}")
    for (dataset, network), part in rows.groupby(["dataset", "network"], sort=False):
        where = f"{dataset}, {network}"
        methods = tuple(map(str, part["method"].unique()))
        for column in ("split", "seed", "group"):
            _require_same(part, methods, column, where)
        values = part["value"].astype(float)
        part = part.assign(value=values.abs() if metric in SIGNED else values)
        table = part.pivot_table(
            index=["method", "group"], columns="seed", values="value", aggfunc="mean", dropna=False
        )
        groups = tuple(map(str, part["group"].drop_duplicates().sort_values()))
        seeds = tuple(int(seed) for seed in sorted(part["seed"].unique()))
        table.index = table.index.set_levels(table.index.levels[1].map(str), level=1)
        index = pd.MultiIndex.from_product([methods, groups])
        array = table.reindex(index=index, columns=list(seeds)).to_numpy(dtype=np.float64)
        shape = (len(methods), len(groups), len(seeds))
        yield Scores(str(dataset), str(network), methods, groups, seeds, array.reshape(shape))


def balanced(results: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Return the rows of the seeds that every method has, and words for what is left out.

    A study in which a run failed has methods with fewer seeds. A seed that one method of a data set
    and network lacks is taken from all of them, so that pairs stay pairs.

    >>> rows = [("a", "u", m, s) for m, s in (("x", 0), ("x", 1), ("y", 0))]
    >>> table = pd.DataFrame(rows, columns=["dataset", "network", "method", "seed"])
    >>> kept, left_out = balanced(table)
    >>> len(kept), left_out
    (2, ['a, u: seed 1 is left out, because y has no run with it'])
    """
    kept, notes = [], []
    for (dataset, network), part in results.groupby(["dataset", "network"], sort=False):
        have = {str(name): set(rows["seed"]) for name, rows in part.groupby("method", sort=False)}
        for seed in sorted(set().union(*have.values())):
            if lacking := [name for name, seeds in have.items() if seed not in seeds]:
                verb = "has" if len(lacking) == 1 else "have"
                notes.append(
                    f"{dataset}, {network}: seed {seed} is left out, because "
                    f"{', '.join(lacking)} {verb} no run with it"
                )
        kept.append(part[part["seed"].isin(set.intersection(*have.values()))])
    return (pd.concat(kept) if kept else results), notes


def _require_same(part: pd.DataFrame, methods: tuple[str, ...], column: str, where: str) -> None:
    found = {name: set(part.loc[part["method"] == name, column]) for name in methods}
    first, *others = methods
    for other in others:
        if found[other] != found[first]:
            only = sorted(map(str, found[first] ^ found[other]))
            shown = ", ".join(only[:3]) + (", ..." if len(only) > 3 else "")
            raise ValueError(
                f"{where}: the methods '{first}' and '{other}' have not the same {column}s "
                f"({shown} of one alone), so they cannot be compared in pairs. Run what is "
                "missing" + (", or leave it out with `balanced`." if column == "seed" else ".")
            )

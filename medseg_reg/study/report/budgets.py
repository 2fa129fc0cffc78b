"""How long the runs were trained, and by which rules: unequal budgets are told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from medseg_reg.study.report.source import Source

# What decides how much a network sees, and which of its epochs is kept.
KEYS = (
    *("training.epochs", "training.accumulate", "training.validate_every"),
    *("data.batch_size", "data.sampling"),
    *("regularization.optimization.early_stopping", "regularization.optimization.select"),
)


def unequal_budgets(source: Source) -> Iterator[str]:
    """Say for each data set and network in what the budgets of its runs differ.

    Both are looked at: the resolved configuration of each run, because a method may stop early or
    keep another epoch than its rivals, and the epochs that metrics.csv has, because rules that are
    equal may end trainings at unequal times.
    """
    for (dataset, network), runs in source.runs.groupby(["dataset", "network"], sort=False):
        pairs = [(str(row.method), str(row.run)) for row in runs.itertuples()]
        rules = list(_rules(source, pairs))
        lengths = _lengths(source, pairs)
        if rules:
            told = [*rules, *([f"epochs that were trained: {lengths}"] if lengths else [])]
            yield (
                f"{dataset}, {network}: the runs had unequal budgets: {'; '.join(told)}. "
                "A difference between them may come from that."
            )
        elif lengths:
            yield (
                f"{dataset}, {network}: by equal rules the trainings ended after unequal numbers "
                f"of epochs: {lengths}."
            )


def epochs_trained(source: Source, run: str) -> int | None:
    """Return how many epochs a run was trained, as metrics.csv has them; None without any."""
    try:
        table = pd.read_csv(source.path / run / "metrics.csv", usecols=["epoch"])
    except (ValueError, OSError):
        return None
    return int(table["epoch"].max()) if len(table) else None


def slices_drawn(source: Source, run: str) -> int | None:
    """Return how many slices a run drew in all its epochs; None where it has not noted that."""
    each = at(source.file(run, "seen.json"), "slices_per_epoch")
    epochs = epochs_trained(source, run)
    return None if epochs is None or each is None else epochs * int(each)


def at(config: Any, key: str) -> Any:
    """Return what nested mappings have at a dotted key, or None.

    >>> at({"training": {"epochs": 3}}, "training.epochs"), at({}, "training.epochs")
    (3, None)
    """
    for name in key.split("."):
        config = config.get(name) if isinstance(config, dict) else None
    return config


def _rules(source: Source, pairs: list[tuple[str, str]]) -> Iterator[str]:
    configs = [(method, source.file(run, "config.yaml")) for method, run in pairs]
    for key in KEYS:
        methods: dict[str, dict[str, None]] = {}
        for method, config in configs:
            if isinstance(config, dict):
                methods.setdefault(_shown(at(config, key)), {})[method] = None
        if len(methods) > 1:
            parts = (f"{value} in {', '.join(have)}" for value, have in methods.items())
            yield f"{key}: {' and '.join(parts)}"


def _lengths(source: Source, pairs: list[tuple[str, str]]) -> str:
    """Return the epochs of each method in words; nothing where all runs have the same."""
    found: dict[str, list[int]] = {}
    for method, run in pairs:
        if (epochs := epochs_trained(source, run)) is not None:
            found.setdefault(method, []).append(epochs)
    if len({one for some in found.values() for one in some}) < 2:
        return ""
    spans = {method: sorted({min(some), max(some)}) for method, some in found.items()}
    return ", ".join(f"{method} {' to '.join(map(str, ends))}" for method, ends in spans.items())


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key} {_shown(one)}" for key, one in value.items() if one is not None)
    return "off" if value is None else str(value)

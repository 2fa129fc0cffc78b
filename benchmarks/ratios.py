"""Medians, spreads and ratios of measured times, and what they were measured on."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

PACKAGES = ("torch", "lightning", "monai", "segmentation-models-pytorch", "albumentations", "numpy")


class Row(NamedTuple):
    """One line of a table.

    Attributes:
        part: what was measured.
        name: which of it.
        against: what its time is divided by.
        ratio: the median time over the median time of `against`; below 1 is faster.
        seconds: the median time; None where the ratio is none of times.
        spread: of its own times, by `spread`; None likewise.
    """

    part: str
    name: str
    against: str
    ratio: float
    seconds: float | None = None
    spread: float | None = None


def spread(values: Sequence[float]) -> float:
    """Return the width of the middle half over the median; of under four values, of all.

    A process that is held up once, by other work, makes one value large and says nothing of the
    rest.

    >>> spread([1.0, 2.0, 3.0]), spread([1.0, 1.0, 1.0, 1.0, 50.0])
    (1.0, 0.0)
    """
    ordered = sorted(values)
    cut = len(ordered) // 4
    return (ordered[-1 - cut] - ordered[cut]) / statistics.median(ordered)


def rows_of(part: str, times: Mapping[str, Sequence[float]], against: str) -> list[Row]:
    """Return a row for each name, that of `against` itself among them: its spread matters too.

    >>> rows_of("copy", {"floor": [1.0, 2.0, 3.0], "ours": [3.0, 4.0, 5.0]}, "floor")[1]
    Row(part='copy', name='ours', against='floor', ratio=2.0, seconds=4.0, spread=0.5)
    """
    middle = {name: statistics.median(values) for name, values in times.items()}
    return [
        Row(part, name, against, middle[name] / middle[against], middle[name], spread(values))
        for name, values in times.items()
    ]


def machine() -> list[str]:
    """Return the machine and the versions, a line each."""
    info = Path("/proc/cpuinfo")
    models = [
        line.split(":", 1)[1].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in PACKAGES)
    return [
        f"processor: {models[0] if models else platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads of torch",
        f"GPU: {gpu}",
        f"{platform.system()}, python {platform.python_version()}, {versions}",
    ]


def load() -> float | None:
    """Return how many processes wanted to compute in the last minute, where the system says it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def markdown(rows: Sequence[Row]) -> str:
    """Return a Markdown table.

    >>> print(markdown([Row("step", "with", "without", 2.0, 0.004, 0.1)]).splitlines()[-1])
    | step | with | without | 2 | 4 | 10% |
    """
    heads = ("part", "what", "over that of", "ratio", "median, ms", "spread")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        took = "-" if row.seconds is None else f"{1e3 * row.seconds:.3g}"
        wide = "-" if row.spread is None else f"{row.spread:.0%}"
        lines.append(
            f"| {row.part} | {row.name} | {row.against} | {row.ratio:.3g} | {took} | {wide} |"
        )
    return "\n".join(lines)

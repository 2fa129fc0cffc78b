"""Results of studies that were never run, with a truth that is known."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pandas as pd

COLUMNS = [
    *("dataset", "network", "method", "seed", "split", "run"),
    *("case", "group", "class", "metric", "value"),
]


def results(
    value: Callable[[str, int, int], float],
    methods: tuple[str, ...] = ("none", "dropout"),
    seeds: int = 3,
    groups: int = 8,
    *,
    metric: str = "dice",
    network: str = "unet",
    cases: int = 1,
    classes: tuple[str, ...] = ("organ",),
) -> pd.DataFrame:
    """Return results whose value is a function of method, seed and the number of the group."""
    rows = [
        (
            *("demo", network, method, seed, "5f", f"runs/{method}/seed{seed}"),
            *(f"c{group:02d}.{case}", f"p{group:02d}", name, metric, value(method, seed, group)),
        )
        for method, seed, group, case, name in product(
            methods, range(seeds), range(groups), range(cases), classes
        )
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def noisy(
    gains: dict[str, float],
    seeds: int = 3,
    groups: int = 8,
    spread: tuple[float, float, float] = (0.02, 0.01, 0.02),
    rng: int = 0,
    **more: object,
) -> pd.DataFrame:
    """Return results with a gain for each method and random spread of groups, seeds and the rest.

    The first method has no spread of its own, so that `spread` is that of the differences.
    """
    draw = np.random.default_rng(rng)
    patients = draw.normal(0.75, 0.05, groups)
    scores = {}
    for number, (method, gain) in enumerate(gains.items()):
        own = (
            spread[0] * draw.standard_normal(groups)
            + spread[1] * draw.standard_normal((seeds, 1))
            + spread[2] * draw.standard_normal((seeds, groups))
        )
        scores[method] = patients + gain + own * (number > 0)
    return results(
        lambda method, seed, group: scores[method][seed, group] if scores[method].ndim == 2
        else scores[method][group],
        tuple(gains), seeds, groups, **more,  # type: ignore[arg-type]
    )  # fmt: skip

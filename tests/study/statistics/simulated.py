"""Results of made-up methods whose true differences are known."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd


def simulated(
    effects: Mapping[str, float],
    groups: int = 12,
    seeds: int = 8,
    *,
    spread: tuple[float, float, float] = (0.01, 0.005, 0.01),
    seed: int = 0,
) -> pd.DataFrame:
    """Return results as a study writes them.

    Args:
        effects: what is added to the score of each method.
        groups: number of patients, a case each.
        seeds: number of seeds.
        spread: standard deviations, for each method, between patients, between seeds, and left.
        seed: of the scores.
    """
    draw = np.random.default_rng(seed)
    hard = draw.normal(0.75, 0.08, (groups, 1))  # the same patients for all
    tables = []
    for method, effect in effects.items():
        own = draw.normal(0, spread[0], (groups, 1)) + draw.normal(0, spread[1], (1, seeds))
        scores = hard + effect + own + draw.normal(0, spread[2], (groups, seeds))
        rows = pd.DataFrame(scores).stack().rename("value").reset_index()
        rows.columns = ["number", "seed", "value"]
        rows["group"] = "p" + rows.pop("number").astype(str).str.zfill(3)
        tables.append(rows.assign(method=method, case=rows["group"]))
    return pd.concat(tables, ignore_index=True).assign(
        dataset="made", network="unet", split="abc", run="", metric="dice", **{"class": "organ"}
    )

"""The figure of searches side by side: the best reward so far against the number of trials."""

from __future__ import annotations

import matplotlib
import pandas as pd
from matplotlib import pyplot
from matplotlib.ticker import MaxNLocator

from medseg_reg.study.report.drawing import GRID, RC, WIDTH, Figure, finish, styles

WORDS = {"controller": "controller", "random": "random search", "evolution": "evolution"}


def best_so_far(table: pd.DataFrame, monitor: str) -> Figure:
    """Draw searches: a step for each sampler seed, its trials as points.

    Args:
        table: columns `method`, `sampler_seed`, `trial`, `reward` and `best`.
        monitor: what the reward is.
    """
    methods = list(dict.fromkeys(table["method"]))
    looks = styles(methods, "random" if "random" in methods else "")
    parts = []
    with matplotlib.rc_context(RC):
        figure, axes = pyplot.subplots(figsize=(1.4 * WIDTH, 0.8 * WIDTH), layout="constrained")
        for rank, method in enumerate(methods):
            # Narrower lines lie on wider ones, so that none hides another that goes the same way.
            width = 1.6 + 1.4 * (len(methods) - 1 - rank)
            look, of_method = looks[method], table[table["method"] == method]
            for number, (_, rows) in enumerate(of_method.groupby("sampler_seed")):
                label = WORDS.get(method, method) if number == 0 else None
                at = rows["trial"] + 1
                axes.plot(at, rows["reward"], look.marker, color=look.colour, ms=3, alpha=0.4)
                axes.step(at, rows["best"], where="post", color=look.colour, lw=width, label=label)
            ends = of_method.groupby("sampler_seed")["best"].last()
            parts.append(f"{WORDS.get(method, method)} {', '.join(f'{end:.4f}' for end in ends)}")
        axes.set_xlabel("trials")
        axes.set_ylabel(f"{monitor}: trials, and the best so far")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color=GRID)
        axes.legend()
        alt = f"Best {monitor} at the end of each search: {'; '.join(parts)}."
        caption = "Trials of searches with equal budgets, and the best of each so far."
        return finish("best_so_far", figure, caption, alt, table)

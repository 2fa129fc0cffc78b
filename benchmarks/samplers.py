"""Controller, random search and evolution on made rewards, over many seeds of the samplers.

    python benchmarks/samplers.py                     # the table; a minute
    python benchmarks/samplers.py --figure docs/samplers.png

Trainings are too dear to repeat a search often enough that three samplers could be told apart.
Here the reward of a pattern is made: 0.8 at the best one, less 0.025 for each of its eight tokens
that is another, less 0.1 where of its first two only one is right, plus noise of 0.01, as DICE has
between seeds. The space is that of `configs/searches/autodropout_hippocampus.yaml` in size, 13824
patterns, and which is the best changes with the seed. It says how fast the samplers are where there
is something to find, nothing about dropout.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from medseg_reg.study.samplers import SAMPLERS, SamplerName, make_sampler

CHOICES = (4, 4, 3, 4, 4, 3, 3, 2)
BUDGETS, TOGETHER, SEEDS, NOISE = (16, 48, 200), 4, 20, 0.01


class Course(NamedTuple):
    """Rewards without noise over a search, each the mean over the seeds.

    Attributes:
        each: of every trial.
        found: of the trial that has had the best noisy reward so far.
    """

    each: np.ndarray
    found: np.ndarray


def reward(tokens: Sequence[int], best: Sequence[int]) -> float:
    """Return the reward of a pattern without noise."""
    wrong = [one != other for one, other in zip(tokens, best, strict=True)]
    return 0.8 - 0.025 * sum(wrong) - 0.1 * (wrong[0] != wrong[1])


def course(name: SamplerName, trials: int, seeds: int = SEEDS) -> Course:
    """Search with each seed, and return what was drawn and found."""
    each, found = np.empty((seeds, trials)), np.empty((seeds, trials))
    for seed in range(seeds):
        rng = np.random.default_rng([seed, 1])
        best, noise = rng.integers(CHOICES), NOISE * rng.normal(size=trials)
        sampler, told = make_sampler(name, CHOICES, seed), np.empty(0)
        while len(told) < trials:
            asked = sampler.ask(min(TOGETHER, trials - len(told)))
            clean = [reward(tokens, best.tolist()) for tokens in asked]
            at = slice(len(told), len(told) + len(asked))
            each[seed, at] = clean
            noisy = clean + noise[at]
            sampler.tell(asked, noisy.tolist())
            told = np.concatenate([told, noisy])
        leaders = [int(told[: n + 1].argmax()) for n in range(trials)]
        found[seed] = each[seed, leaders]
    return Course(each.mean(0), found.mean(0))


def table(courses: dict[str, Course], budgets: Sequence[int] = BUDGETS) -> str:
    """Return, for each budget, the mean of the last quarter and what was found."""
    lines = ["sampler     trials  last quarter  found"]
    for name, one in courses.items():
        for budget in budgets:
            last = one.each[budget - max(1, budget // 4) : budget].mean()
            lines.append(f"{name:<10}  {budget:<6}  {last:.3f}         {one.found[budget - 1]:.3f}")
    return "\n".join(lines)


def figure(courses: dict[str, Course], path: Path) -> None:
    """Draw what was found against the number of trials."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    drawn, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    for name, one in courses.items():
        axes.plot(np.arange(1, len(one.found) + 1), one.found, label=name)
    axes.set(xlabel="trials", ylabel="reward of the best so far", xscale="log")
    axes.legend(fontsize=8)
    drawn.savefig(path, dpi=80)


def main(arguments: Sequence[str]) -> None:
    """Print the table, and draw the figure if a path is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--figure", type=Path, help="where to draw the courses")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    courses: dict[str, Course] = {name: course(name, max(BUDGETS)) for name in SAMPLERS}
    print(table(courses))
    if options.figure is not None:
        figure(courses, options.figure)


if __name__ == "__main__":
    main(sys.argv[1:])

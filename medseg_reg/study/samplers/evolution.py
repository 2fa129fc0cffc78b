"""Regularized evolution: the best of a small sample has the next child, and the oldest dies."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np

from medseg_reg.study.samplers.random_search import draw
from medseg_reg.study.samplers.settings import EvolutionSpec


class Evolution:
    """Aging evolution over sequences of choices.

    The first `population` sequences are random. Then, for each child, `sample` members of the
    population are drawn with replacement, the one of highest reward is the parent, and the child
    is the parent with one token changed to another value, both uniform. A child that was
    evaluated joins the population, and the **oldest** member leaves it, however good.

    Children of one round have parents from one and the same population, as they have where
    machines work side by side. A failure (NaN) never joins. The paper's identity mutation is left
    out: with the seeds of a search, a training of the same sequence gives the same score again.

    Args:
        choices: how many values each parameter has.
        seed: of the draws.
        settings: sizes of population and sample.

    Paper:
        E. Real, A. Aggarwal, Y. Huang, Q. V. Le, "Regularized Evolution for Image Classifier
        Architecture Search", AAAI 2019, 33(1):4780-4789, doi:10.1609/aaai.v33i01.33014780,
        algorithm 1.

    Example:
        >>> search = Evolution([3, 3], seed=0, settings=EvolutionSpec(population=2, sample=2))
        >>> search.tell([(0, 0), (2, 2)], [0.1, 0.9])
        >>> sum(token != 2 for token in search.child())  # one token of the better
        1
    """

    def __init__(
        self, choices: Sequence[int], seed: int = 0, settings: EvolutionSpec | None = None
    ) -> None:
        self.choices, self.settings = tuple(choices), settings or EvolutionSpec()
        self.population: deque[tuple[tuple[int, ...], float]] = deque(
            maxlen=self.settings.population
        )
        self._rng = np.random.default_rng(seed)
        self._begun = 0

    def ask(self, count: int) -> list[tuple[int, ...]]:
        """Return random sequences for the first population, then children."""
        asked = []
        for _ in range(count):
            first = self._begun < self.settings.population or not self.population
            asked.append(draw(self.choices, self._rng) if first else self.child())
            self._begun += 1
        return asked

    def tell(self, asked: Sequence[tuple[int, ...]], rewards: Sequence[float]) -> None:
        """Add what did not fail to the population; as many of the oldest leave it."""
        self.population.extend(
            (tokens, reward)
            for tokens, reward in zip(asked, rewards, strict=True)
            if not math.isnan(reward)
        )

    def child(self) -> tuple[int, ...]:
        """Return the best of a sample of the population, with one token changed."""
        places = self._rng.integers(len(self.population), size=self.settings.sample)
        parent, _ = max((self.population[i] for i in places), key=lambda one: one[1])
        changeable = [i for i, size in enumerate(self.choices) if size > 1]
        if not changeable:
            return parent
        place = int(self._rng.choice(changeable))
        # one of the other values: those from the parent's on move up by one
        token = int(self._rng.integers(self.choices[place] - 1))
        token += token >= parent[place]
        return (*parent[:place], token, *parent[place + 1 :])

"""Random search: the control that every search has to beat."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class RandomSearch:
    """Draws every token uniformly and independently, whatever the rewards.

    A sequence may come again.

    Args:
        choices: how many values each parameter has.
        seed: of the draws.

    Paper:
        J. Bergstra, Y. Bengio, "Random Search for Hyper-Parameter Optimization", JMLR 2012,
        13:281-305.
    """

    def __init__(self, choices: Sequence[int], seed: int = 0) -> None:
        self.choices = tuple(choices)
        self._rng = np.random.default_rng(seed)

    def ask(self, count: int) -> list[tuple[int, ...]]:
        """Draw so many sequences."""
        return [draw(self.choices, self._rng) for _ in range(count)]

    def tell(self, asked: Sequence[tuple[int, ...]], rewards: Sequence[float]) -> None:
        """Learn nothing."""


def draw(choices: Sequence[int], rng: np.random.Generator) -> tuple[int, ...]:
    """Return a sequence, uniform over all."""
    return tuple(int(token) for token in rng.integers(choices))

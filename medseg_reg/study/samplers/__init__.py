"""Samplers of a search over lists: each proposes sequences of choices and is told their rewards.

A sequence has one token for each parameter, the place of its value in the list. What a sampler
proposes depends on its seed and on what it was told, so a search that goes on is told the rewards
of its finished trials again and makes the same proposals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias

from medseg_reg.study.samplers.evolution import Evolution
from medseg_reg.study.samplers.random_search import RandomSearch
from medseg_reg.study.samplers.settings import ControllerSpec, EvolutionSpec

__all__ = [
    "SAMPLERS",
    "ControllerSpec",
    "Evolution",
    "EvolutionSpec",
    "RandomSearch",
    "Sampler",
    "SamplerName",
    "Tokens",
    "make_sampler",
]

Tokens: TypeAlias = tuple[int, ...]
SamplerName = Literal["controller", "random", "evolution"]
SAMPLERS: tuple[SamplerName, ...] = ("controller", "random", "evolution")


class Sampler(Protocol):
    """Something that proposes, and learns from what its proposals were worth."""

    def ask(self, count: int) -> list[Tokens]:
        """Return so many proposals."""

    def tell(self, asked: Sequence[Tokens], rewards: Sequence[float]) -> None:
        """Learn from proposals and their rewards, in the order of `ask`; NaN is a failure."""


def make_sampler(
    name: SamplerName,
    choices: Sequence[int],
    seed: int = 0,
    controller: ControllerSpec | None = None,
    evolution: EvolutionSpec | None = None,
) -> Sampler:
    """Return a sampler.

    Args:
        name: of the sampler.
        choices: how many values each parameter has.
        seed: of its draws.
        controller: settings of the controller.
        evolution: settings of the evolution.

    Raises:
        ValueError: there is no parameter, or one without values.

    >>> make_sampler("random", [2, 3]).ask(3)
    [(1, 1), (1, 0), (0, 0)]
    """
    if not choices or min(choices) < 1:
        raise ValueError(f"each parameter needs at least one value, got {list(choices)} of them")
    if name == "random":
        return RandomSearch(choices, seed)
    if name == "evolution":
        return Evolution(choices, seed, evolution or EvolutionSpec())
    from medseg_reg.study.samplers.controller import ControllerSampler  # loads torch

    return ControllerSampler(choices, seed, controller or ControllerSpec())

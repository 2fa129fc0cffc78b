"""Which slices an epoch shows, and in which order: a pure function of seed and epoch.

Nothing here has state, so an interrupted run goes on with exactly the batches that were left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

Array = np.ndarray[Any, np.dtype[Any]]


class SamplingSpec(BaseModel):
    """Which training slices an epoch shows; validation and test always see all slices.

    Attributes:
        policy: `all` slices; those with `foreground` alone; or `balanced`, where
            `foreground_share` of the samples show foreground.
        foreground_share: share of samples with foreground under `balanced`.
        per_epoch: samples in an epoch; null means as many as there are slices.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: Literal["all", "foreground", "balanced"] = "all"
    foreground_share: float = Field(0.5, gt=0, lt=1)
    per_epoch: int | None = Field(None, ge=1)


class Sample(NamedTuple):
    """One draw: which slice, and the seed of its augmentation."""

    index: int  # type: ignore[assignment]  # hides tuple's method, which nobody asks for here
    seed: int


def epoch_order(
    foreground: Sequence[bool], spec: SamplingSpec, seed: int, epoch: int
) -> list[Sample]:
    """Return the samples of an epoch in order.

    Each slice is drawn once before any is drawn again, in every policy.

    Args:
        foreground: for each slice, whether it shows foreground.
        spec: the policy.
        seed: seed of the run.
        epoch: number of the epoch.

    Raises:
        ValueError: there is no slice, or the policy asks for foreground, or background, and no
            slice has it.
    """
    generator = np.random.default_rng([seed, epoch])
    flags = np.asarray(foreground, dtype=bool)
    with_foreground, without = np.flatnonzero(flags), np.flatnonzero(~flags)
    if not len(flags):
        raise ValueError("there is no training slice")
    if spec.policy != "all" and not len(with_foreground):
        raise ValueError("no training slice has foreground")
    if spec.policy == "all":
        chosen = _draw(np.arange(len(flags)), spec.per_epoch or len(flags), generator)
    elif spec.policy == "foreground":
        count = spec.per_epoch or len(with_foreground)
        chosen = _draw(with_foreground, count, generator)
    else:
        if not len(without):
            raise ValueError("every training slice has foreground; use the policy 'all'")
        count = spec.per_epoch or len(flags)
        share = max(1, round(count * spec.foreground_share))
        chosen = np.concatenate(
            [_draw(with_foreground, share, generator), _draw(without, count - share, generator)]
        )
        chosen = generator.permutation(chosen)
    seeds = generator.integers(0, 2**31, size=len(chosen))
    return [Sample(int(i), int(s)) for i, s in zip(chosen, seeds, strict=True)]


def _draw(pool: Array, count: int, generator: np.random.Generator) -> Array:
    rounds = [generator.permutation(pool) for _ in range(-(-count // len(pool)))]
    return np.concatenate(rounds)[:count] if rounds else pool[:0]


class BatchSampler:
    """The batches of one process in one epoch, from the place where an earlier run stopped.

    An incomplete last batch is left out, unless it is the only one: its few samples would weigh
    more than the others', and batch normalization fails on a batch of one small slice.
    Every epoch draws anew which samples those are.

    Args:
        foreground: for each slice, whether it shows foreground.
        spec: the policy.
        seed: seed of the run.
        batch_size: samples in a batch of one process.
        rank: number of this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        foreground: Sequence[bool],
        spec: SamplingSpec,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.foreground = list(foreground)
        self.spec = spec
        self.seed = seed
        self.batch_size = batch_size
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.start = 0
        self._samples = len(epoch_order(self.foreground, spec, seed, 0))

    def __len__(self) -> int:
        """Return the batches of a whole epoch, also when it starts in the middle."""
        return max(1, self._samples // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[Sample]]:
        order = epoch_order(self.foreground, self.spec, self.seed, self.epoch)
        step = self.batch_size * self.world_size
        while len(order) < self.world_size:
            order = order + order
        for number in range(self.start, len(self)):
            block = order[number * step : (number + 1) * step]
            yield block[self.rank :: self.world_size]

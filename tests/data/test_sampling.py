"""The order of an epoch is a pure function of seed and epoch, shared out and resumed exactly."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from medseg_reg.data.sampling import BatchSampler, Sample, SamplingSpec, epoch_order

both_kinds = st.lists(st.booleans(), min_size=2, max_size=40).filter(
    lambda flags: any(flags) and not all(flags)
)
specs = st.builds(
    SamplingSpec,
    policy=st.sampled_from(["all", "foreground", "balanced"]),
    foreground_share=st.floats(0.05, 0.95),
    per_epoch=st.none() | st.integers(1, 90),
)


def batches_of(sampler: BatchSampler, epoch: int = 0, start: int = 0) -> list[list[Sample]]:
    sampler.epoch, sampler.start = epoch, start
    return list(sampler)


@given(both_kinds, specs, st.integers(0, 2**32 - 1), st.integers(0, 500))
@settings(deadline=None)
def test_each_slice_is_drawn_once_before_any_is_drawn_again(
    flags: list[bool], spec: SamplingSpec, seed: int, epoch: int
) -> None:
    order = epoch_order(flags, spec, seed, epoch)
    counts = Counter(sample.index for sample in order)
    pools = {
        "all": [range(len(flags))],
        "foreground": [np.flatnonzero(flags)],
        "balanced": [np.flatnonzero(flags), np.flatnonzero(~np.array(flags))],
    }[spec.policy]
    for pool in pools:
        drawn = [counts[int(index)] for index in pool]
        assert max(drawn) - min(drawn) <= 1
    assert set(counts) <= {int(index) for pool in pools for index in pool}
    usual = sum(flags) if spec.policy == "foreground" else len(flags)
    assert len(order) == (spec.per_epoch or usual)


def test_many_slices_are_drawn_in_whole_rounds() -> None:
    order = [s.index for s in epoch_order([True] * 7, SamplingSpec(per_epoch=21), 0, 0)]
    for start in (0, 7, 14):
        assert sorted(order[start : start + 7]) == list(range(7))


@given(both_kinds, specs, st.integers(0, 1000), st.integers(0, 100))
@settings(deadline=None)
def test_the_same_seed_and_epoch_give_the_same_samples(
    flags: list[bool], spec: SamplingSpec, seed: int, epoch: int
) -> None:
    assert epoch_order(flags, spec, seed, epoch) == epoch_order(flags, spec, seed, epoch)


def test_every_epoch_and_every_seed_has_its_own_order_and_augmentation() -> None:
    flags = [True] * 30
    orders = [epoch_order(flags, SamplingSpec(), s, e) for s in range(4) for e in range(4)]
    assert len({tuple(sample.index for sample in order) for order in orders}) == 16
    assert len({sample.seed for order in orders for sample in order}) == 16 * 30


@given(both_kinds, st.floats(0.05, 0.95), st.integers(1, 90))
@settings(deadline=None)
def test_the_balanced_share_is_met_to_within_one_sample(
    flags: list[bool], share: float, count: int
) -> None:
    spec = SamplingSpec(policy="balanced", foreground_share=share, per_epoch=count)
    order = epoch_order(flags, spec, 0, 0)
    assert abs(sum(flags[s.index] for s in order) - count * share) < 1


def test_the_balanced_samples_are_mixed() -> None:
    flags = [True] * 50 + [False] * 50
    order = epoch_order(flags, SamplingSpec(policy="balanced"), 0, 0)
    assert 15 < sum(flags[s.index] for s in order[:50]) < 35


@pytest.mark.parametrize(
    ("flags", "policy", "message"),
    [
        ([False, False], "foreground", "no training slice has foreground"),
        ([False, False], "balanced", "no training slice has foreground"),
        ([True, True], "balanced", "every training slice has foreground; use the policy 'all'"),
        ([], "all", "there is no training slice"),
        ([], "foreground", "there is no training slice"),
    ],
)
def test_a_policy_that_the_data_cannot_meet_is_refused(
    flags: list[bool], policy: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        BatchSampler(flags, SamplingSpec(policy=policy), seed=0, batch_size=2)


@pytest.mark.parametrize(
    "arguments",
    [{"policy": "some"}, {"foreground_share": 0}, {"foreground_share": 1}, {"per_epoch": 0}],
)
def test_a_specification_that_cannot_work_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SamplingSpec(**arguments)


@given(both_kinds, specs, st.integers(1, 6), st.integers(1, 4), st.integers(0, 50))
@settings(deadline=None)
def test_the_ranks_share_out_the_batches_of_one_process(
    flags: list[bool], spec: SamplingSpec, batch_size: int, world: int, epoch: int
) -> None:
    order = epoch_order(flags, spec, 3, epoch)
    parts = [
        batches_of(BatchSampler(flags, spec, 3, batch_size, rank, world), epoch)
        for rank in range(world)
    ]
    assert len({len(part) for part in parts}) == 1
    assert all(batch for part in parts for batch in part)
    if len(order) >= batch_size * world:
        shown = [sample for number in zip(*parts, strict=True) for b in number for sample in b]
        whole = len(order) // (batch_size * world) * batch_size * world
        assert sorted(shown) == sorted(order[:whole])
        assert all(len(batch) == batch_size for part in parts for batch in part)
        for number, step in enumerate(zip(*parts, strict=True)):
            block = order[number * batch_size * world :][: batch_size * world]
            assert sorted(s for batch in step for s in batch) == sorted(block)


@given(both_kinds, specs, st.integers(1, 6), st.integers(0, 50), st.data())
@settings(deadline=None)
def test_starting_in_the_middle_gives_exactly_what_was_left(
    flags: list[bool], spec: SamplingSpec, batch_size: int, epoch: int, data: st.DataObject
) -> None:
    sampler = BatchSampler(flags, spec, 1, batch_size)
    whole = batches_of(sampler, epoch)
    assert len(whole) == len(sampler)
    start = data.draw(st.integers(0, len(whole)))
    assert batches_of(sampler, epoch, start) == whole[start:]
    assert len(sampler) == len(whole)


def test_an_incomplete_last_batch_is_left_out_and_others_miss_in_the_next_epoch() -> None:
    sampler = BatchSampler([True] * 10, SamplingSpec(), 0, batch_size=4)
    missing = []
    for epoch in range(6):
        batches = batches_of(sampler, epoch)
        assert [len(batch) for batch in batches] == [4, 4]
        missing.append(frozenset(range(10)) - {s.index for batch in batches for s in batch})
    assert len(set(missing)) > 1


def test_an_only_batch_is_kept_though_incomplete() -> None:
    (batch,) = batches_of(BatchSampler([True] * 3, SamplingSpec(), 0, batch_size=8))
    assert sorted(sample.index for sample in batch) == [0, 1, 2]


def test_fewer_slices_than_processes_are_shown_twice_so_that_none_waits() -> None:
    for rank in range(5):
        (batch,) = batches_of(BatchSampler([True] * 2, SamplingSpec(), 0, 4, rank, 5))
        assert batch

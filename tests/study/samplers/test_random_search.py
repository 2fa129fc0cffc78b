"""Random search is uniform, and what samplers share."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from medseg_reg.study.samplers import SAMPLERS, ControllerSpec, RandomSearch, make_sampler


def test_every_sequence_is_as_likely_whatever_the_rewards():
    choices, count = (2, 3, 4), 24_000
    search, drawn = RandomSearch(choices, seed=0), []
    for _ in range(10):
        asked = search.ask(count // 10)
        search.tell(asked, [float(tokens == (0, 0, 0)) for tokens in asked])
        drawn += asked
    found = Counter(drawn)
    assert set(found) == set(itertools.product(*map(range, choices)))
    distance = sum((seen - 1000) ** 2 / 1000 for seen in found.values())
    assert distance < 49.7  # chi square, 23 degrees of freedom, 0.001


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_that_is_told_the_same_again_proposes_the_same(name):
    def proposals(seed):
        sampler, found = make_sampler(name, (5, 1, 4), seed), []
        for count in (3, 1, 8, 2, 5):
            found.append(sampler.ask(count))
            sampler.tell(found[-1], [0.1 * sum(tokens) for tokens in found[-1]])
        return found

    assert proposals(1) == proposals(1) != proposals(2)
    assert [len(round) for round in proposals(1)] == [3, 1, 8, 2, 5]
    assert all(t < size for one in proposals(1) for tokens in one
               for t, size in zip(tokens, (5, 1, 4), strict=True))  # fmt: skip


@pytest.mark.parametrize("choices", [(), (3, 0)])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_parameter_without_values_is_refused(name, choices):
    with pytest.raises(ValueError, match="needs at least one value"):
        make_sampler(name, choices)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="width 10 is not divisible by 4 heads"):
        ControllerSpec(width=10, heads=4)

"""Regularized evolution: who becomes a parent, how a child differs, and who dies."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from medseg_reg.study.samplers import Evolution, EvolutionSpec


def evolution(choices=(4, 3, 2), population=3, sample=2, seed=0):
    return Evolution(choices, seed, EvolutionSpec(population=population, sample=sample))


def test_the_oldest_leaves_though_it_is_the_best():
    search = evolution()
    members = [(0, 0, 0), (1, 1, 1), (2, 2, 0), (3, 0, 1)]
    search.tell(members[:3], [0.9, 0.1, 0.2])
    assert [tokens for tokens, _ in search.population] == members[:3]
    search.tell(members[3:], [0.0])
    assert [tokens for tokens, _ in search.population] == members[1:]


def test_a_child_is_the_best_of_the_sample_with_one_other_value():
    search = evolution(population=4, sample=2)
    members = [(0, 0, 0), (1, 1, 1), (2, 2, 0), (3, 0, 1)]
    search.tell(members, [0.4, 0.3, 0.2, 0.1])
    children = Counter(search.child() for _ in range(6_000))
    expected: Counter[tuple[int, ...]] = Counter()
    for rank, parent in enumerate(members):
        # the best of two draws with replacement is the member of this rank
        share = ((4 - rank) ** 2 - (3 - rank) ** 2) / 16
        for place, size in enumerate((4, 3, 2)):
            for value in set(range(size)) - {parent[place]}:
                child = (*parent[:place], value, *parent[place + 1 :])
                expected[child] += share / 3 / (size - 1) * 6_000
    assert set(children) == set(expected)
    distance = sum((children[c] - expected[c]) ** 2 / expected[c] for c in expected)
    assert distance < len(expected) - 1 + 5 * math.sqrt(2 * len(expected))


def test_the_first_population_is_drawn_at_random_and_the_rest_are_children():
    search = evolution(choices=(50, 50), population=6, sample=6)
    asked = search.ask(4)
    search.tell(asked, [float(sum(tokens)) for tokens in asked])
    more = search.ask(4)  # two to fill the population, then two children
    neighbours = [
        any(sum(a != b for a, b in zip(one, parent, strict=True)) == 1 for parent in asked)
        for one in more
    ]
    assert neighbours == [False, False, True, True]


def test_failures_are_no_parents_and_where_all_failed_it_draws_again():
    search = evolution(population=2)
    search.tell(search.ask(3), [math.nan] * 3)
    assert len(search.population) == 0
    assert len(search.ask(2)) == 2
    search.tell([(1, 1, 1), (2, 2, 0)], [math.nan, -3.0])
    assert {sum(a != b for a, b in zip(search.child(), (2, 2, 0), strict=True)) for _ in range(9)
            } == {1}  # fmt: skip


def test_a_parameter_of_one_value_never_changes():
    search = evolution(choices=(1, 3))
    search.tell([(0, 1)], [0.5])
    assert {search.child() for _ in range(30)} == {(0, 0), (0, 2)}
    alone = evolution(choices=(1, 1))
    alone.tell([(0, 0)], [0.5])
    assert alone.child() == (0, 0)


def test_its_children_become_better_than_random_sequences():
    choices, best = (4, 3, 4, 3, 4), (3, 0, 2, 1, 2)
    random = sum(1 - 1 / size for size in choices)  # tokens that differ from the best, on average
    ends = []
    for seed in range(5):
        search, wrong = evolution(choices, population=8, sample=6, seed=seed), []
        for _ in range(100):
            (tokens,) = search.ask(1)
            wrong.append(sum(a != b for a, b in zip(tokens, best, strict=True)))
            search.tell([tokens], [-float(wrong[-1])])
        ends.append(np.mean(wrong[-25:]))
    assert np.mean(ends) < 0.6 * random


def test_a_sample_is_no_larger_than_the_population():
    with pytest.raises(ValueError, match="a sample of 5 is larger than the population of 4"):
        EvolutionSpec(population=4, sample=5)

"""The made rewards of the benchmark of samplers."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.samplers import CHOICES, course, reward, table


def test_the_reward_is_highest_at_the_best_and_wants_the_first_two_together():
    best = (3, 2, 1, 0, 1, 2, 0, 1)
    assert reward(best, best) == pytest.approx(0.8)
    assert reward((*best[:7], 0), best) == pytest.approx(0.775)
    assert reward((0, *best[1:]), best) == pytest.approx(0.675)
    assert reward((0, 0, *best[2:]), best) == pytest.approx(0.75)


def test_a_course_has_the_rewards_of_random_search_and_finds_more_with_more_trials():
    one = course("random", trials=40, seeds=30)
    first = 1 / 4  # that one of the first two tokens is right
    wrong = sum(1 - 1 / size for size in CHOICES)
    expected = 0.8 - 0.025 * wrong - 0.1 * 2 * first * (1 - first)
    assert one.each.mean() == pytest.approx(expected, abs=0.01)
    assert one.found[0] == one.each[0]
    assert one.found[-1] > one.found[3] > np.mean(one.each)
    lines = table({"random": one}, budgets=[4, 40]).splitlines()
    assert len(lines) == 3
    assert lines[2].split() == ["random", "40", *(f"{v:.3f}" for v in
                                (one.each[-10:].mean(), one.found[-1]))]  # fmt: skip

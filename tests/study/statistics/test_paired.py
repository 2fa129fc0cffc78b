"""The signed-rank test, its effect size and the correction, against brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from medseg_reg.study.statistics.paired import holm, least_p, rank_biserial, signed_rank


def by_all_signs(d: list[float], zeros: str) -> float:
    """Return p by trying all signs."""
    x = np.round(np.array(d), 12)
    if zeros == "wilcox":
        x = x[x != 0]
    ranks = stats.rankdata(np.abs(x)) * (x != 0)
    seen = abs((ranks * np.sign(x)).sum())
    signs = np.array(list(itertools.product([-1, 1], repeat=len(x))))
    return float((np.abs(signs @ ranks) >= seen - 1e-9).mean())


@pytest.mark.parametrize("zeros", ["pratt", "wilcox"])
@pytest.mark.parametrize(
    "differences",
    [
        [0.3, 0.1, -0.2, 0.5, 0.7, -0.05],
        [0.1, 0.1, -0.1, 0.2, 0.2, 0.3],
        [0.0, 0.1, 0.2, -0.3, 0.0, 0.4, 0.5],
        [0.9 - 0.8, 0.8 - 0.7, -(0.7 - 0.6), 0.5, 0.6, 0.65],
        [0.01] * 8 + [-0.01] * 3,
        [0.0] * 9 + [0.1, 0.2, 0.3, 0.4],
        [0.2, 0.2, -0.2, 0.1, 0.3, 0.4, 0.4, 0.5, -0.1, 0.6, 0.6, 0.7, 0.9, 0.8, -0.3],
        [-0.2],
    ],
)
def test_p_is_that_of_all_signs(differences, zeros):
    assert signed_rank(differences, zeros) == pytest.approx(by_all_signs(differences, zeros))


def test_large_samples_and_samples_without_ties_are_scipys():
    rng = np.random.default_rng(0)
    for size in (5, 12, 40, 50):
        d = rng.normal(0.3, 1, size).round(9)
        assert signed_rank(d) == pytest.approx(stats.wilcoxon(d, method="exact").pvalue)
    d = rng.normal(0.3, 1, 80)
    d[:4] = 0
    wanted = stats.wilcoxon(d, zero_method="pratt", method="asymptotic").pvalue
    assert signed_rank(d) == pytest.approx(wanted)


@pytest.mark.parametrize("groups", range(1, 9))
def test_the_least_p_is_reached_and_five_groups_cannot_reach_five_percent(groups):
    assert signed_rank(np.arange(1, groups + 1)) == pytest.approx(least_p(groups))
    assert (least_p(groups) < 0.05) == (groups > 5)


@pytest.mark.parametrize("zeros", ["pratt", "wilcox", "zsplit"])
def test_zeros_take_part_in_no_sign_so_they_do_not_lower_the_least_p(zeros):
    # The normal approximation would say 0.046 by Pratt's ranks.
    assert signed_rank([0.1, 0.2, 0.3, 0.4] + [0.0] * 9, zeros) == pytest.approx(least_p(4))


def test_nothing_and_zeros():
    assert math.isnan(signed_rank([math.nan]))
    assert math.isnan(rank_biserial([]))
    assert signed_rank([0.0, -0.0, 0.0]) == 1.0
    assert rank_biserial([0.0, 0.0]) == 0.0
    assert signed_rank([0.1, math.nan, 0.2]) == signed_rank([0.1, 0.2])
    with pytest.raises(ValueError, match="finite"):
        signed_rank([math.inf])


def test_the_effect_size_is_favourable_minus_unfavourable_ranks():
    rng = np.random.default_rng(1)
    d = rng.normal(size=9).round(1)
    ranks = stats.rankdata(np.abs(d))
    wanted = (ranks[d > 0].sum() - ranks[d < 0].sum()) / ranks.sum()
    assert rank_biserial(d) == pytest.approx(wanted)
    assert rank_biserial(-d) == pytest.approx(-wanted)
    assert rank_biserial([1, 2, 3]) == 1.0


def test_holm_is_the_closed_test_of_bonferroni():
    # Each hypothesis is rejected where every set of hypotheses that holds it is.
    rng = np.random.default_rng(2)
    for size in (1, 2, 4, 6):
        p = rng.uniform(0, 0.3, size)
        sets = [s for n in range(1, size + 1) for s in itertools.combinations(range(size), n)]
        wanted = [
            max(min(1.0, len(s) * min(p[j] for j in s)) for s in sets if i in s)
            for i in range(size)
        ]
        np.testing.assert_allclose(holm(p), wanted)


def test_holm_leaves_out_what_was_not_tested():
    found = holm([0.02, math.nan, 0.04])
    np.testing.assert_allclose(found, [0.04, math.nan, 0.04])
    assert holm([]).size == 0

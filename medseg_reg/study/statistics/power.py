"""How many seeds a difference needs, and which difference the seeds at hand can show."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import optimize, special, stats  # type: ignore[import-untyped,unused-ignore]

from medseg_reg.errors import MedsegError
from medseg_reg.study.statistics.comparison import count_distinct, pair_scores
from medseg_reg.study.statistics.hierarchical import degrees_of_freedom, variance_of_mean
from medseg_reg.study.statistics.paired import least_p
from medseg_reg.study.statistics.table import (
    Array,
    Block,
    blocks,
    require_baseline,
    require_fraction,
)

# Beyond, more seeds change nothing that could be measured.
MOST_SEEDS = 10_000

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(48)
_SPREAD = ("sd_groups", "sd_seeds", "sd_rest")


class Spread(NamedTuple):
    """Standard deviations of a paired difference, by what they come from.

    Attributes:
        groups: between groups: some patients gain more than others.
        seeds: between seeds: some trainings gain more, for all groups.
        rest: what is left: this seed on this group.
    """

    groups: float
    seeds: float
    rest: float

    def of_mean(self, groups: int, seeds: int) -> tuple[float, float, float]:
        """Return v_g, v_s, v_e of `hierarchical_interval` as they are expected."""
        rest = self.rest**2 / (groups * seeds)
        return self.groups**2 / groups + rest, self.seeds**2 / seeds + rest, rest


def spread_of(values: Array) -> Spread:
    """Return the spread of differences (seeds, groups), by the mean squares of the two-way layout.

    Estimates below 0 are 0. Source: S. R. Searle, G. Casella, C. E. McCulloch, "Variance
    Components", 1992, chapter 4.
    """
    of_groups, of_seeds, rest = variance_of_mean(values)
    seeds, groups = values.shape
    return Spread(
        math.sqrt(max(0.0, of_groups - rest) * groups),
        math.sqrt(max(0.0, of_seeds - rest) * seeds),
        math.sqrt(rest * groups * seeds),
    )


def power_of(
    difference: float, spread: Spread, groups: int, seeds: int, alpha: float = 0.05
) -> float:
    """Return the chance that a true difference is found by a two-sided t test at level alpha.

    The test is that of the mean difference against its variance over groups and seeds, with
    Satterthwaite's degrees of freedom, as of the interval in `compare`; power is by the noncentral
    t distribution. Source: J. Cohen, "Statistical Power Analysis for the Behavioral Sciences",
    1988.

    >>> round(power_of(0.02, Spread(0.02, 0.0, 0.02), groups=10, seeds=3), 2)
    0.65
    """
    parts = spread.of_mean(groups, seeds)
    variance = parts[0] + parts[1] - parts[2]
    if variance <= 0:
        return 1.0 if difference else alpha
    if seeds < 2:  # as the interval, which knows nothing of seeds then
        parts = (parts[0], 0.0, 0.0)
    freedom = degrees_of_freedom(parts, groups, seeds)
    return _chance(abs(difference) / math.sqrt(variance), freedom, alpha)


def _chance(shift: float, freedom: float, alpha: float) -> float:
    """Return the chance that a noncentral t is beyond the two-sided limit.

    Given the estimated over the true deviation s, it is a normal's; s is a chi over the root of its
    degrees of freedom. scipy's own noncentral t is NaN for some large shifts.
    """
    limit, chi, scale = stats.t.isf(alpha / 2, freedom), stats.chi(freedom), math.sqrt(freedom)
    low, middle, high = (float(chi.ppf(q)) for q in (1e-12, 0.5, 1 - 1e-12))
    # Gauss's rule between points where nothing bends sharply: beside the median, and where the
    # normal passes from 1 to 0.
    turn, width = shift * scale / limit, scale / limit
    bends = (turn + step * width for step in (-7, -2, 0, 2, 7))
    points = np.unique(np.clip([low, (low + middle) / 2, middle, *bends, high], low, high))
    half = np.diff(points)[:, None] / 2
    c = points[:-1, None] + half * (1 + _NODES)
    beyond = special.ndtr(shift - limit * c / scale) + special.ndtr(-limit * c / scale - shift)
    return min(1.0, float((half * _WEIGHTS * beyond * chi.pdf(c)).sum()))


def seeds_needed(
    results: pd.DataFrame,
    baseline: str,
    difference: float,
    power: float = 0.8,
    alpha: float = 0.05,
    metric: str = "dice",
) -> pd.DataFrame:
    """Return how many seeds each method needs to show a difference from the baseline.

    The results at hand are the pilot: their differences, paired by group and seed, give the spread
    between groups, between seeds and the rest; the groups stay as many as they are. More seeds
    cannot take the spread between groups away, so it may be that no number suffices:
    `seeds_needed` is infinite then, and `detectable_limit` is the least difference that these
    groups could show. So it is, and `power` is 0, where the groups are so few that the signed-rank
    test, which must agree with the interval, cannot give a p below alpha at all.

    A pilot of two or three seeds knows the spread between seeds badly, so take the answer as an
    order of size. For Holm over m methods, ask with alpha / m.

    Args:
        results: tidy, as in results.csv, with two seeds at least.
        baseline: a method.
        difference: the true difference that should be found; of any sign.
        power: chance to find it.
        alpha: level of the two-sided test.
        metric: one of `METRICS`.

    Returns:
        One row for each data set, network and method but the baseline: `dataset, network, method,
        seeds, groups` (of the pilot; groups with a missing value are left out, see
        `attrs["notes"]`), `sd_groups, sd_seeds, sd_rest`, `power` (with the seeds of the pilot),
        `seeds_needed` (at least 2), `detectable` (the least difference with the seeds of the pilot)
        and `detectable_limit` (with seeds without end). All are NaN from `sd_groups` on where
        seeds copy each other, which is no pilot.

    Raises:
        MedsegError: as of `compare`; or there is one seed only, or the difference is 0.
    """
    if not difference or not math.isfinite(difference):
        raise MedsegError(f"difference is {difference}: expected a number other than 0.")
    table, notes = _pilot(results, baseline, power, alpha, metric)
    chances, needed = [], []
    for _, row in table.iterrows():
        spread, groups = Spread(*(row[name] for name in _SPREAD)), int(row["groups"])
        if math.isnan(spread.groups):
            now = least = math.nan
        elif least_p(groups) >= alpha:
            now, least = 0.0, math.inf
        else:
            now = power_of(difference, spread, groups, row["seeds"], alpha)
            least = _least_seeds(difference, spread, groups, power, alpha)
        chances.append(now)
        needed.append(least)
    table.insert(8, "power", chances)
    table.insert(9, "seeds_needed", needed)
    table.attrs = {"metric": metric, "baseline": baseline, "notes": notes}
    return table


def detectable_difference(
    results: pd.DataFrame,
    baseline: str,
    power: float = 0.8,
    alpha: float = 0.05,
    metric: str = "dice",
) -> pd.DataFrame:
    """Return the least difference from the baseline that the results at hand can show.

    Args, errors and columns are those of `seeds_needed`, without `power` and `seeds_needed`.
    """
    table, notes = _pilot(results, baseline, power, alpha, metric)
    table.attrs = {"metric": metric, "baseline": baseline, "notes": notes}
    return table


def _pilot(
    results: pd.DataFrame, baseline: str, power: float, alpha: float, metric: str
) -> tuple[pd.DataFrame, list[str]]:
    require_fraction("power", power)
    require_fraction("alpha", alpha)
    if power <= alpha:
        raise MedsegError(f"power is {power}: expected more than alpha, {alpha}.")
    found, notes = blocks(results, metric)
    rows = []
    for block in found:
        require_baseline(block, baseline)
        if len(block.seeds) < 2:
            raise MedsegError(
                f"results: {block.where}: one seed only, so nothing is known of the spread over "
                "seeds. Run two at least, better five."
            )
        for method in block.methods:
            if method != baseline:
                rows.append(_row(block, method, baseline, power, alpha, notes))
    columns = ["dataset", "network", "method", "seeds", "groups"]
    columns += [*_SPREAD, "detectable", "detectable_limit"]
    return pd.DataFrame(rows, columns=columns), notes


def _row(
    block: Block, method: str, baseline: str, power: float, alpha: float, notes: list[str]
) -> tuple[object, ...]:
    mine, other = pair_scores(block, method, baseline)
    values = np.round(mine - other, 12)
    whole = np.logical_not(np.isnan(values).any(axis=0))
    if not whole.all():
        notes.append(
            f"{block.where}: {method}: {int((~whole).sum())} of {len(whole)} groups lack a value, "
            "and are left out."
        )
    values = values[:, whole]
    seeds, groups = values.shape
    names = (block.dataset, block.network, method, seeds, groups)
    if groups < 2:
        return (*names, *[math.nan] * 5)
    if count_distinct(values)[1] < 2:
        notes.append(
            f"{block.where}: {method}: all seeds have the same differences, as copies of a run do, "
            "so nothing is known of the spread over seeds."
        )
        return (*names, *[math.nan] * 5)
    spread = spread_of(values)
    if least_p(groups) >= alpha:
        notes.append(
            f"{block.where}: {method}: {groups} groups cannot reach p < {alpha:.3g} in the "
            f"signed-rank test, whose least p for them is {least_p(groups):.3g}, so more seeds "
            "show nothing."
        )
        return (*names, *spread, math.inf, math.inf)
    limits = (_least_difference(spread, groups, n, power, alpha) for n in (seeds, MOST_SEEDS))
    return (*names, *spread, *limits)


def _least_seeds(
    difference: float, spread: Spread, groups: int, power: float, alpha: float
) -> float:
    """Return the least number of seeds, 2 at least; infinite where none suffices."""

    def enough(seeds: int) -> bool:
        return power_of(difference, spread, groups, seeds, alpha) >= power

    if not enough(MOST_SEEDS):
        return math.inf
    low, high = 1, 2
    while not enough(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return float(high)


def _least_difference(spread: Spread, groups: int, seeds: int, power: float, alpha: float) -> float:
    v_g, v_s, v_e = spread.of_mean(groups, seeds)
    scale = math.sqrt(max(0.0, v_g + v_s - v_e))
    if scale == 0:
        return 0.0

    def lacking(shift: float) -> float:
        return power_of(shift * scale, spread, groups, seeds, alpha) - power

    high = 4.0  # in standard errors
    while lacking(high) < 0:
        high *= 2
    return float(optimize.brentq(lacking, 0.0, high, xtol=1e-6)) * scale

"""What a comparison supports, and what it does not, in a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def verdict(row: Mapping[str, Any], alpha: float = 0.05, metric: str = "DICE") -> str:
    """Say in one sentence what a row of `compare` supports.

    A difference is called supported only if the corrected p lies below `alpha` and the interval
    over patients and seeds leaves out 0. The first alone says nothing about other seeds, the second
    alone nothing about many comparisons.

    Args:
        row: a row of `compare`.
        alpha: level of the test.
        metric: how the score is called.

    Example:
        >>> row = dict(method="drop_block", groups=5, seeds=3, difference=0.012,
        ...            difference_low=-0.002, difference_high=0.03, p=0.0625, p_holm=0.0625)
        >>> verdict(row)[:71]
        'drop_block: DICE differs by +0.012 (-0.002 to +0.030) from the baseline'
    """
    method, change = row["method"], float(row["difference"])
    if np.isnan(change):
        return f"{method} is the baseline."
    low, high = float(row["difference_low"]), float(row["difference_high"])
    groups, seeds, p = int(row["groups"]), int(row["seeds"]), float(row["p_holm"])
    start = (
        f"{method}: {metric} differs by {change:+.3f} ({low:+.3f} to {high:+.3f}) from the baseline"
    )
    least = 2.0 ** (1 - groups)
    if least >= alpha:
        end = (
            f"; with {groups} patients no test can reach p < {alpha:g} (the least possible is "
            f"{least:.2g}), so nothing is shown either way."
        )
    elif seeds < 2:
        end = (
            f" (corrected p = {p:.2g}) for this one seed; another seed may turn it, so nothing is "
            "shown about the method."
        )
    elif p < alpha and low * high > 0:
        end = f"; {groups} patients and {seeds} seeds support it (corrected p = {p:.2g})."
    elif p < alpha:
        end = (
            f"; it is significant over these patients (corrected p = {p:.2g}) but the interval "
            "over patients and seeds holds 0, so other seeds may turn it."
        )
    else:
        end = (
            f"; {groups} patients and {seeds} seeds do not support a difference (corrected p = "
            f"{p:.2g}), which does not show that there is none: all of the interval is possible."
        )
    return start + end

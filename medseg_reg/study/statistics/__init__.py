"""What the results of a study support: pandas in, pandas out.

| what                                                  | from          | file            |
|-------------------------------------------------------|---------------|-----------------|
| the results of a study as arrays, checked             | results.csv   | table.py        |
| intervals over groups (patients, videos) and seeds    | arrays        | hierarchical.py |
| signed-rank test, correction, effect size             | differences   | paired.py       |
| methods against a baseline                            | results       | comparison.py   |
| the order of the methods, and how sure it is          | results       | ranking.py      |
| how many seeds a difference needs                     | results       | power.py        |
| whether it supports a difference, and in a sentence   | one row of it | words.py        |

Of other packages it imports numpy, pandas and scipy alone, and of this one `medseg_reg.errors`.
"""

from medseg_reg.study.statistics.comparison import compare
from medseg_reg.study.statistics.hierarchical import Estimate, Resamples, hierarchical_interval
from medseg_reg.study.statistics.paired import holm, least_p, rank_biserial, signed_rank
from medseg_reg.study.statistics.power import detectable_difference, seeds_needed
from medseg_reg.study.statistics.ranking import rank
from medseg_reg.study.statistics.table import METRICS, balanced, group_scores, lower_is_better
from medseg_reg.study.statistics.words import is_supported, verdict

__all__ = [
    "METRICS",
    "Estimate",
    "Resamples",
    "balanced",
    "compare",
    "detectable_difference",
    "group_scores",
    "hierarchical_interval",
    "holm",
    "is_supported",
    "least_p",
    "lower_is_better",
    "rank",
    "rank_biserial",
    "seeds_needed",
    "signed_rank",
    "verdict",
]

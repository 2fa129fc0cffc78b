"""Honest comparison of methods over patients and seeds; tables in, tables out.

* `compare`: differences to a baseline in pairs, with intervals over patients and seeds, Wilcoxon
  tests corrected by Holm, effect sizes, and the probability of improvement.
* `rank`: ranks with intervals.
* `seeds_needed`: how many seeds a difference needs, and what the present ones can show.
* `verdict`: what a row supports, in a sentence.
* `balanced`: leaves out the seeds that a method lacks, and says so.
"""

from medseg_reg.study.statistics.comparison import compare, rank, seeds_needed
from medseg_reg.study.statistics.scores import balanced, lower_is_better
from medseg_reg.study.statistics.words import verdict

__all__ = ["balanced", "compare", "lower_is_better", "rank", "seeds_needed", "verdict"]

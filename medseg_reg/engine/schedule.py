"""The learning rate as a function of training progress, without state to save or to lose."""

from __future__ import annotations

import math

from medseg_reg.config import ScheduleSpec


def learning_rate_factor(spec: ScheduleSpec, epoch: float, epochs: int) -> float:
    """Return the factor on the base learning rate.

    After a linear warm-up over `warmup_epochs`, with t from 0 to 1 over the epochs that are left
    and f = `final_factor`:

        constant     1
        cosine       f + (1 - f) (1 + cos(pi t)) / 2      (Loshchilov & Hutter, ICLR 2017)
        polynomial   f + (1 - f) (1 - t)^power            (Chen et al., TPAMI 2018)
        step         gamma ^ (milestones passed)

    Args:
        spec: the schedule.
        epoch: epochs done, fractions counted, so the rate changes with each batch.
        epochs: epochs of the whole training.

    >>> learning_rate_factor(ScheduleSpec(name="cosine"), 5.0, 10)
    0.5
    """
    if epoch < spec.warmup_epochs:
        # Never 0: the first step would change nothing.
        return max(epoch / spec.warmup_epochs, 1e-2)
    if spec.name == "step":
        return float(spec.gamma ** sum(epoch >= milestone for milestone in spec.milestones))
    left = max(epochs - spec.warmup_epochs, 1e-9)
    t = min((epoch - spec.warmup_epochs) / left, 1.0)
    if spec.name == "cosine":
        decay = (1 + math.cos(math.pi * t)) / 2
    elif spec.name == "polynomial":
        decay = (1 - t) ** spec.power
    else:
        return 1.0
    return spec.final_factor + (1 - spec.final_factor) * decay

"""Drop rates from scores: the lower a unit's score, the higher its rate, and the mean is p.

CorrDrop takes correlations for the scores, ADCM attentions; guided dropout turns the order around.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from medseg_reg.regularizers.base import check_number, check_rate

__all__ = ["check_temperature", "drop_probability", "running_sum", "water_level"]

_SPREAD_FLOOR = 1e-6  # below it, differences between scores are rounding noise
_COLDEST = 1e-6  # a temperature below it changes nothing more, and leaves float32


def check_temperature(temperature: object, owner: str) -> float:
    """Returns ``temperature`` as a float, or raises a ValueError unless it is above 0."""
    return check_number(temperature, "temperature", owner, 0.0, strict=True, finite=False)


def drop_probability(
    correlation: Tensor, p: float, temperature: float = 1.0, area: Tensor | None = None
) -> Tensor:
    """Rates q_i that fall with the correlation and whose mean is exactly p in every sample.

    q_i = min(1, lambda w_i), w_i = exp(-(F_i - mean F) / (temperature * std F)), with lambda
    solved so that sum_i area_i q_i / sum_i area_i = p. Sorting the weights makes the solution
    exact and free of iterations (water filling).

    Args:
        correlation: F, for example of `row_correlation`; a sample with NaN gets uniform rates.
        p: mean rate, in [0, 1).
        temperature: how sharply the rates fall: at 1, one standard deviation of F is a factor e;
            infinity means uniform rates, towards 0 the least correlated units alone are dropped.
        area: weight of each unit in the mean, at least 0, for all samples (N,) or for each
            (B, N); equal by default. A unit of area 0 takes no part: its rate is 0, and the mean
            and the deviation of F are those of the others. Where no unit has an area, all are
            equal.

    Shapes:
        correlation (B, N); the result (B, N), float32.

    Raises:
        ValueError: ``p`` outside [0, 1) or a temperature that is not above 0.

    Example:
        >>> import torch
        >>> q = drop_probability(torch.tensor([[0.1, 0.2, 0.3, 0.4]]), p=0.25)
        >>> [round(v, 2) for v in q[0].tolist()]
        [0.61, 0.25, 0.1, 0.04]
    """
    p = check_rate(p, "drop_probability")
    temperature = max(check_temperature(temperature, "drop_probability"), _COLDEST)
    with torch.no_grad():
        f = correlation.detach().float()
        area = torch.ones_like(f) if area is None else area.to(f).expand_as(f)
        area = torch.where((area > 0).any(1, keepdim=True), area, 1.0)
        counts = area > 0
        number = counts.sum(1, keepdim=True)
        f = torch.where(f.isfinite().all(1, keepdim=True) & counts, f, 0.0)
        centred = torch.where(counts, f - f.sum(1, keepdim=True) / number, 0.0)
        spread = (centred.square().sum(1, keepdim=True) / number).sqrt() + _SPREAD_FLOOR
        # weights are relative to the greatest; exp(-30) is 0 for any p that matters, but keeps
        # lambda finite when all the greater ones are saturated
        exponent = torch.where(counts, -centred / spread / temperature, -torch.inf)
        weight = (exponent - exponent.amax(1, keepdim=True)).clamp(min=-30.0).exp() * counts
        share = area / area.sum(1, keepdim=True)
        return (weight * water_level(weight, share, p)).clamp(max=1.0)


def water_level(weight: Tensor, share: Tensor, p: float) -> Tensor:
    """The lambda (B, 1) for which the weighted mean of min(1, lambda * weight) is p."""
    ordered, order = weight.sort(dim=1, descending=True)
    share = share.gather(1, order)
    saturated = running_sum(share) - share  # with m units at 1: their share
    # a sum from the end, not a difference of sums from the start, which would cancel
    rest = running_sum((share * ordered).flip(1)).flip(1)
    level = (p - saturated) / rest  # not finite where only units of weight 0 are left
    fits = level * ordered <= 1.0  # the next unit stays below 1: the first such m is the answer
    return level.gather(1, fits.int().argmax(1, keepdim=True)).clamp(min=0.0)


def running_sum(values: Tensor) -> Tensor:
    """cumsum(1), by doubling: deterministic mode refuses torch's cumsum of floats on CUDA."""
    step = 1
    while step < values.shape[1]:
        values = values + F.pad(values[:, :-step], (step, 0))
        step *= 2
    return values

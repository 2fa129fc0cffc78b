"""Random points on a map, more of them where it is strong."""

from __future__ import annotations

import torch
from torch import Tensor

from medseg_reg.regularizers.kernels.blocks import worth_splitting

__all__ = ["random_points"]

_DENSE = 8  # a coin for each element is cheaper than candidates for more than an eighth of them


def random_points(strength: Tensor, alpha: Tensor) -> Tensor:
    """Whether each element is a point: with probability 1 - exp(-alpha * strength).

    The points of a Poisson process of that intensity, which is drawn by thinning on CPU: a random
    number of candidates anywhere, each kept with the probability that is the strength there. So
    few candidates need fewer random numbers than a coin for each element. It reads the number of
    candidates, and is therefore not for other devices, nor for compiled code: these toss coins.

    Args:
        strength: in [0, 1].
        alpha: intensity at strength 1, for each sample.

    Shapes:
        strength (B, C, *spatial), contiguous, float32; alpha (B, 1, ...); the result (B, C,
        *spatial), bool.

    Example:
        >>> import torch
        >>> points = random_points(torch.tensor([[[0.0, 1, 1]]]), torch.full((1, 1, 1), 1e4))
        >>> points.tolist()
        [[[False, True, True]]]
    """
    if worth_splitting(strength):
        size = strength[0].numel()
        intensity = alpha.flatten()
        if bool((intensity * _DENSE < 1).all()):
            counts = torch.poisson(intensity.double() * size).long().tolist()
            points = torch.zeros_like(strength, dtype=torch.bool)
            for values, found, count in zip(strength, points, counts, strict=True):
                place = torch.randint(size, (count,))
                taken = torch.rand(count) < values.view(-1)[place]
                found.view(-1)[place[taken]] = True
            return points
    rate = torch.expm1(-alpha * strength).neg_()
    return torch.rand_like(rate) < rate

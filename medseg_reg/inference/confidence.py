"""How sure a first network is of a slice, and from where on it is believed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from medseg_reg.data.preprocessing import Fit
from medseg_reg.errors import MedsegError

# Pixels of the network, up to which one of another class makes a pixel one of the boundary.
BAND = 2

# Budgets such as 1 + first / fine are sums in another order than the costs.
_ROUNDING = 1e-9


def band_of(fit: Fit) -> int:
    """Return the `band` for slices that a network saw scaled: `BAND` pixels of the network.

    Of a slice that it saw much smaller, two pixels of the source would lie in the blur of one of
    its own.

    >>> band_of(Fit((512, 256), (64, 32), (64, 64))), band_of(Fit((32, 32), (96, 96), (96, 96)))
    (16, 2)
    """
    scale = max(have / want for have, want in zip(fit.source, fit.inner, strict=True))
    return round(BAND * max(1.0, scale))


def confidence(p: Tensor, band: int = BAND) -> Tensor:
    """Return how sure probabilities are of the boundaries that they draw.

    With c_i = max_k p_ik of pixel i, and B the pixels that have a pixel of another predicted class
    in the square of 2 band + 1 pixels around them:

        confidence = mean of c_i over B;    where B is empty, the least c_i of all pixels

    The mean of all pixels would say nothing: nearly all lie far from any boundary, and are sure.
    Where one class is predicted everywhere, the least sure pixel is where a boundary would be.
    Pixels that the network did not see, whose probabilities are all 0, are not counted.

    Args:
        p: class probabilities (B, K, H, W).
        band: pixels to each side, see `band_of`.

    Returns:
        (B,) float64 on the CPU, from 1 / K to 1; 0 where no pixel was seen, or one is no number.

    Paper:
        Y. Wang, R. Huang, S. Song, Z. Huang, G. Huang, "Not All Images are Worth 16x16 Words:
        Dynamic Transformers for Efficient Image Recognition", NeurIPS 2021, arXiv 2105.15075, takes
        the largest class probability of an image. The band is this package's, for pixels.

    Example:
        >>> sure = torch.zeros(1, 2, 8, 8)
        >>> sure[:, 0] = 0.9
        >>> sure[:, 1] = 0.1
        >>> unsure = sure.clone()
        >>> unsure[:, :, 4:] = torch.tensor([0.4, 0.6])[:, None, None]  # the lower half
        >>> confidence(torch.cat([sure, unsure])).round(decimals=4)
        tensor([0.9000, 0.7500], dtype=torch.float64)
    """
    best, labels = p.max(dim=1)
    seen = p.sum(dim=1) > 0
    numbers = labels[:, None].to(p.dtype)
    highest, lowest = _highest(numbers, band), -_highest(-numbers, band)
    # On the CPU, because not every device has float64, in which sums do not depend on the batch.
    boundary = ((highest != lowest)[:, 0] & seen).flatten(1).cpu()
    best, seen = best.flatten(1).cpu().double(), seen.flatten(1).cpu()
    mean = (best * boundary).sum(dim=1) / boundary.sum(dim=1).clamp(min=1)
    least = best.masked_fill(~seen, torch.inf).amin(dim=1)
    found = torch.where(boundary.any(dim=1), mean, least)
    return torch.where(seen.any(dim=1), found, 0.0).clamp(max=1).nan_to_num(nan=0.0)


def _highest(x: Tensor, band: int) -> Tensor:
    """Return the highest value (B, 1, H, W) in the square around each pixel."""
    # Rows, then columns: the square at once would cost as much as it has pixels.
    rows = functional.max_pool2d(x, (2 * band + 1, 1), 1, (band, 0))
    return functional.max_pool2d(rows, (1, 2 * band + 1), 1, (0, band))


def threshold_for(
    confidences: Sequence[float] | np.ndarray[Any, Any],
    first: Sequence[float] | np.ndarray[Any, Any],
    fine: Sequence[float] | np.ndarray[Any, Any],
    budget: float,
    alone: Sequence[float] | np.ndarray[Any, Any] | None = None,
) -> float:
    """Return the highest threshold at which a cascade keeps a budget.

    A slice goes on to the finer network unless its confidence is above the threshold t, so

        cost(t) = sum_i first_i + sum_{i: confidence_i <= t} fine_i <= budget * sum_i alone_i

    Args:
        confidences: of each slice of the validation part, in [0, 1].
        first: what the first network costs for each.
        fine: what the finer network costs for each that goes on.
        budget: of the cost of the finer network on all slices, such as 0.5; above 1 it may be that
            both see every slice.
        alone: what the finer network costs for each without a cascade, where that is something
            else, as of one that has the first network inside; by default `fine`.

    Returns:
        0, where no slice may go on; 1, where all may; else the confidence of the last slice that
        goes on. Slices of equal confidence go on together or not at all.

    Raises:
        MedsegError: the first network alone is above the budget.

    Paper:
        As of `confidence`: thresholds that keep a budget on images held out. With more than two
        networks the paper spreads the images over them by q^k; with two, the budget decides alone.

    Example:
        >>> threshold_for([0.9, 0.6, 0.8, 0.7], [1, 1, 1, 1], [4, 4, 4, 4], 0.75)
        0.7
    """
    values, costs = np.asarray(confidences, float), np.asarray(fine, float)
    whole = float(np.sum(fine if alone is None else alone))
    least = float(np.sum(first)) / whole
    if not budget >= least * (1 - _ROUNDING):
        raise MedsegError(
            f"--budgets {budget:g}: the first network alone costs {least:.4f} of the finer one on "
            "the validation part. Give more, or take a cheaper first network."
        )
    order = np.argsort(values, kind="stable")
    values, spent = values[order], least + costs[order].cumsum() / whole
    # Of equals the last one counts.
    last = np.append(values[1:] != values[:-1], True)
    kept = values[last & (spent <= budget * (1 + _ROUNDING))]
    if not kept.size:
        return 0.0
    return 1.0 if kept[-1] == values[-1] else float(kept[-1])

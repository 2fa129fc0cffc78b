"""Cross-entropy over the pixels that count."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    counted: Tensor | None = None,
    weights: Tensor | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    r"""Return the cross-entropy, the mean over pixels by the weights of their labels.

    .. math::
        L = - \sum_{n,c} \omega_c \, q_{nc} \log p_{nc} \Big/ \sum_n \omega_{t_n},
        \quad q = (1 - s) \, t + s / K

    If no pixel counts, or the weights of all their labels are zero, it is 0 and not 0/0.

    Args:
        logits: (B, K, *spatial), K >= 2.
        labels: int64, (B, *spatial), 0 .. K - 1 also where a pixel does not count.
        counted: bool, (B, *spatial), where pixels count; None for everywhere.
        weights: omega, one value for each class.
        smoothing: s.

    Example:
        >>> logits, labels = torch.zeros(1, 2, 2, 2), torch.tensor([[[0, 1], [1, 0]]])
        >>> round(cross_entropy(logits, labels).item(), 4)
        0.6931
    """
    # reduction="none": torch's own 2-D mean is refused by deterministic mode on CUDA, and is
    # 0/0 when the weights of all labels of a batch are zero.
    losses = F.cross_entropy(logits, labels, weights, reduction="none", label_smoothing=smoothing)
    return mean_over_pixels(losses, labels, counted, weights)


def mean_over_pixels(
    losses: Tensor, labels: Tensor, counted: Tensor | None, weights: Tensor | None
) -> Tensor:
    """Return the sum of weighted losses over the sum of the weights of the labels; 0 for 0/0.

    Args:
        losses: (B, *spatial), already multiplied by the weights.
        labels: int64, of the same shape.
        counted: bool, of the same shape; None for everywhere.
        weights: one value for each class.
    """
    if counted is None and weights is None:
        return losses.mean()
    share = torch.ones_like(losses) if weights is None else weights[labels].to(losses.dtype)
    if counted is not None:
        losses, share = losses * counted, share * counted
    total, summed = share.sum(), losses.sum()
    # With label smoothing the losses are not 0 where the weights of all labels are.
    mean = summed / total.clamp_min(torch.finfo(losses.dtype).tiny)
    return torch.where(total > 0, mean, summed * 0)

"""Focal loss: cross-entropy that counts what is already right for less."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from medseg_reg.losses.cross_entropy import mean_over_pixels


def focal_loss(
    logits: Tensor,
    labels: Tensor,
    counted: Tensor | None = None,
    weights: Tensor | None = None,
    gamma: float = 2.0,
) -> Tensor:
    r"""Return the focal loss, the mean over pixels by the weights of their labels.

    .. math::
        L = - \sum_n \omega_{t_n} (1 - p_{n t_n})^\gamma \log p_{n t_n}
        \Big/ \sum_n \omega_{t_n}

    With gamma 0 it is the cross-entropy. :math:`1 - p` is taken from the logits of the other
    classes, so that value and gradient stay finite for any gamma >= 0 and any logits.

    Paper: T.-Y. Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017,
    doi:10.1109/ICCV.2017.324. The weights are its alpha; it divides by the number of boxes that
    hold an object, which a segmentation does not have.

    MONAI's `FocalLoss` is another thing for several classes: its mean is this value divided by
    the number of classes, unless `ignore_index` is given; without the background it takes the
    softmax over the remaining classes, so that for two classes it is always 0.

    Args:
        logits: (B, K, *spatial), K >= 2.
        labels: int64, (B, *spatial), 0 .. K - 1 also where a pixel does not count.
        counted: bool, (B, *spatial), where pixels count; None for everywhere.
        weights: omega, one value for each class.
        gamma: how strongly easy pixels are left out, >= 0.

    Example:
        >>> logits, labels = torch.zeros(1, 2, 2, 2), torch.tensor([[[0, 1], [1, 0]]])
        >>> round(focal_loss(logits, labels).item(), 4)  # 0.25 * log 2
        0.1733
    """
    mine = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, labels.unsqueeze(1), True)
    log_rest = logits.masked_fill(mine, -math.inf).logsumexp(dim=1) - logits.logsumexp(dim=1)
    losses = (gamma * log_rest).exp() * F.cross_entropy(logits, labels, reduction="none")
    if weights is not None:
        losses = losses * weights[labels].to(losses.dtype)
    return mean_over_pixels(losses, labels, counted, weights)

"""Which classes a slice shows at all, and the error of logits that say it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from medseg_reg.losses.distillation import distillation_loss
from medseg_reg.losses.labels import two_classes


def presence_targets(
    labels: Tensor, classes: int, ignore: int | None = None, pixels: int = 1
) -> Tensor:
    """Return which foreground classes label maps show, as 1 or 0, and NaN where it is not known.

    A class is shown by at least `pixels` pixels. Where there are fewer, but ignored pixels could
    make up for what is missing, nobody knows.

    Args:
        labels: integers, (B, *spatial), 0 to `classes` and the ignored label.
        classes: foreground classes.
        ignore: a label of pixels whose class is not known.
        pixels: the fewest that count.

    Returns:
        (B, classes), float32.

    >>> labels = torch.tensor([[[0, 2], [2, 0]], [[0, 255], [1, 1]]])
    >>> presence_targets(labels, 2, ignore=255, pixels=2).tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    >>> presence_targets(labels, 2, ignore=255).tolist()
    [[0.0, 1.0], [1.0, nan]]
    """
    flat = labels.flatten(1)
    counts = torch.stack([(flat == one).sum(1) for one in range(1, classes + 1)], dim=1)
    shown = counts >= pixels
    targets = shown.float()
    if ignore is not None:
        possible = counts + (flat == ignore).sum(1, keepdim=True) >= pixels
        targets = targets.masked_fill(possible & ~shown, torch.nan)
    return targets


def presence_bce(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    r"""Return the binary cross-entropy of logits of presence, in float32.

    .. math::
        L = -\frac{1}{N} \sum_{bk} w_k y_{bk} \log p_{bk} + (1 - y_{bk}) \log (1 - p_{bk}),
        \quad p = \operatorname{sigmoid}(z)

    over the N pairs of a slice and a class for which y is known; 0 if none is.

    Args:
        logits: z, (B, K).
        targets: y, (B, K), NaN where it is not known.
        weights: w of each class, (K,); 1 without.

    >>> targets = torch.tensor([[1.0, torch.nan]])
    >>> round(presence_bce(torch.zeros(1, 2), targets, torch.tensor([2.0, 1.0])).item(), 4)
    1.3863
    """
    with torch.autocast(logits.device.type, enabled=False):
        known = ~targets.isnan()
        each = F.binary_cross_entropy_with_logits(
            logits.float(), targets.nan_to_num(), known.float(), None, None, "sum", weights
        )
        return each / known.sum().clamp_min(1)


def presence_divergence(
    logits: Tensor, teacher: Tensor, temperature: float = 1.0, counted: Tensor | None = None
) -> Tensor:
    r"""Return the distance of logits of presence from those of a teacher, in float32.

    The divergence of `distillation_loss` with two classes, shown and not shown, for each pair:

    .. math::
        L = \tau^2 \, \frac{1}{N} \sum_{bk}
            \operatorname{KL}(\operatorname{Bern}(\operatorname{sigmoid}(t_{bk} / \tau)) \,\|\,
            \operatorname{Bern}(\operatorname{sigmoid}(z_{bk} / \tau)))

    Args:
        logits: z, (B, K).
        teacher: t, (B, K); it gets no gradient.
        temperature: tau, above 0.
        counted: which pairs count, bool (B, K); None for all. It is 0 if none does.

    Paper:
        H. Touvron et al., "Training data-efficient image transformers & distillation through
        attention", ICML 2021, arXiv:2012.12877, which has one class for each image and a softmax.

    >>> logits, teacher = torch.tensor([[0.0]]), torch.tensor([[1.0986123]])
    >>> round(presence_divergence(logits, teacher).item(), 4)
    0.1308
    """
    mine, theirs = (one.reshape(-1, 1, 1, 1) for one in (logits, teacher))
    mask = None if counted is None else counted.reshape(-1, 1, 1)
    return distillation_loss(mine, theirs, temperature, counted=mask)


def presence_logits(logits: Tensor, pixels: int = 1) -> Tensor:
    r"""Return logits of which classes a segmentation shows.

    .. math::
        t_{bk} = \text{the } m\text{-th largest over pixels } n \text{ of }
            z_{bkn} - \max_{j \ne k} z_{bjn}

    with m `pixels`: it is above 0 where at least m pixels are predicted to be of class k. Of two
    classes it is the log odds of the m-th surest pixel.

    Args:
        logits: of the classes, the background first, (B, K + 1, *spatial); or of one channel.
        pixels: m; no more than an image has.

    Returns:
        (B, K), float32.

    >>> logits = torch.tensor([[[[0.0, 0.0]], [[2.0, -3.0]], [[1.0, -1.0]]]])
    >>> presence_logits(logits).tolist(), presence_logits(logits, 2).tolist()
    ([[1.0, -1.0]], [[-3.0, -1.0]])
    """
    flat = two_classes(logits.float()).flatten(2)
    top, first = flat.topk(2, dim=1)
    numbers = torch.arange(flat.shape[1], device=flat.device)[:, None]
    best_other = torch.where(first[:, :1] == numbers, top[:, 1:], top[:, :1])
    margins = (flat - best_other)[:, 1:]
    return margins.kthvalue(margins.shape[2] - pixels + 1, dim=2).values

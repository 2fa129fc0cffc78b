"""Calibration error: whether a class of probability p is there in a share p of the pixels."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

CalibrationKind = Literal["expected", "average", "maximum"]
"""How the errors of the bins are joined: weighted by their pixels, evenly, or the largest."""

# Probabilities are added up as whole multiples of it: sums of integers do not depend on order.
UNIT = 2.0**-24

_CHUNK = 1 << 22


def calibration_counts(
    probabilities: Tensor, target: Tensor, bins: int = 15, ignore: int | None = None
) -> Tensor:
    """Count, per sample and class, pixels, hits and confidence in bins of the probability.

    Bin b of n holds the pixels with b / n <= p < (b + 1) / n, the last one p = 1 as well. Every
    class is a yes-or-no question to every pixel, the background's as well.

    Args:
        probabilities: class probabilities, (B, K, *spatial), K = 2 for a binary task.
        target: integer labels, (B, *spatial).
        bins: number of bins.
        ignore: a label of the target, such as 255, whose pixels are not counted.

    Returns:
        int64, (B, K, bins, 3) on the inputs' device, last axis (pixels, pixels of that class,
        sum of p in units of 2^-24). Sum over the slices of a volume to get the volume's counts.

    Raises:
        ValueError: shapes do not match, values are no probabilities, or `bins` is below 1.

    Example:
        >>> p = torch.tensor([[[0.1, 0.9, 0.9, 0.6], [0.9, 0.1, 0.1, 0.4]]])
        >>> counts = calibration_counts(p, torch.tensor([[1, 0, 0, 0]]), bins=2)
        >>> counts[0, 1, :, :2].tolist()
        [[3, 0], [1, 1]]
    """
    _check(probabilities, target, bins)
    batch, classes = probabilities.shape[:2]
    counts = torch.zeros(batch, classes, bins, 3, dtype=torch.int64, device=target.device)
    kinds = torch.arange(classes, device=target.device).unsqueeze(1)
    for sample in range(batch):
        p_all, labels_all = probabilities[sample].flatten(1), target[sample].flatten().long()
        for start in range(0, labels_all.numel(), _CHUNK):
            labels = labels_all[start : start + _CHUNK]
            p = p_all[:, start : start + _CHUNK]
            if ignore is not None:
                keep = labels != ignore
                labels, p = labels[keep], p[:, keep]
            # In float64: the product of a float32 just below a bound would be rounded up to it.
            p = p.double()
            index = ((p * bins).long().clamp_max_(bins - 1) + kinds * bins).flatten()
            parts = (torch.ones_like(p), labels == kinds, (p / UNIT).round())
            for column, values in enumerate(parts):
                total = torch.zeros(classes * bins, dtype=torch.int64, device=target.device)
                total.scatter_add_(0, index, values.long().flatten())
                counts[sample, :, :, column] += total.view(classes, bins)
    return counts


def calibration_error(counts: Tensor, kind: CalibrationKind = "expected") -> Tensor:
    r"""Return the calibration error of each class.

    .. math::
        ECE_c = \sum_b \frac{n_{cb}}{N} \left| \frac{h_{cb}}{n_{cb}} - \frac{1}{n_{cb}}
        \sum_{i \in b} p_{ci} \right|

    with n pixels and h hits in a bin: the error that is "expected" of a pixel. Where nearly all
    pixels are background of probability 0, it is small for any network; "average" gives every
    bin that holds a pixel the same weight, and "maximum" is the worst bin.

    Papers: C. Guo et al., "On Calibration of Modern Neural Networks", ICML 2017,
    arXiv:1706.04599 (of the most likely class alone; here of each class, as in M. Kull et al.,
    "Beyond temperature scaling", NeurIPS 2019, arXiv:1910.12656).

    Args:
        counts: (..., K, bins, 3) as from `calibration_counts`, summed as wished.
        kind: "expected", "average" or "maximum".

    Returns:
        float64 in 0..1, (..., K); NaN where there is no pixel.

    Raises:
        ValueError: `counts` are not such counts, or `kind` is unknown.

    Example:
        >>> p = torch.tensor([[[0.75, 0.75], [0.25, 0.25]]])
        >>> calibration_error(calibration_counts(p, torch.tensor([[0, 1]]), bins=4)).tolist()
        [[0.25, 0.25]]
    """
    if counts.is_floating_point() or counts.ndim < 3 or counts.shape[-1] != 3:
        raise ValueError(
            f"counts are {counts.dtype} of shape {tuple(counts.shape)}, "
            "expected integers of shape (..., K, bins, 3)"
        )
    if kind not in get_args(CalibrationKind):
        names = ", ".join(get_args(CalibrationKind))
        raise ValueError(f"kind is {kind!r}, expected one of {names}")
    pixels, hits, confidence = counts.double().unbind(dim=-1)
    errors = (hits - confidence * UNIT).abs()
    filled = pixels > 0
    if kind == "expected":
        error = errors.sum(dim=-1) / pixels.sum(dim=-1).clamp_min(1)
    else:
        errors = errors / pixels.clamp_min(1)
        if kind == "maximum":
            error = errors.amax(dim=-1)
        else:
            error = errors.sum(dim=-1) / filled.sum(dim=-1).clamp_min(1)
    return error.masked_fill(~filled.any(dim=-1), math.nan)


def _check(probabilities: Tensor, target: Tensor, bins: int) -> None:
    shapes = f"probabilities {tuple(probabilities.shape)}, target {tuple(target.shape)}"
    if bins < 1:
        raise ValueError(f"bins is {bins}, expected at least 1")
    if (
        probabilities.ndim < 3
        or target.is_floating_point()
        or (probabilities.shape[0], *probabilities.shape[2:]) != tuple(target.shape)
    ):
        raise ValueError(f"{shapes}: expected (B, K, *spatial), and integers (B, *spatial)")
    if probabilities.numel() == 0:
        return
    low, high = (float(bound) for bound in probabilities.aminmax())
    if not (low >= 0 and high <= 1 + 1e-6):
        raise ValueError(
            f"probabilities span {low:g}..{high:g} ({shapes}), expected 0..1: apply a softmax first"
        )

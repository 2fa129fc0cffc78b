"""Dice and IoU from counts that add up, and intervals over cases.

    counts = confusion_counts(prediction, target, n_classes=2)   # one row per slice
    volume = dice(counts.sum(dim=0))                             # the patient's score

Counts, not scores, are what slices hand on: the sum of a volume's counts gives the volume's
score, whatever the order or the grouping of its slices. A mean of slice scores does not.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats  # type: ignore[import-untyped,unused-ignore]
from torch import Tensor

EmptyPolicy = Literal["one", "zero", "nan"]
"""What a class scores where truth and prediction are both empty."""

# Voxels that are turned into 64-bit indices at once: 32 MiB, whatever the size of a volume.
_CHUNK = 1 << 22


def confusion_counts(prediction: Tensor, target: Tensor, n_classes: int) -> Tensor:
    """Count true positives, false positives and false negatives per sample and class.

    Memory: the inputs, n_classes^2 counts per sample, and about 100 MiB of scratch.

    Args:
        prediction: labels, (B, *spatial), an integer or boolean type.
        target: labels of the same shape.
        n_classes: number of labels with the background: 2 for a binary task, also where the
            network has a single channel.

    Returns:
        int64 counts in voxels, (B, n_classes, 3), last axis (TP, FP, FN), on the inputs'
        device. Sum over the slices of a volume to get the volume's counts.

    Raises:
        ValueError: shapes differ, fewer than two axes, values are not integers (probabilities
            need a threshold or argmax first), or a label is outside 0 .. n_classes - 1.

    Example:
        >>> prediction = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 0]])
        >>> target = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1]])
        >>> confusion_counts(prediction, target, 2)[:, 1]
        tensor([[2, 1, 0],
                [0, 0, 1]])
    """
    _check_labels(prediction, target, n_classes)
    samples = target.shape[0]
    predicted, true = prediction.flatten(1), target.flatten(1)
    voxels, cells = predicted.shape[1], n_classes * n_classes
    matrix = torch.zeros(samples, cells, dtype=torch.int64, device=target.device)
    # Many small slices share a chunk and a large volume is cut into several.
    rows = max(1, _CHUNK // max(1, voxels))
    for start in range(0, samples, rows):
        here = matrix[start : start + rows]
        offset = torch.arange(len(here), device=target.device).unsqueeze(1) * cells
        for begin in range(0, voxels, _CHUNK):
            piece = (slice(start, start + rows), slice(begin, begin + _CHUNK))
            cell = (true[piece].long() * n_classes).add_(predicted[piece]).add_(offset)
            here += torch.bincount(cell.flatten(), minlength=here.numel()).view_as(here)
    table = matrix.view(samples, n_classes, n_classes)
    hits = table.diagonal(dim1=1, dim2=2)
    return torch.stack([hits, table.sum(dim=1) - hits, table.sum(dim=2) - hits], dim=-1)


def dice(counts: Tensor, empty: EmptyPolicy = "one") -> Tensor:
    """Return the Dice coefficient 2 TP / (2 TP + FP + FN) of each class.

    Scores are per row of `counts`: give summed counts for a volume's score. A class that is
    empty in truth *and* prediction scores what `empty` says; count such cases with
    `empty_cases` and report both. False positives on an empty truth always score 0, where
    MONAI's default (`ignore_empty=True`) drops them, and a model that hallucinates looks good.

    Source: F. Milletari et al., "V-Net", 3DV 2016, doi:10.1109/3DV.2016.79; the set form is
    L. R. Dice, Ecology 1945, doi:10.2307/1932409.

    Args:
        counts: (..., n_classes, 3) as from `confusion_counts`, summed as wished.
        empty: "one" (an agreed absence is a success), "zero", or "nan" (left out of means).

    Returns:
        float64 scores in 0..1, (..., n_classes).

    Raises:
        ValueError: `counts` are not counts, or `empty` is not a policy.

    Example:
        >>> slices = torch.tensor([[[3, 1, 0]], [[0, 0, 4]], [[0, 0, 0]]])  # TP, FP, FN
        >>> dice(slices).flatten().tolist(), dice(slices.sum(dim=0)).tolist()
        ([0.8571428571428571, 0.0, 1.0], [0.5454545454545454])
    """
    hits, misses = _hits_and_misses(counts)
    return _ratio(2 * hits, 2 * hits + misses, empty)


def iou(counts: Tensor, empty: EmptyPolicy = "one") -> Tensor:
    """Return the intersection over union TP / (TP + FP + FN), the Jaccard index, of each class.

    Arguments, empty classes and errors are those of `dice`; IoU = Dice / (2 - Dice).

    Source: P. Jaccard, New Phytologist 1912, doi:10.1111/j.1469-8137.1912.tb05611.x.

    Args:
        counts: (..., n_classes, 3) as from `confusion_counts`, summed as wished.
        empty: "one", "zero" or "nan", the score where truth and prediction are both empty.

    Returns:
        float64 scores in 0..1, (..., n_classes).

    Raises:
        ValueError: `counts` are not counts, or `empty` is not a policy.

    Example:
        >>> iou(torch.tensor([[3, 1, 0], [0, 0, 0]]), empty="nan").tolist()
        [0.75, nan]
    """
    hits, misses = _hits_and_misses(counts)
    return _ratio(hits, hits + misses, empty)


def empty_cases(counts: Tensor) -> Tensor:
    """Count, per class, the rows where truth and prediction are both empty.

    These are the scores that `EmptyPolicy` decides; a table that names the policy should
    give this number beside it.

    Args:
        counts: (..., n_classes, 3) as from `confusion_counts`.

    Returns:
        int64 (n_classes,), the number over all leading axes.

    Raises:
        ValueError: `counts` are not counts.

    Example:
        >>> empty_cases(torch.tensor([[[9, 0, 0], [0, 0, 0]], [[8, 0, 1], [0, 1, 0]]])).tolist()
        [0, 1]
    """
    hits, misses = _hits_and_misses(counts)
    return ((hits + misses) == 0).reshape(-1, counts.shape[-2]).sum(dim=0)


class Interval(NamedTuple):
    """A mean over cases with its bootstrap interval.

    Attributes:
        mean: mean of the values used; NaN if there are none.
        low: lower bound, NaN where `method` is "none".
        high: upper bound, NaN where `method` is "none".
        n: number of values used.
        left_out: number of NaN values left out.
        method: "bca", "percentile" (BCa was not defined), "constant" (all values are equal,
            the interval is that one point) or "none" (fewer than three values).
    """

    mean: float
    low: float
    high: float
    n: int
    left_out: int
    method: Literal["bca", "percentile", "constant", "none"]


def bootstrap_interval(
    values: Sequence[float] | npt.NDArray[np.floating] | Tensor,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Return the mean over cases and its bootstrap interval (bias-corrected, accelerated).

    Give one value per independent unit, that is per patient or video: slices of one patient
    are not independent, and an interval over slices is far too narrow. NaN (the "nan" policy
    of `dice`) is left out and counted.

    The rule where BCa cannot speak: fewer than three values give no interval (two values
    resample to three different means, which says nothing at 95 %). Equal values give the one
    point, flagged "constant": no spread was seen, which is not certainty. Else, should BCa be
    undefined, the percentile interval, flagged. Under ten cases any bootstrap is optimistic.

    Source: B. Efron, "Better bootstrap confidence intervals", JASA 1987,
    doi:10.1080/01621459.1987.10478410, as in `scipy.stats.bootstrap`.

    Args:
        values: one score per case, one axis.
        confidence: coverage, between 0 and 1.
        resamples: number of resamples.
        seed: seed of an own generator; the global ones stay untouched.

    Raises:
        ValueError: `values` have several axes or hold infinities, or an argument is out of
            range.

    Example:
        >>> interval = bootstrap_interval([0.70, 0.82, 0.75, 0.90, 0.78, math.nan])
        >>> interval.n, interval.left_out, interval.method, round(interval.mean, 3)
        (5, 1, 'bca', 0.79)
        >>> interval.low < 0.79 < interval.high
        True
    """
    scores = _finite_or_nan(values)
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(
            f"confidence is {confidence} and resamples is {resamples}, "
            "expected 0 < confidence < 1 and resamples >= 1"
        )
    used = scores[~np.isnan(scores)]
    left_out = len(scores) - len(used)
    if len(used) < 3:
        mean = float(used.mean()) if len(used) else math.nan
        return Interval(mean, math.nan, math.nan, len(used), left_out, "none")
    if np.ptp(used) == 0:
        value = float(used[0])
        return Interval(value, value, value, len(used), left_out, "constant")
    methods: tuple[Literal["bca", "percentile"], ...] = ("bca", "percentile")
    for method in methods:
        low, high = _bootstrap(used, method, confidence, resamples, seed)
        if math.isfinite(low) and math.isfinite(high):
            break
    return Interval(float(used.mean()), low, high, len(used), left_out, method)


def _finite_or_nan(
    values: Sequence[float] | npt.NDArray[np.floating] | Tensor,
) -> npt.NDArray[np.float64]:
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    scores = np.asarray(values, dtype=np.float64)
    infinite = int(np.isinf(scores).sum())
    if scores.ndim != 1 or infinite:
        raise ValueError(
            f"values have shape {scores.shape} and {infinite} infinities, "
            "expected one finite score (or NaN) per case"
        )
    return scores


def _bootstrap(
    scores: npt.NDArray[np.float64], method: str, confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    # An undefined BCa is answered by the caller, with the percentile interval.
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        result = stats.bootstrap(
            (scores,),
            np.mean,
            n_resamples=resamples,
            # Resamples held at once: about 32 MiB, so that thousands of cases fit as well.
            batch=max(1, _CHUNK // len(scores)),
            confidence_level=confidence,
            method=method,
            rng=np.random.default_rng(seed),
        )
    interval = result.confidence_interval
    return float(interval.low), float(interval.high)


def _check_labels(prediction: Tensor, target: Tensor, n_classes: int) -> None:
    shapes = f"prediction {tuple(prediction.shape)}, target {tuple(target.shape)}"
    if n_classes < 2:
        raise ValueError(f"n_classes is {n_classes}, expected at least 2: background counts")
    if prediction.shape != target.shape or target.ndim < 2:
        raise ValueError(f"{shapes}: expected equal shapes (B, *spatial)")
    for name, labels in (("prediction", prediction), ("target", target)):
        if labels.is_floating_point() or labels.is_complex():
            raise ValueError(
                f"{name} is {labels.dtype} ({shapes}), expected integer labels: "
                "apply a threshold or argmax first"
            )
    if target.numel() == 0:
        return
    bounds = [(int(x.min()), int(x.max())) for x in (prediction, target)]
    if min(low for low, _ in bounds) < 0 or max(high for _, high in bounds) >= n_classes:
        (p_low, p_high), (t_low, t_high) = bounds
        raise ValueError(
            f"prediction spans {p_low}..{p_high} and target {t_low}..{t_high} ({shapes}), "
            f"expected labels 0..{n_classes - 1}"
        )


def _hits_and_misses(counts: Tensor) -> tuple[Tensor, Tensor]:
    if counts.is_floating_point() or counts.ndim < 2 or counts.shape[-1] != 3:
        raise ValueError(
            f"counts are {counts.dtype} of shape {tuple(counts.shape)}, "
            "expected integers of shape (..., n_classes, 3)"
        )
    return counts[..., 0], counts[..., 1] + counts[..., 2]


def _ratio(numerator: Tensor, denominator: Tensor, empty: EmptyPolicy) -> Tensor:
    values = {"one": 1.0, "zero": 0.0, "nan": math.nan}
    if empty not in values:
        raise ValueError(f"empty is {empty!r}, expected one of {', '.join(get_args(EmptyPolicy))}")
    ratio = numerator.double() / denominator.clamp_min(1)
    return ratio.masked_fill(denominator == 0, values[empty])

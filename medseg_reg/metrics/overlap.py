"""Dice, IoU, precision, recall and difference of volumes, from counts that add up.

    counts = confusion_counts(prediction, target, n_classes=2)   # one row per slice
    volume = dice(counts.sum(dim=0))                             # the patient's score

Counts, not scores, are what slices hand on: the sum of a volume's counts gives the volume's
score, whatever the order or the grouping of its slices. A mean of slice scores does not.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

EmptyPolicy = Literal["one", "zero", "nan"]
"""What a class scores where truth and prediction are both empty.

"one" is the best score (an agreed absence is a success), "zero" the worst, "nan" is left out of
means. Where one of the two alone is empty, every score of overlap is 0, whatever the policy.
"""

# Voxels that are turned into 64-bit indices at once: 32 MiB, whatever the size of a volume.
_CHUNK = 1 << 22


def confusion_counts(
    prediction: Tensor, target: Tensor, n_classes: int, ignore: int | None = None
) -> Tensor:
    """Count true positives, false positives and false negatives per sample and class.

    Memory: the inputs, n_classes^2 counts per sample, and about 100 MiB of scratch.

    Args:
        prediction: labels, (B, *spatial), an integer or boolean type.
        target: labels of the same shape.
        n_classes: number of labels with the background: 2 for a binary task, also where the
            network has a single channel.
        ignore: a label of the target, such as 255, whose voxels are not counted.

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
    _check_labels(prediction, target, n_classes, ignore)
    samples = target.shape[0]
    predicted, true = prediction.flatten(1), target.flatten(1)
    # Ignored voxels go to a cell of their own, the last one.
    voxels, cells = predicted.shape[1], n_classes * n_classes + 1
    matrix = torch.zeros(samples, cells, dtype=torch.int64, device=target.device)
    # Many small slices share a chunk and a large volume is cut into several.
    rows = max(1, _CHUNK // max(1, voxels))
    for start in range(0, samples, rows):
        here = matrix[start : start + rows]
        offset = torch.arange(len(here), device=target.device).unsqueeze(1) * cells
        for begin in range(0, voxels, _CHUNK):
            piece = (slice(start, start + rows), slice(begin, begin + _CHUNK))
            cell = true[piece].long() * n_classes + predicted[piece]
            if ignore is not None:
                cell.masked_fill_(true[piece].long() == ignore, cells - 1)
            cell += offset
            here += torch.bincount(cell.flatten(), minlength=here.numel()).view_as(here)
    table = matrix[:, :-1].view(samples, n_classes, n_classes)
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
    hits, false, missed = _parts(counts)
    return _ratio(2 * hits, 2 * hits + false + missed, counts, empty)


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
    hits, false, missed = _parts(counts)
    return _ratio(hits, hits + false + missed, counts, empty)


def precision(counts: Tensor, empty: EmptyPolicy = "one") -> Tensor:
    """Return the precision TP / (TP + FP) of each class: how much of what is found is there.

    Arguments and errors are those of `dice`. Where nothing is found of what is there, it is 0.

    Example:
        >>> precision(torch.tensor([[3, 1, 0], [0, 0, 5]])).tolist()
        [0.75, 0.0]
    """
    hits, false, _ = _parts(counts)
    return _ratio(hits, hits + false, counts, empty)


def recall(counts: Tensor, empty: EmptyPolicy = "one") -> Tensor:
    """Return the recall TP / (TP + FN) of each class, its sensitivity: how much is found.

    Arguments and errors are those of `dice`. Where nothing is there but something is found, it
    is 0, as Dice is.

    Example:
        >>> recall(torch.tensor([[3, 1, 0], [0, 5, 0]])).tolist()
        [1.0, 0.0]
    """
    hits, _, missed = _parts(counts)
    return _ratio(hits, hits + missed, counts, empty)


def volume_difference(counts: Tensor, empty: EmptyPolicy = "one") -> Tensor:
    """Return the relative difference of volumes (FP - FN) / (TP + FN) of each class, signed.

    Above 0 too much is found, below 0 too little; it says nothing of the place. There is no
    worst value: where the truth is empty it is NaN, but 0 if the prediction is empty too and the
    policy is "one".

    Args:
        counts: as of `dice`.
        empty: as of `dice`.

    Returns:
        float64, at least -1, (..., n_classes).

    Raises:
        ValueError: as of `dice`.

    Example:
        >>> volume_difference(torch.tensor([[3, 1, 5], [0, 0, 0], [0, 1, 0]])).tolist()
        [-0.5, 0.0, nan]
    """
    hits, false, missed = _parts(counts)
    agreed = 0.0 if empty_score(empty) == 1 else math.nan
    there = hits + missed
    relative = (false - missed).double() / there.clamp_min(1)
    relative = relative.masked_fill(there == 0, math.nan)
    return relative.masked_fill((there == 0) & (false == 0), agreed)


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
    hits, false, missed = _parts(counts)
    return ((hits + false + missed) == 0).reshape(-1, counts.shape[-2]).sum(dim=0)


def _check_labels(prediction: Tensor, target: Tensor, n_classes: int, ignore: int | None) -> None:
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
    if ignore is not None:
        target = target[target.long() != ignore]
    bounds = [(int(x.min()), int(x.max())) if x.numel() else (0, 0) for x in (prediction, target)]
    if min(low for low, _ in bounds) < 0 or max(high for _, high in bounds) >= n_classes:
        (p_low, p_high), (t_low, t_high) = bounds
        raise ValueError(
            f"prediction spans {p_low}..{p_high} and target {t_low}..{t_high} ({shapes}), "
            f"expected labels 0..{n_classes - 1}"
        )


def _parts(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return true positives, false positives and false negatives."""
    if counts.is_floating_point() or counts.ndim < 2 or counts.shape[-1] != 3:
        raise ValueError(
            f"counts are {counts.dtype} of shape {tuple(counts.shape)}, "
            "expected integers of shape (..., n_classes, 3)"
        )
    return counts[..., 0], counts[..., 1], counts[..., 2]


def empty_score(empty: EmptyPolicy) -> float:
    """Return the score of a class that is empty in truth and prediction."""
    values = {"one": 1.0, "zero": 0.0, "nan": math.nan}
    if empty not in values:
        raise ValueError(f"empty is {empty!r}, expected one of {', '.join(get_args(EmptyPolicy))}")
    return values[empty]


def _ratio(numerator: Tensor, denominator: Tensor, counts: Tensor, empty: EmptyPolicy) -> Tensor:
    ratio = numerator.double() / denominator.clamp_min(1)
    return ratio.masked_fill((counts == 0).all(dim=-1), empty_score(empty))

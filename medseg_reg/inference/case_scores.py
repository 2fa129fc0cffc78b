"""Scores of one case beyond its counts: distances of surfaces, and calibration."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from medseg_reg.config import EvaluationSpec
from medseg_reg.data.store import CaseRow
from medseg_reg.errors import MedsegError
from medseg_reg.inference.predictor import Predictor, require_finite
from medseg_reg.metrics import (
    SurfaceDistances,
    average_surface_distance,
    calibration_counts,
    calibration_error,
    hausdorff_distance,
    pooled,
    surface_dice,
    surface_distances,
)

Array = np.ndarray[Any, np.dtype[Any]]

# Columns of the tables, and what decides whether they are there.
SURFACE = ("hd95", "assd", "surface_dice")
CALIBRATION = ("ece",)

# Pixels of which the network saw nothing, and which it says nothing about.
_UNSEEN = -1


def predict_and_calibrate(
    predictor: Predictor, images: Array, name: str, truth: Array, bins: int
) -> tuple[Array, Tensor]:
    """Return the labels (S, H, W) of a case, and its calibration counts (K, bins, 3).

    Args:
        predictor: the network.
        images: as of `Predictor.labels`.
        name: stands in errors.
        truth: the true labels (S, H, W).
        bins: number of bins.

    Raises:
        MedsegError: as of `Predictor.labels`, or the network gives no probabilities.
    """
    require_finite(images, name)
    labels = np.empty(images.shape[:3], dtype=np.uint8)
    counts = torch.zeros(1, bins, 3, dtype=torch.int64)
    for start, mean in predictor.batches(images, name, truth=truth):
        labels[start : start + len(mean)] = mean.argmax(dim=1).to(torch.uint8).cpu()
        if mean.device.type == "mps":  # which has no float64
            mean = mean.cpu()
        target = torch.from_numpy(truth[start : start + len(mean)].astype(np.int64))
        target = target.to(mean.device).masked_fill(mean.sum(dim=1) == 0, _UNSEEN)
        try:
            found = calibration_counts(mean, target, bins, ignore=_UNSEEN)
        except ValueError as error:
            raise MedsegError(f"{name}: the network gives no probabilities: {error}.") from None
        counts = counts + found.sum(dim=0).cpu()
    return labels, counts


def calibration_scores(counts: Tensor) -> list[dict[str, float]]:
    """Return the expected calibration error of each class, the background first."""
    return [{"ece": float(error)} for error in calibration_error(counts)]


def surface_scores(
    predicted: Array, truth: Array, classes: int, row: CaseRow, spec: EvaluationSpec, unit: str
) -> list[dict[str, float]]:
    """Return distances and surface Dice of each class, the background first, without scores.

    Args:
        predicted: labels (S, H, W).
        truth: the true labels.
        classes: number of classes.
        row: the case; its spacing is used.
        spec: tolerance and policies.
        unit: "mm", distances in the volume; "px", in each slice, pooled over the slices.
    """
    scores: list[dict[str, float]] = [{}]
    for label in range(1, classes):
        mine, other = predicted == label, truth == label
        if unit == "mm" and row.geometry is not None:
            found = surface_distances(mine, other, row.geometry.spacing)
        else:
            found = pooled(_of_frames(mine, other))
        scores.append(
            {
                "hd95": hausdorff_distance(found, 95, spec.empty, spec.missing),
                "assd": average_surface_distance(found, spec.empty, spec.missing),
                "surface_dice": surface_dice(found, spec.tolerance, spec.empty),
            }
        )
    return scores


def _of_frames(mine: Array, other: Array) -> list[SurfaceDistances]:
    used = (mine | other).any(axis=(1, 2))
    # One empty frame tells the diagonal where all are.
    used[0] |= not used.any()
    return [surface_distances(mine[n], other[n]) for n in np.flatnonzero(used)]

"""Scores of one case beyond its counts: distances of surfaces, and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medseg_reg.config import EvaluationSpec
from medseg_reg.data.store import CaseRow, SliceStore
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

# Pixels that do not count: of those that the network did not see, it says nothing.
_UNSEEN = -1


def distance_unit(store: SliceStore, cases: Sequence[str]) -> str:
    """Return the unit of distances: "mm" if every case has a spacing, else "px"."""
    return "px" if any(store.row(case).geometry is None for case in cases) else "mm"


def score_settings(spec: EvaluationSpec, store: SliceStore, cases: Sequence[str]) -> dict[str, Any]:
    """Return what scores depend on besides weights, split and the policy for empty classes."""
    settings: dict[str, Any] = {}
    if "surface" in spec.metrics:
        settings["surface"] = {
            "missing_policy": spec.missing,
            "tolerance": spec.tolerance,
            "unit": distance_unit(store, cases),
        }
    if "calibration" in spec.metrics:
        settings["calibration"] = {"bins": spec.bins}
    if store.ignore_label is not None:
        settings["ignore_label"] = store.ignore_label
    return settings


def predict_and_calibrate(
    predictor: Predictor,
    images: Array,
    name: str,
    truth: Array,
    bins: int,
    ignored: int | None = None,
) -> tuple[Array, Tensor]:
    """Return the labels (S, H, W) of a case, and its calibration counts (K, bins, 3).

    Args:
        predictor: the network.
        images: as of `Predictor.labels`.
        name: stands in errors.
        truth: the true labels (S, H, W).
        bins: number of bins.
        ignored: a label of the truth whose pixels are not counted.

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
        if ignored is not None:
            target = target.masked_fill(target == ignored, _UNSEEN)
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
    predicted: Array,
    truth: Array,
    classes: int,
    row: CaseRow,
    spec: EvaluationSpec,
    unit: str,
    ignored: int | None = None,
) -> list[dict[str, float]]:
    """Return distances and surface Dice of each class, the background first, without scores.

    Ignored pixels are of no class, in the prediction neither: as at the border of the image, a
    surface goes along them where a class reaches them. Where both reach them, it is the same one.

    Args:
        predicted: labels (S, H, W).
        truth: the true labels.
        classes: number of classes.
        row: the case; its spacing is used.
        spec: tolerance and policies.
        unit: "mm", distances in the volume; "px", in each slice, pooled over the slices.
        ignored: a label of the truth whose pixels do not count.
    """
    scores: list[dict[str, float]] = [{}]
    known = None if ignored is None else truth != ignored
    # Of what nothing is known, nothing is agreed.
    empty = spec.empty if known is None or known.any() else "nan"
    for label in range(1, classes):
        mine, other = predicted == label, truth == label
        if known is not None:
            mine &= known
        if unit == "mm" and row.geometry is not None:
            found = surface_distances(mine, other, row.geometry.spacing)
        else:
            found = pooled(_of_frames(mine, other))
        scores.append(
            {
                "hd95": hausdorff_distance(found, 95, empty, spec.missing),
                "assd": average_surface_distance(found, empty, spec.missing),
                "surface_dice": surface_dice(found, spec.tolerance, empty),
            }
        )
    return scores


def _of_frames(mine: Array, other: Array) -> list[SurfaceDistances]:
    used = np.asarray((mine | other).any(axis=(1, 2)))
    # One empty frame tells the diagonal where all are.
    used[0] |= not used.any()
    return [surface_distances(mine[n], other[n]) for n in np.flatnonzero(used)]

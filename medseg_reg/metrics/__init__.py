"""Scores of segmentations, each with a named policy for classes that are empty.

| what                                            | from              | file           |
|-------------------------------------------------|-------------------|----------------|
| Dice, IoU, precision, recall, volume difference | counts of voxels  | overlap.py     |
| Hausdorff and average distance, surface Dice    | surface distances | surface.py     |
| calibration error                               | counts of bins    | calibration.py |
| mean and interval over cases                    | scores            | interval.py    |
| AUROC, average precision, sensitivity           | scores of slices  | ranking.py     |

Counts add up over slices, and surface distances of frames are pooled: what is scored is the case.
"""

from medseg_reg.metrics.calibration import calibration_counts, calibration_error
from medseg_reg.metrics.interval import Interval, bootstrap_interval
from medseg_reg.metrics.overlap import (
    EmptyPolicy,
    confusion_counts,
    dice,
    empty_cases,
    iou,
    precision,
    recall,
    volume_difference,
)
from medseg_reg.metrics.ranking import (
    auroc,
    average_precision,
    sensitivity_specificity,
    threshold_at,
)
from medseg_reg.metrics.surface import (
    MissingPolicy,
    SurfaceDistances,
    average_surface_distance,
    hausdorff_distance,
    pooled,
    surface,
    surface_dice,
    surface_distances,
)

__all__ = [
    "EmptyPolicy",
    "Interval",
    "MissingPolicy",
    "SurfaceDistances",
    "auroc",
    "average_precision",
    "average_surface_distance",
    "bootstrap_interval",
    "calibration_counts",
    "calibration_error",
    "confusion_counts",
    "dice",
    "empty_cases",
    "hausdorff_distance",
    "iou",
    "pooled",
    "precision",
    "recall",
    "sensitivity_specificity",
    "surface",
    "surface_dice",
    "surface_distances",
    "threshold_at",
    "volume_difference",
]

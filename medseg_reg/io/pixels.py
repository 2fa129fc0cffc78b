"""The types in which pixels and labels are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from medseg_reg.errors import MedsegError

Array = np.ndarray[Any, np.dtype[Any]]


def narrowed(values: Array) -> Array:
    """Return pixels in the narrowest stored type that holds them exactly.

    uint8 and int16 stay as they are; other whole numbers that fit become int16; all else becomes
    float32, which for real numbers of 64 bits is the nearest value.
    """
    if values.dtype in (np.uint8, np.int16) and values.dtype.isnative:
        return values
    low, high = values.min(), values.max()
    if low >= -32768 and high <= 32767:
        whole = values.astype(np.int16)
        if values.dtype.kind in "iu" or np.array_equal(whole, values):
            return whole
    return values.astype(np.float32, copy=False)


def as_labels(path: Path | str, values: Array) -> Array:
    """Return label values as uint8.

    Raises:
        MedsegError: values that are no whole numbers from 0 to 255; `path` names the file.
    """
    if values.dtype == np.uint8:
        return values
    low, high = values.min(), values.max()
    if low < 0 or high > 255:
        raise MedsegError(f"{path}: holds labels from {low} to {high}, expected 0 to 255.")
    labels = values.astype(np.uint8)
    if values.dtype.kind == "f" and not np.array_equal(labels, values):
        odd = float(values[labels != values][0])
        raise MedsegError(
            f"{path}: holds the label {odd:g}, expected whole numbers. Was the label map "
            "resampled with interpolation? Use nearest neighbour."
        )
    return labels

"""From the gray values of a mask file to class indices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medseg_reg.errors import MedsegError

Array = np.ndarray[Any, np.dtype[Any]]


def to_classes(
    values: Array,
    path: Path,
    classes: int,
    *,
    label_values: Sequence[int] | None = None,
    threshold: int | None = None,
    ignored: int | None = None,
) -> Array:
    """Return class indices (H, W) uint8 for the gray values of a mask.

    Args:
        values: (H, W), integers.
        path: named in errors.
        classes: number of classes, with the background.
        label_values: the gray value of class 0, 1, ... in turn. By default the values are the
            indices themselves, or 0 and 255 where there are two classes.
        threshold: values above it are class 1, the others 0; for JPEG and anti-aliased masks.
        ignored: a value besides that stays as it is, for pixels of no known class.

    Raises:
        MedsegError: the mask holds other values; lists them.
    """
    if threshold is not None:
        above = (values > threshold).astype(np.uint8)
        return above if ignored is None else np.where(values == ignored, np.uint8(ignored), above)
    found = [int(value) for value in _unique(values) if value != ignored]
    expected = ", ".join(map(str, range(classes) if label_values is None else label_values))
    if label_values is None:
        label_values = range(classes)
        if classes == 2:
            expected = "0 and 1, or 0 and 255"
            label_values = (0, 255) if set(found) <= {0, 255} else (0, 1)
    if set(found) <= set(label_values):
        table = np.zeros(max(*label_values, *found, ignored or 0) + 1, np.uint8)
        table[list(label_values)] = np.arange(len(label_values))
        if ignored is not None:
            table[ignored] = ignored
        return table[values]
    if ignored is not None:
        expected += f", and {ignored}, which is ignored"
    odd = [value for value in found if value not in label_values]
    shown = ", ".join(map(str, odd[:8])) + (f" ... ({len(odd)} values)" if len(odd) > 8 else "")
    raise MedsegError(
        f"{path}: the mask holds {shown}; expected only {expected}.\n"
        + (
            "For a mask that was blurred, scaled or saved as JPEG, cut it with --threshold 127."
            if classes == 2
            else "Name the gray value of each class with --label-values, or repair the mask."
        )
    )


def check_same_shape(image: Array, mask: Array, image_path: Path, mask_path: Path) -> None:
    """Refuse an image and a mask of different sizes; names both."""
    if image.shape[:2] != mask.shape:
        raise MedsegError(
            f"{mask_path}: is {_size(mask.shape)}, but its image {image_path.name} is "
            f"{_size(image.shape)} (rows x columns). Check that they belong together."
        )


def _size(shape: Sequence[int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def _unique(values: Array) -> Array:
    """Return the values that occur; counting is much faster than sorting for 8 bits."""
    if values.dtype == np.uint8:
        return np.flatnonzero(np.bincount(values.ravel(), minlength=256))
    return np.unique(values)

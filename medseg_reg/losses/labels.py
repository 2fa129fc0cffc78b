"""What is asked of logits and labels before a loss is taken."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def check_labels(target: Tensor, n_labels: int, ignore: int | None = None) -> None:
    """Raise when a label map holds anything but 0 .. n_labels - 1 and the ignored label.

    Reads a few numbers back from the device, so on a GPU it waits for the queue to drain:
    call it once per data set, or to explain a NaN loss, not at each step.

    Args:
        target: label map of any shape, an integer or boolean type.
        n_labels: number of classes with the background (2 for a network with one channel).
        ignore: a label that is allowed besides.

    Raises:
        ValueError: `target` is not an integer type, or a label is out of range.

    Example:
        >>> check_labels(torch.tensor([[0, 1], [2, 255]]), 3, ignore=255)
        >>> check_labels(torch.tensor([[0, 1], [2, 255]]), 3)
        Traceback (most recent call last):
        ...
        ValueError: labels span 0..255, expected 0..2: remap or ignore the others before the loss
    """
    if target.is_floating_point() or target.is_complex():
        raise ValueError(f"labels are {target.dtype}, expected integers such as uint8 or int64")
    labels = target.long()
    if ignore is not None:
        labels = labels[labels != ignore]
    if labels.numel() == 0:
        return
    low, high = (int(bound) for bound in labels.aminmax())
    if low < 0 or high >= n_labels:
        besides = "" if ignore is None else f" or {ignore}, the ignored label"
        raise ValueError(
            f"labels span {low}..{high}, expected 0..{n_labels - 1}{besides}: "
            "remap or ignore the others before the loss"
        )


def check_logits(logits: Tensor) -> None:
    """Raise when logits are no floats of shape (B, K, H, W) or (B, K, D, H, W).

    Raises:
        ValueError: names type and shape.
    """
    if not logits.is_floating_point() or logits.ndim not in (4, 5) or logits.numel() == 0:
        raise ValueError(
            f"logits are {logits.dtype} of shape {tuple(logits.shape)}, "
            "expected floats of shape (B, K, H, W) or (B, K, D, H, W), none of them 0"
        )


def check_shapes(logits: Tensor, target: Tensor) -> None:
    """Raise when logits are no logits, or labels have another size.

    Raises:
        ValueError: names both shapes.
    """
    check_logits(logits)
    expected = (logits.shape[0], *logits.shape[2:])
    if tuple(target.shape) != expected:
        raise ValueError(
            f"target has shape {tuple(target.shape)}, expected {expected} for logits of shape "
            f"{tuple(logits.shape)}: labels carry no channel axis"
        )


def check_coarse(logits: Tensor, finest: Tensor) -> None:
    """Raise when an output of deep supervision does not belong to the finest one.

    Raises:
        ValueError: names both shapes.
    """
    check_logits(logits)
    if logits.shape[:2] != finest.shape[:2] or logits.ndim != finest.ndim:
        raise ValueError(
            f"an output has the shape {tuple(logits.shape)}, the first {tuple(finest.shape)}: "
            "expected the same batch, channels and number of axes"
        )


def zero_or_nan(logits: Tensor, labels: Tensor, n_labels: int, ignore: int | None) -> Tensor:
    """Return 0, or NaN if a logit is not finite or a label is out of range, without a sync."""
    zero = (logits.detach() * 0).sum()
    good = (labels >= 0) & (labels < n_labels)
    if ignore is not None:
        good |= labels == ignore
    return zero.masked_fill(~good.all(), math.nan)


def one_hot(labels: Tensor, first: int, channels: int, counted: Tensor | None) -> Tensor:
    """Return float32 masks (B, channels - first, *spatial) of the classes from `first` on.

    Args:
        labels: int64, (B, *spatial).
        first: first class.
        channels: one past the last class.
        counted: where pixels count, (B, 1, *spatial); the masks are 0 elsewhere.
    """
    classes = torch.arange(first, channels, device=labels.device)
    masks = labels.unsqueeze(1) == classes.view(1, -1, *[1] * (labels.ndim - 1))
    return (masks if counted is None else masks & counted).float()


def two_classes(logits: Tensor) -> Tensor:
    """Return logits of two classes, (0, x), in the place of one channel x; others as they are.

    Softmax over (0, x) is the sigmoid of x: one code path serves both.
    """
    return torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits


def resized(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Return logits (B, K, *spatial) interpolated linearly to a spatial size."""
    if tuple(logits.shape[2:]) == tuple(size):
        return logits
    mode = "bilinear" if logits.ndim == 4 else "trilinear"
    return F.interpolate(logits, size=tuple(size), mode=mode, align_corners=False)

"""Weights of terms, classes and outputs, and what is asked of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Supervision = Literal["equal", "halving"]
"""Weights of the outputs under deep supervision: 1, 1, 1, ... or 1, 1/2, 1/4, ..."""


def check_weights(values: Sequence[float], name: str) -> None:
    """Raise when weights are negative, not finite, or all 0; `name` begins the message."""
    if any(not math.isfinite(value) or value < 0 for value in values) or not any(values):
        raise ValueError(f"{name}: expected finite values >= 0, at least one of them > 0")


def check_count(weights: Tensor | None, name: str, expected: int) -> None:
    """Raise when there are weights, but not as many as classes."""
    if weights is not None and len(weights) != expected:
        raise ValueError(
            f"{name} hold {len(weights)} values, expected {expected}: one per class (for one "
            "channel: [background, foreground])"
        )


def weights_of(values: Sequence[float] | Tensor | None, name: str) -> Tensor | None:
    """Return weights of classes as a tensor, checked."""
    if values is None:
        return None
    weights = torch.as_tensor(values, dtype=torch.float32).detach().clone()
    if weights.ndim != 1:
        raise ValueError(f"{name} have shape {tuple(weights.shape)}, expected one value per class")
    check_weights(weights.tolist(), f"{name} {weights.tolist()}")
    return weights


def check_supervision(supervision: str | Sequence[float]) -> str | tuple[float, ...]:
    """Return weights of outputs, or their name, checked."""
    if isinstance(supervision, str):
        if supervision not in get_args(Supervision):
            raise ValueError(
                f"supervision is {supervision!r}, expected 'equal', 'halving' or a list of weights"
            )
        return supervision
    weights = tuple(float(weight) for weight in supervision)
    check_weights(weights, f"supervision {list(weights)}")
    return weights


def supervision_shares(supervision: str | tuple[float, ...], count: int) -> list[float]:
    """Return the weights of `count` outputs, divided by their sum.

    Example:
        >>> supervision_shares("equal", 4), supervision_shares("halving", 2)
        ([0.25, 0.25, 0.25, 0.25], [0.6666666666666666, 0.3333333333333333])
    """
    if count == 0:
        raise ValueError("logits are an empty list, expected at least one output")
    # A network under deep supervision returns one output when it is evaluated.
    if count == 1:
        return [1.0]
    if isinstance(supervision, tuple):
        weights = list(supervision)
        if len(weights) != count:
            raise ValueError(
                f"supervision holds {len(weights)} weights for {count} outputs: give one each"
            )
    else:
        base = 1.0 if supervision == "equal" else 0.5
        weights = [base**level for level in range(count)]
    return [weight / sum(weights) for weight in weights]

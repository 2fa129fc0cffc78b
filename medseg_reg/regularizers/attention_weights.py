"""The weights of an attention: what they look like, and taking keys out of them."""

from __future__ import annotations

import torch
from torch import Tensor

from medseg_reg.regularizers.base import check_map

__all__ = ["check_tokens", "check_weights", "hide_keys"]

_LEAST = 1e-20  # of a row: what is left cannot be scaled up further in float32


def check_weights(x: Tensor, owner: str) -> None:
    """Raises a ValueError unless ``x`` is a floating (B, heads, queries, keys) tensor."""
    check_map(x, owner)
    if x.dim() != 4:
        raise ValueError(
            f"{owner}: expected attention weights (B, heads, queries, keys), "
            f"got shape {tuple(x.shape)}"
        )


def hide_keys(weights: Tensor, keep: Tensor) -> Tensor:
    """Zeroes attention weights and scales the others of their row up to the sum it had.

    Of weights that come out of a softmax this is the same as to take the keys out before it:
    softmax(z) m / sum(softmax(z) m) = exp(z) m / sum(exp(z) m). A row whose kept keys have no
    weight stays as it is; so does one with NaN.

    Args:
        weights: (..., keys), rows of an attention.
        keep: which to keep, boolean, of a shape that broadcasts.

    Example:
        >>> import torch
        >>> hide_keys(torch.tensor([0.5, 0.25, 0.25]), torch.tensor([False, True, True]))
        tensor([0.0000, 0.5000, 0.5000])
    """
    half = weights.dtype in (torch.float16, torch.bfloat16)
    rows = weights.float() if half else weights
    total = rows.sum(-1, keepdim=True)
    share = torch.where(keep, rows, 0.0).sum(-1, keepdim=True)
    share = share / torch.where(total == 0, 1.0, total)
    usable = share > _LEAST
    kept = torch.where(keep | ~usable, rows, 0.0)
    return (kept / torch.where(usable, share, 1.0)).to(weights.dtype)


def check_tokens(value: object, owner: str) -> int:
    """Returns ``value`` if it is a whole number of tokens, or raises a ValueError."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{owner}: prefix_tokens must be a whole number, 0 or more; got {value!r}")
    return value

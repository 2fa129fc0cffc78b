"""The slices of a case, made ready when they are asked for, so that no second volume is held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from medseg_reg.io.pixels import narrowed

Array = np.ndarray[Any, np.dtype[Any]]

BLOCK = 16


class Slices(Protocol):
    """What is asked of images (S, H, W) or (S, H, W, C); arrays and `LazySlices` have it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Slices, rows, columns, and channels where there are several."""

    @property
    def ndim(self) -> int:
        """3 or 4."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the pixels."""

    def __len__(self) -> int:
        """Return the number of slices."""

    def __getitem__(self, key: Any) -> Array:
        """Return a slice, or some slices in a row."""


class LazySlices:
    """An array of slices of which a change is applied to those that are asked for.

    Args:
        stored: (S, H, W) or (S, H, W, C); may be a view or memory-mapped.
        change: maps some of its slices to as many; a slice must not depend on the others.
        dtype: the type that `change` gives.

    Example:
        >>> slices = LazySlices(np.ones((5, 2, 2), np.int16), lambda block: block * 0.5, np.float32)
        >>> slices[1:3].shape, float(slices[4].max())
        ((2, 2, 2), 0.5)
    """

    def __init__(self, stored: Array, change: Callable[[Array], Array], dtype: Any) -> None:
        self.stored, self.change = stored, change
        self.shape, self.ndim, self.dtype = stored.shape, stored.ndim, np.dtype(dtype)

    def __len__(self) -> int:
        """Return the number of slices."""
        return len(self.stored)

    def __getitem__(self, key: int | slice) -> Array:
        """Return a slice, or some slices in a row, with the change applied."""
        if isinstance(key, slice):
            return self.change(self.stored[key]).astype(self.dtype, copy=False)
        one: Array = self[key : key + 1 or None][0]
        return one

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        """Return all slices, for what cannot do with some of them, such as filters.

        In the type in which a slice store would hold them, so that they are no other ones.
        """
        if copy is False:
            raise ValueError("the slices are made when they are asked for, so they are a copy")
        whole = np.empty(self.shape, self.dtype)
        for start in range(0, len(self), BLOCK):
            whole[start : start + BLOCK] = self[start : start + BLOCK]
        whole = narrowed(whole)
        return whole if dtype is None else whole.astype(dtype, copy=False)

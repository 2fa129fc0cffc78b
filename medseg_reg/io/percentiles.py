"""Percentiles of all pixels of a volume, in the memory of a few of its slices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

# Up to so many pixels are sorted at once, and so many are counted at once.
WHOLE = BLOCK = 1 << 20
_HALF = 16


def percentiles(slices: Any, q: Sequence[float]) -> tuple[float, ...]:
    """Return percentiles of all pixels, interpolated linearly between ranks: `np.percentile`.

    Sorting a volume takes another one. Here pixels are counted instead, by the upper half of their
    bits and then, among those of equal upper half, by the lower one, which says the very pixel of
    each rank. Slices are read once (8 and 16 bits) or twice (32 bits), a few at a time.

    Args:
        slices: (S, ...), an array, or anything with `shape`, `dtype` and slices in a row; finite.
        q: percentiles, from 0 to 100.

    Example:
        >>> percentiles(np.arange(5, dtype=np.int16)[:, None], (0, 50, 90))
        (0.0, 2.0, 3.6)
    """
    size = int(np.prod(slices.shape, dtype=np.int64))
    # Files may have the bytes of a number in the order of other machines.
    dtype = np.dtype(slices.dtype).newbyteorder("=")
    if size <= WHOLE or dtype.name not in _SIGNS:
        return tuple(float(v) for v in np.percentile(np.asarray(slices), q))
    at = (size - 1) * (np.asarray(q, np.float64) / 100)
    below = np.floor(at).astype(np.int64)
    ranks = np.unique(np.concatenate([below, np.minimum(below + 1, size - 1)]))
    found = _pixels_of_ranks(slices, dtype, ranks)
    value = dict(zip(ranks.tolist(), found.tolist(), strict=True))
    result = []
    for place, first in zip(at.tolist(), below.tolist(), strict=True):
        low, high = value[first], value[min(first + 1, size - 1)]
        # As NumPy does it: in the type of the pixels, and from the nearer of the two.
        step = float(dtype.type(high) - dtype.type(low)) if dtype.kind == "f" else high - low
        share = place - first
        result.append(low + step * share if share < 0.5 else high - step * (1 - share))
    return tuple(float(v) for v in result)


def _pixels_of_ranks(slices: Any, dtype: np.dtype[Any], ranks: Array) -> Array:
    """Return the pixels that would stand at some places if all were sorted."""
    wide = dtype.itemsize == 4
    upper = np.zeros(1 << (8 * min(dtype.itemsize, 2)), np.int64)
    for keys in _keys(slices, dtype):
        upper += np.bincount(keys >> _HALF if wide else keys, minlength=len(upper))
    ends = np.cumsum(upper)
    bins = np.searchsorted(ends, ranks, side="right")
    if not wide:
        return _values(bins, dtype)
    lower = {int(b): np.zeros(1 << _HALF, np.int64) for b in bins}
    for keys in _keys(slices, dtype):
        high = keys >> _HALF
        for b, counts in lower.items():
            here = keys[high == b] & ((1 << _HALF) - 1)
            counts += np.bincount(here, minlength=len(counts))
    inside = ranks - (ends - upper)[bins]
    low = [
        np.searchsorted(np.cumsum(lower[int(b)]), rank, side="right")
        for b, rank in zip(bins, inside, strict=True)
    ]
    return _values((bins << _HALF) | np.array(low), dtype)


# Bits that are turned over so that unsigned numbers are in the order of the pixels.
_SIGNS = {
    "uint8": 0,
    "uint16": 0,
    "int16": 1 << 15,
    "uint32": 0,
    "int32": 1 << 31,
    "float32": 1 << 31,
}


def _keys(slices: Any, dtype: np.dtype[Any]) -> Iterator[Array]:
    """Yield the pixels of some slices as unsigned numbers in the order of the pixels."""
    each = max(1, int(np.prod(slices.shape[1:], dtype=np.int64)))
    count = max(1, BLOCK // each)
    for start in range(0, len(slices), count):
        block = np.ascontiguousarray(slices[start : start + count], dtype).ravel()
        bits = block.view(f"u{dtype.itemsize}")
        keys = bits ^ bits.dtype.type(_SIGNS[dtype.name])
        if dtype.kind == "f":
            # Of two negative numbers the one of more bits is the lower one.
            negative = bits >> 31 == 1
            keys[negative] = ~bits[negative]
        yield keys


def _values(keys: Array, dtype: np.dtype[Any]) -> Array:
    """Return the pixels of some keys."""
    bits = keys.astype(f"u{dtype.itemsize}")
    sign = bits.dtype.type(_SIGNS[dtype.name])
    as_stored: Array = bits ^ sign
    if dtype.kind == "f":
        as_stored = np.where(bits & sign, as_stored, ~bits)
    return as_stored.view(dtype)

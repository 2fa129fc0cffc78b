"""Loops of Heuristic Dropout that numba compiles; importing this module imports numba.

`loops.py` decides when they are used. The plain rules that they equal are
`histogram.plain_sums`, `heuristic._scores` and `planes.plain_filter`. Maps come as NumPy arrays of
float32, or of int16 with the bits of bfloat16, which NumPy does not know.

No function starts threads: numba's own would wait for the same cores as torch's do, and do not
outlive a fork. All give up the interpreter's lock. Sums may be taken in any order, which lets the
processor take several at once; NaN and infinity are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import overload

__all__ = ["filter_planes", "sums_of_planes", "sums_of_rows", "top_of_planes", "top_of_rows"]

_TILE = 4096  # values: they stay in the nearest cache, and a count of them fits into 16 bits
_OPTIONS = {"nogil": True, "fastmath": {"reassoc", "nsz", "contract"}, "error_model": "numpy"}
# Any: numba has types since 0.68, and took dictionaries of options before.
_njit: Any = numba.njit
_compiled = _njit(**_OPTIONS)


def _kept(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles and keeps the machine code for other processes, where a folder can be written."""
    try:
        return _njit(cache=True, **_OPTIONS)(function)  # type: ignore[no-any-return]
    except RuntimeError:
        return _compiled(function)  # type: ignore[no-any-return]


def _exact(value: Any) -> Any:
    """The value as float32."""
    raise NotImplementedError


@overload(_exact)
def _(value):  # type: ignore[no-untyped-def]
    if isinstance(value, types.Integer):
        return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)
    return lambda value: value


def _rounded(value: Any, like: Any) -> Any:
    """A float32 as an element of the kind of ``like``, rounded to the nearest even."""
    raise NotImplementedError


@overload(_rounded)
def _(value, like):  # type: ignore[no-untyped-def]
    def bits_of(value, like):  # type: ignore[no-untyped-def]
        bits = np.float32(value).view(np.uint32)
        upper = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
        upper = upper if value == value else np.uint32(0x7FC00000)
        return np.int16(np.uint16(upper >> np.uint32(16)))

    if isinstance(like, types.Integer):
        return bits_of
    return lambda value, like: value


def _reaches(value: Any, threshold: Any) -> Any:
    """1 if a value is at or above a threshold of its type, else 0.

    As wide as the value: so many are counted side by side.
    """
    raise NotImplementedError


@overload(_reaches)
def _(value, threshold):  # type: ignore[no-untyped-def]
    def bits(value, threshold):  # type: ignore[no-untyped-def]
        # positive halves are ordered as their bits are, negative ones against them
        if threshold >= 0:
            return np.int16(value >= threshold)
        return np.int16(np.uint16(value) <= np.uint16(threshold))

    if isinstance(value, types.Integer):
        return bits
    return lambda value, threshold: np.int32(value >= threshold)


def _sum(first: Any, second: Any) -> Any:
    """The sum of two counts, as wide as they are."""
    raise NotImplementedError


@overload(_sum)
def _(first, second):  # type: ignore[no-untyped-def]
    if first.bitwidth == 16:
        return lambda first, second: np.int16(first + second)
    return lambda first, second: np.int32(first + second)


@_compiled
def _reached(tile, threshold):  # type: ignore[no-untyped-def]
    """How many values of a tile are at or above a threshold."""
    count = _reaches(tile[0], threshold)
    for i in range(1, tile.size):
        count = _sum(count, _reaches(tile[i], threshold))
    return count


@_compiled
def _moments(tile):  # type: ignore[no-untyped-def]
    total = squares = np.float32(0)
    for i in range(tile.size):
        value = _exact(tile[i])
        total += value
        squares += value * value
    return total, squares


@_compiled
def _deviations(plane):  # type: ignore[no-untyped-def]
    """The sum of squared deviations from the mean."""
    total = squares = 0.0
    for start in range(0, plane.size, _TILE):
        part = _moments(plane[start : start + _TILE])
        total += part[0]
        squares += part[1]
    found = squares - total * total / plane.size
    # a mean far from 0 cancels; constant channels must have a variance of exactly 0
    if (found > 0.1 * squares and squares < np.inf) or squares == 0:
        return found
    total = found = 0.0
    for i in range(plane.size):
        total += np.float64(_exact(plane[i]))
    mean = total / plane.size
    for i in range(plane.size):
        difference = np.float64(_exact(plane[i])) - mean
        found += difference * difference
    return found


@_compiled
def _add_counts(tile, thresholds, counts):  # type: ignore[no-untyped-def]
    """Adds to the counts of rising thresholds; none is reached beyond one that is not."""
    for level in range(thresholds.size):
        count = _reached(tile, thresholds[level])
        if count == 0:
            break
        counts[level] += count


@_kept
def sums_of_planes(planes, thresholds, out):  # type: ignore[no-untyped-def]
    """Writes squared deviations and counts (n, 1 + levels) of planes (n, pixels)."""
    counts = np.empty(thresholds.size, np.int64)
    for n in range(planes.shape[0]):
        out[n, 0] = _deviations(planes[n])
        counts[:] = 0
        for start in range(0, planes.shape[1], _TILE):
            _add_counts(planes[n, start : start + _TILE], thresholds, counts)
        out[n, 1:] = counts


@_compiled
def _entropy(counts, pixels, signed):  # type: ignore[no-untyped-def]
    """In nats, of the levels between rising thresholds and of the one beyond the last."""
    # signed: every value reaches the lowest level, which has no threshold
    above = pixels if signed else counts[0]
    total, found = max(above, 1), 0.0
    for level in range(0 if signed else 1, counts.size + 1):
        beyond = counts[level] if level < counts.size else 0
        if above > beyond:
            share = (above - beyond) / total
            found -= share * math.log(share)
        above = beyond
    return found


@_compiled
def _weight(deviations, pixels, k):  # type: ignore[no-untyped-def]
    """The share of the variance in a score: k / (V + 1e-7)."""
    variance = np.float32(np.float32(deviations) / np.float32(max(pixels - 1, 1)))
    return np.float32(np.float32(1) / (variance + np.float32(1e-7)) * np.float32(k))


@_compiled
def _of_rank(values, rank):  # type: ignore[no-untyped-def]
    """The value with ``rank`` others below or beside it: np.partition takes 6 s to compile."""
    values = values.copy()
    low, high = 0, values.size - 1
    while low < high:  # Hoare's selection
        pivot, i, j = values[(low + high) // 2], low, high
        while i <= j:
            while values[i] < pivot:
                i += 1
            while values[j] > pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if rank <= j:
            high = j
        elif rank >= i:
            low = i
        else:
            break
    return values[rank]


@_kept
def top_of_planes(planes, thresholds, k, signed, most, out):  # type: ignore[no-untyped-def]
    """Writes scores (B, C) of planes (B, C, pixels): `heuristic._top_scores`, -inf for NaN too."""
    pixels = planes.shape[2]
    counts = np.empty(thresholds.size, np.int64)
    spread = math.log(thresholds.size + 1) + 1e-3
    for b in range(planes.shape[0]):
        for c in range(planes.shape[1]):
            weight = _weight(_deviations(planes[b, c]), pixels, k)
            out[b, c] = weight if abs(weight) < np.inf else -np.inf
        bar = _of_rank(out[b], out.shape[1] - most)
        for c in range(planes.shape[1]):
            if not out[b, c] * np.float32(1.0001) + spread >= bar or out[b, c] == -np.inf:
                out[b, c] = -np.inf
                continue
            counts[:] = 0
            for start in range(0, pixels, _TILE):
                _add_counts(planes[b, c, start : start + _TILE], thresholds, counts)
            out[b, c] += np.float32(_entropy(counts, pixels, signed))


@_compiled
def _add_row_moments(rows, total, squares):  # type: ignore[no-untyped-def]
    """Adds the sums, and those of squares, of some rows to those of the channels."""
    total_here = np.zeros(rows.shape[1], np.float32)
    squares_here = np.zeros(rows.shape[1], np.float32)
    for r in range(rows.shape[0]):
        row = rows[r]
        for c in range(row.size):
            value = _exact(row[c])
            total_here[c] += value
            squares_here[c] += value * value
    for c in range(total.size):
        total[c] += total_here[c]
        squares[c] += squares_here[c]


@_compiled
def _deviations_from(rows, c):  # type: ignore[no-untyped-def]
    total = found = 0.0
    for r in range(rows.shape[0]):
        total += np.float64(_exact(rows[r, c]))
    mean = total / rows.shape[0]
    for r in range(rows.shape[0]):
        difference = np.float64(_exact(rows[r, c])) - mean
        found += difference * difference
    return found


@_compiled
def _add_row_counts(rows, threshold, counts):  # type: ignore[no-untyped-def]
    """Adds, for each channel, how many of some rows reach a threshold; four rows at once."""
    fours = rows.shape[0] // 4 * 4
    for r in range(0, fours, 4):
        first, second, third, fourth = rows[r], rows[r + 1], rows[r + 2], rows[r + 3]
        for c in range(counts.size):
            pair = _sum(_reaches(first[c], threshold), _reaches(second[c], threshold))
            other = _sum(_reaches(third[c], threshold), _reaches(fourth[c], threshold))
            counts[c] = _sum(counts[c], _sum(pair, other))
    for r in range(fours, rows.shape[0]):
        row = rows[r]
        for c in range(counts.size):
            counts[c] = _sum(counts[c], _reaches(row[c], threshold))


@_kept
def sums_of_rows(rows, thresholds, out):  # type: ignore[no-untyped-def]
    """Writes squared deviations and counts (C, 1 + levels) of rows (pixels, C)."""
    pixels, channels = rows.shape
    total, squares = np.zeros(channels), np.zeros(channels)
    reached = np.zeros((thresholds.size, channels), np.int64)
    counts = np.empty(channels, np.int32)
    step = max(1, _TILE // channels)
    for start in range(0, pixels, step):
        part = rows[start : start + step]
        _add_row_moments(part, total, squares)
        for level in range(thresholds.size):
            counts[:] = 0
            _add_row_counts(part, thresholds[level], counts)
            for c in range(channels):
                reached[level, c] += counts[c]
    for c in range(channels):
        out[c, 0] = squares[c] - total[c] * total[c] / pixels
        if not ((out[c, 0] > 0.1 * squares[c] and squares[c] < np.inf) or squares[c] == 0):
            out[c, 0] = _deviations_from(rows, c)
        for level in range(thresholds.size):
            out[c, 1 + level] = reached[level, c]


@_kept
def top_of_rows(rows, thresholds, k, signed, out):  # type: ignore[no-untyped-def]
    """The same for rows (B, pixels, C), whose channels lie side by side: exact for all."""
    pixels = rows.shape[1]
    sums = np.empty((rows.shape[2], 1 + thresholds.size))
    for b in range(rows.shape[0]):
        sums_of_rows(rows[b], thresholds, sums)
        for c in range(rows.shape[2]):
            score = _weight(sums[c, 0], pixels, k) + np.float32(
                _entropy(sums[c, 1:], pixels, signed)
            )
            out[b, c] = score if abs(score) < np.inf else -np.inf


@_compiled
def _write_laplacian(slab, centre, factor, result):  # type: ignore[no-untyped-def]
    """Of one slice (h, w): ``slab`` is the sum over neighbouring slices, with a border of zeros."""
    for h in range(result.shape[0]):
        above, here, below = slab[h], slab[h + 1], slab[h + 2]
        middle, row = centre[h + 1], result[h]
        for w in range(row.size):
            around = above[w] + above[w + 1] + above[w + 2]
            around += here[w] + here[w + 1] + here[w + 2]
            around += below[w] + below[w + 1] + below[w + 2]
            row[w] = _rounded(factor * middle[w + 1] - around, row[w])


@_kept
def filter_planes(x, out, index, chosen, factor, zero):  # type: ignore[no-untyped-def]
    """Writes the Laplacian, or zeros, over the chosen planes of a copy: `planes.plain_filter`.

    Maps (B, C, d, h, w), axes that they do not have being 1; ``factor`` is 3 for each they have.
    """
    deep, high, wide = x.shape[2:]
    padded = np.zeros((deep, high + 2, wide + 2), np.float32)
    slab = np.empty_like(padded[0])
    for b in range(index.shape[0]):
        for n in range(index.shape[1]):
            if not chosen[b, n]:
                continue
            plane, result = x[b, index[b, n]], out[b, index[b, n]]
            if zero:
                result[:] = _rounded(np.float32(0), x[0, 0, 0, 0, 0])
                continue
            for d in range(deep):
                for h in range(high):
                    row, target = plane[d, h], padded[d, h + 1]
                    for w in range(wide):
                        target[w + 1] = _exact(row[w])
            if deep == 1:
                _write_laplacian(padded[0], padded[0], np.float32(factor), result[0])
                continue
            for d in range(deep):
                slab[:] = padded[d]
                if d > 0:
                    slab += padded[d - 1]
                if d < deep - 1:
                    slab += padded[d + 1]
                _write_laplacian(slab, padded[d], np.float32(factor), result[d])

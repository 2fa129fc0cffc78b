"""AutoDropout's pattern: tiled rectangles, rotated and sheared, at a random place.

Of the method the layer alone: which pattern to use is a parameter here. The published search, a
controller that is trained to propose patterns, is a sampler of `medseg_reg.study.search`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from medseg_reg.regularizers.base import (
    Regularizer,
    check_count,
    check_map,
    check_rate,
    register,
)

__all__ = ["AutoDropout", "auto_dropout", "pattern_coverage"]

_Pair = int | Sequence[int]


class _Pattern(NamedTuple):
    """A checked pattern: rectangles, gaps, tiles an axis, and (row, column) = matrix (u, v)."""

    sides: tuple[int, int]
    gaps: tuple[int, int]
    repeat: int | None
    matrix: tuple[tuple[float, float], tuple[float, float]]


def pattern_coverage(
    size: Sequence[int],
    pattern_size: _Pair = (4, 3),
    stride: _Pair = 1,
    repeat: int | None = None,
    rotate: float = 0.0,
    shear_x: float = 0.0,
    shear_y: float = 0.0,
) -> float:
    """The share of a map that one pattern of `AutoDropout` drops on average.

    It is the same for every pixel, exactly: the pattern's place is uniform over all places where
    its bounding box touches the map, so each pixel is hit with the area of the rectangles divided
    by that of those places. Without end (``repeat=None``) it is the share that they fill.

    Args:
        size: height and width of the map.
        pattern_size: height and width of a rectangle, the ``size`` of `AutoDropout`.
        stride: gaps between rectangles.
        repeat: tiles in each direction; None tiles without end.
        rotate: degrees.
        shear_x: columns for each row.
        shear_y: rows for each column.

    Raises:
        ValueError: a bad parameter.

    Example:
        >>> pattern_coverage((64, 64), pattern_size=(4, 3), stride=1)  # 4 * 3 of 5 * 4
        0.6
        >>> round(pattern_coverage((64, 64), pattern_size=(4, 3), stride=1, repeat=3), 4)
        0.019
    """
    pattern = _pattern(
        pattern_size, stride, repeat, rotate, shear_x, shear_y, False, "pattern_coverage"
    )
    return _coverage(size, pattern)


def auto_dropout(
    x: Tensor,
    p: float = 0.1,
    size: _Pair = (4, 3),
    stride: _Pair = 1,
    repeat: int | None = None,
    rotate: float = 0.0,
    shear_x: float = 0.0,
    shear_y: float = 0.0,
    share_c: bool = True,
    training: bool = True,
    *,
    faithful: bool = False,
) -> Tensor:
    """Zeroes a pattern of tiled rectangles; see `AutoDropout`.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> (auto_dropout(torch.ones(1, 1, 5, 8), p=0.2, size=2, stride=2)[0, 0] == 0).int()
        tensor([[0, 0, 0, 0, 0, 0, 0, 0],
                [1, 1, 0, 0, 1, 1, 0, 0],
                [1, 1, 0, 0, 1, 1, 0, 0],
                [0, 0, 0, 0, 0, 0, 0, 0],
                [0, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.int32)
    """
    p = check_rate(p, "auto_dropout")
    pattern = _pattern(size, stride, repeat, rotate, shear_x, shear_y, faithful, "auto_dropout")
    if not training or p == 0.0:
        return x
    check_map(x, "auto_dropout")
    if x.dim() != 4:
        raise ValueError(
            "AutoDropout: the patterns are two-dimensional, expected (B, C, H, W), "
            f"got shape {tuple(x.shape)}"
        )
    if x.numel() == 0:
        return x
    with torch.no_grad():
        units = (x.shape[0], 1 if share_c else x.shape[1], 1, 1)
        if faithful:
            keep = _hits(x, units, pattern).logical_not_()
            kept = keep.sum((1, 2, 3), keepdim=True)
            scale = torch.where(kept > 0, keep * (keep[0].numel() / kept.clamp(min=1)), 1.0)
        else:
            coverage = _coverage(x.shape[2:], pattern)
            used = torch.rand(units, device=x.device) < p / coverage
            keep = (_hits(x, units, pattern) & used).logical_not_()
            scale = keep / (1.0 - min(p, coverage))
        scale = scale.to(x.dtype)
    return x * scale


@register("auto_dropout")
class AutoDropout(Regularizer):
    """Zeroes a pattern of tiled, rotated and sheared rectangles at a random place.

    Rectangles of ``size`` are tiled with gaps of ``stride`` pixels, sheared and rotated, and put
    at a place that is drawn for every sample (and channel, without ``share_c``), uniform over all
    places where the pattern touches the map. Pixels under a rectangle are dropped. A pattern
    drops the share d of the map, `pattern_coverage`, the same for each pixel. A sample gets its
    pattern with probability min(1, p / d), so that the share of dropped pixels is p, and
    y = x * keep / (1 - p).

    **Where d < p the rate is d**, and the rescaling follows it: a pattern of few tiles cannot
    cover more of a large map. Tiles without end (the default) have d = 0.6 with the default
    sides, on any map.

    A map smaller than a rectangle may be dropped whole, with all channels if they share it.

    Args:
        p: share of pixels to drop, in [0, 1).
        size: height and width of a rectangle, or one number for both.
        stride: gaps between rectangles below and beside each other, or one number for both.
        repeat: tiles in each direction; None tiles without end.
        rotate: degrees, counter-clockwise.
        shear_x: columns by which the pattern moves for each row (before the rotation).
        shear_y: rows by which it then moves for each column.
        share_c: one pattern for all channels, or one at its own place for each.
        faithful: the published use instead: see below.

    Shapes:
        (B, C, H, W) alone; the output is alike.

    Raises:
        ValueError: a bad parameter, ``faithful`` without ``repeat``, or an input of another shape
            or kind.

    Paper:
        H. Pham, Q. V. Le, "AutoDropout: Learning Dropout Patterns to Regularize Deep Networks",
        AAAI 2021, 35(11):9351-9359, arXiv 2101.01761.
        The published use (``faithful=True``) applies the pattern to every sample and rescales by
        its Size / Sum, equation 1, here those of the sample's mask; a sample that the pattern
        covers whole is left as it is. p then only switches the layer on; the rate is d, less
        what such samples miss. The paper puts it at the output of normalisation layers, with
        parameters that its search finds. It gives no defaults; the rectangle here is that of its
        figure. The order of shears and rotation and how a place is drawn are not stated either.
        Its token `residual`, whether the pattern goes to the residual branch as well, is a choice
        of places here: "after_norm" alone, or with "residual".

    Example:
        >>> import torch
        >>> layer = AutoDropout(p=0.2, size=5, stride=2, rotate=30)
        >>> x = torch.ones(500, 2, 24, 32)
        >>> abs(layer.measured_rate(x, layer(x)) - 0.2) < 0.05
        True
    """

    default_places = ("after_norm",)
    unit = "pattern of pixels"
    paper = "Pham and Le, AAAI 2021"
    spatial_dims = (2,)

    def __init__(
        self,
        p: float = 0.1,
        size: _Pair = (4, 3),
        stride: _Pair = 1,
        repeat: int | None = None,
        rotate: float = 0.0,
        shear_x: float = 0.0,
        shear_y: float = 0.0,
        share_c: bool = True,
        faithful: bool = False,
    ) -> None:
        super().__init__(p)
        _pattern(size, stride, repeat, rotate, shear_x, shear_y, faithful, type(self).__name__)
        self.size: _Pair = size if isinstance(size, int) else tuple(size)
        self.stride: _Pair = stride if isinstance(stride, int) else tuple(stride)
        self.repeat = repeat
        self.rotate = float(rotate)
        self.shear_x = float(shear_x)
        self.shear_y = float(shear_y)
        self.share_c = bool(share_c)
        self.faithful = bool(faithful)

    def regularize(self, x: Tensor) -> Tensor:
        """Applies `auto_dropout`."""
        return auto_dropout(
            x,
            self.p,
            self.size,
            self.stride,
            self.repeat,
            self.rotate,
            self.shear_x,
            self.shear_y,
            self.share_c,
            faithful=self.faithful,
        )


def _pattern(
    size: _Pair,
    stride: _Pair,
    repeat: int | None,
    rotate: float,
    shear_x: float,
    shear_y: float,
    faithful: bool,
    owner: str,
) -> _Pattern:
    """Checks the parameters and works out the matrix rotation * shear_y * shear_x."""
    sides, gaps = _pair(size, "size", owner), _pair(stride, "stride", owner)
    if repeat is not None:
        check_count(repeat, "repeat", owner)
    elif faithful:
        raise ValueError(
            f"{owner}: the published pattern has a number of tiles; faithful=True needs repeat, "
            "for example repeat=3"
        )
    for name, value in (("rotate", rotate), ("shear_x", shear_x), ("shear_y", shear_y)):
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not (number and -math.inf < value < math.inf):
            raise ValueError(f"{owner}: {name} must be a finite number, got {value!r}")
    angle = math.radians(rotate)
    cos, sin = math.cos(angle), math.sin(angle)
    (a, b), (c, d) = (1.0 + shear_x * shear_y, shear_y), (shear_x, 1.0)  # first by columns
    matrix = ((cos * a - sin * c, cos * b - sin * d), (sin * a + cos * c, sin * b + cos * d))
    return _Pattern(sides, gaps, repeat, matrix)


def _pair(value: _Pair, name: str, owner: str) -> tuple[int, int]:
    """(height, width) of a pair or of one number for both."""
    both = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(both) != 2:
        raise ValueError(f"{owner}: {name} must be one number or (height, width), got {value!r}")
    height, width = (check_count(v, name, owner) for v in both)
    return height, width


def _bounds(pattern: _Pattern, tiles: int) -> list[tuple[float, float]]:
    """The least and the greatest row, and column, of a pattern whose origin is at 0."""
    height, width = (
        tiles * (side + gap) - gap for side, gap in zip(pattern.sides, pattern.gaps, strict=True)
    )
    return [
        (min(0.0, a * height) + min(0.0, b * width), max(0.0, a * height) + max(0.0, b * width))
        for a, b in pattern.matrix
    ]


def _coverage(size: Sequence[int], pattern: _Pattern) -> float:
    """The probability with which a pixel is dropped by a pattern."""
    area = math.prod(pattern.sides)
    if pattern.repeat is None:
        return area / math.prod([s + g for s, g in zip(pattern.sides, pattern.gaps, strict=True)])
    bounds = _bounds(pattern, pattern.repeat)
    # the matrix has determinant 1: what is sheared and rotated keeps its area
    places = [n - 1 + high - low for n, (low, high) in zip(size, bounds, strict=True)]
    return area * pattern.repeat**2 / math.prod(places)


def _hits(x: Tensor, units: tuple[int, ...], pattern: _Pattern) -> Tensor:
    """The pixels (B, 1 or C, H, W) under a rectangle, each unit's pattern at its own place.

    Each pixel is taken back into the coordinates of the tiling, where it is a matter of remainders.
    """
    (a, b), (c, d) = pattern.matrix
    place = torch.rand((2, *units), device=x.device)
    rows = torch.arange(x.shape[2], device=x.device, dtype=torch.float32)[:, None]
    columns = torch.arange(x.shape[3], device=x.device, dtype=torch.float32)
    if pattern.repeat is not None:
        low, high = zip(*_bounds(pattern, pattern.repeat), strict=True)
        rows = rows + high[0] - place[0] * (x.shape[2] - 1 + high[0] - low[0])
        columns = columns + high[1] - place[1] * (x.shape[3] - 1 + high[1] - low[1])
        place = torch.zeros_like(place)
    # the inverse of a matrix of determinant 1; without rotation and shear the axes stay apart
    u = d * rows - b * columns if b else d * rows
    v = a * columns - c * rows if c else a * columns
    hits = torch.ones((), dtype=torch.bool, device=x.device)
    for axis, (at, side, gap) in enumerate(zip((u, v), pattern.sides, pattern.gaps, strict=True)):
        period = side + gap
        at = at + place[axis] * period
        hits = hits & (at.remainder(period) < side)
        if pattern.repeat is not None:
            hits = hits & (at >= 0) & (at < pattern.repeat * period)
    return hits

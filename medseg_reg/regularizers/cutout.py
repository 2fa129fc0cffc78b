"""Cutout: blank out a box of the input image."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from medseg_reg.regularizers.base import (
    Regularizer,
    check_count,
    check_map,
    check_rate,
    register,
)

__all__ = ["Cutout", "cutout"]

_PUBLISHED_LENGTH = 16
_MOST_HOLES = 32  # beyond, the alternating sum for their overlap loses its digits


def cutout(
    x: Tensor,
    p: float = 0.1,
    holes: int = 1,
    length: int | None = None,
    training: bool = True,
    *,
    faithful: bool = False,
) -> Tensor:
    """Zeroes one or more boxes of every image; see `Cutout`.

    Example:
        >>> import torch
        >>> y = cutout(torch.ones(1000, 1, 32, 24), p=0.2)
        >>> abs((y == 0).float().mean().item() - 0.2) < 0.02
        True
    """
    p = check_rate(p, "cutout")
    check_count(holes, "holes", "cutout", _MOST_HOLES)
    length = _check_length(length, faithful, "cutout")
    if not training or p == 0.0:
        return x
    check_map(x, "cutout")
    if x.numel() == 0:
        return x
    with torch.no_grad():
        keep = _holes(x, p, holes, length).logical_not_()[:, None].to(x.dtype)
    return x * keep


@register("cutout")
class Cutout(Regularizer):
    """Zeroes a box of every input image, at a random place, in all channels.

    The box has sides in proportion to those of the image, and a centre uniform over all pixels;
    what lies beyond the border is cut off. Its size is solved for the image at hand so that the
    expected share of zeroed pixels is p, with the border and the overlap of several holes counted
    in; of the two neighbouring whole sizes each sample gets one at random. Nothing is rescaled.
    Pixels near the border are zeroed less often than p, those in the middle more often.

    Labels stay as they are: under the hole the network is asked to fill in what it cannot see,
    from what surrounds it. Zero should mean "nothing there" in the image, or its mean: the layer
    goes after normalisation. `measured_rate` sees no hole where the image was zero already.

    Args:
        p: expected share of the image to zero, in [0, 1).
        holes: boxes in each image, at most 32; each is smaller, the more there are.
        length: side of the hole under ``faithful``, 16 by default; without it, p decides.
        faithful: the published rule instead, see below.

    Shapes:
        (B, C, *spatial) with one to three spatial axes; the output is alike.

    Raises:
        ValueError: a bad parameter, ``length`` without ``faithful``, or an input of another shape
            or kind.

    Paper:
        T. DeVries, G. W. Taylor, "Improved Regularization of Convolutional Neural Networks with
        Cutout", arXiv 1708.04552, 2017.
        The published rule (``faithful=True``) zeroes a square that reaches ``length // 2`` pixels
        to both sides of its centre (the last one not included, so that an odd length loses one
        pixel), in every image; p only switches it on. Its lengths, 16 for CIFAR-10, 8 for
        CIFAR-100, 20 for SVHN, zero .191, .055 and .278 of a 32 x 32 image. The paper is about
        classification; it was written for the data loader, while this layer works on the batch,
        where the network is. A compiled layer follows a schedule of p without compiling anew.

    Example:
        >>> import torch
        >>> layer = Cutout(faithful=True, length=8)
        >>> int((layer(torch.ones(1, 1, 32, 32)) == 0).sum()) in range(16, 65)
        True
    """

    default_places = ("input",)
    unit = "box of the input"
    paper = "DeVries and Taylor, arXiv 2017"

    def __init__(
        self, p: float = 0.1, holes: int = 1, length: int | None = None, faithful: bool = False
    ) -> None:
        super().__init__(p)
        self.holes = check_count(holes, "holes", type(self).__name__, _MOST_HOLES)
        self.length = _check_length(length, faithful, type(self).__name__)
        self.faithful = bool(faithful)

    def regularize(self, x: Tensor) -> Tensor:
        """Applies `cutout`."""
        return cutout(x, self.p, self.holes, self.length, faithful=self.faithful)


def _check_length(length: int | None, faithful: bool, owner: str) -> int | None:
    """The side of the published hole; None without ``faithful``."""
    if not faithful:
        if length is not None:
            raise ValueError(
                f"{owner}: length={length!r} is the side of the published hole, which needs "
                "faithful=True. Without it the size follows from p; drop the length."
            )
        return None
    return check_count(_PUBLISHED_LENGTH if length is None else length, "length", owner)


def _holes(x: Tensor, p: float, holes: int, length: int | None) -> Tensor:
    """The zeroed pixels (B, *spatial); the published ones if there is a ``length``."""
    batch, sizes = x.shape[0], tuple(x.shape[2:])
    if length is None:
        level, odds = _level(sizes, holes, p, x.device)
        level = level + (torch.rand(batch, device=x.device) < odds)
    before: Tensor | int
    after: Tensor | int
    inside = []  # along each axis: (B, holes, size)
    for size in sizes:
        centre = torch.randint(size, (batch, holes, 1), device=x.device)
        if length is None:
            side = _side(level, size, sizes)[:, None, None]
            before, after = (side - 1) // 2, side // 2
        else:
            before, after = length // 2, length // 2 - 1
        i = torch.arange(size, device=x.device)
        inside.append((i >= centre - before) & (i <= centre + after))
    hole = torch.zeros(batch, *sizes, dtype=torch.bool, device=x.device)
    for h in range(holes):
        box = torch.ones((), dtype=torch.bool, device=x.device)
        for axis, rows in enumerate(inside):
            shape = [batch] + [1] * len(sizes)
            shape[1 + axis] = sizes[axis]
            box = box & rows[:, h].view(shape)
        hole |= box
    return hole


def _side(level: Tensor, size: int, sizes: tuple[int, ...]) -> Tensor:
    """The side of a hole along one axis.

    Level 0 is no hole; the last one, 2 max(sizes) - 1, covers the image from any centre. Each
    level adds one pixel along the longest axis.
    """
    last = 2 * max(sizes) - 1
    return ((2 * level * (2 * size - 1) + last) // (2 * last)).clamp(min=1) * (level > 0)


def _share(level: Tensor, sizes: tuple[int, ...], holes: int) -> Tensor:
    """The expected share of an image that holes of a level zero.

    A pixel escapes all holes with probability (1 - c)^holes, where c is the product of its
    coverages along the axes. The mean of each power of c is a product of means, one for each axis.
    """
    exact = torch.float32 if level.device.type == "mps" else torch.float64  # it has no other
    powers = torch.arange(1, holes + 1, device=level.device)[:, None]
    moments = torch.ones(holes, dtype=exact, device=level.device)
    for size in sizes:
        side = _side(level, size, sizes)
        before, after = (side - 1) // 2, side // 2
        i = torch.arange(size, device=level.device)
        centres = (i + before).clamp(max=size - 1) - (i - after).clamp(min=0) + 1
        moments = moments * (centres.to(exact) / size).pow(powers).mean(1)
    signs = [(-1.0) ** j * math.comb(holes, j + 1) for j in range(holes)]
    return (moments * torch.tensor(signs, dtype=exact, device=level.device)).sum()


def _level(
    sizes: tuple[int, ...], holes: int, p: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The level whose share is just below p, and the odds of the next that make it p."""
    if torch.compiler.is_compiling():  # p may be symbolic: it goes through the graph as a tensor
        return _search(sizes, holes, p, device)
    level, odds = _cached_search(sizes, holes, p)
    return torch.full((), level, device=device), torch.full((), odds, device=device)


@lru_cache(maxsize=4096)
def _cached_search(sizes: tuple[int, ...], holes: int, p: float) -> tuple[int, float]:
    level, odds = _search(sizes, holes, p, torch.device("cpu"))
    return int(level.item()), odds.item()


def _search(
    sizes: tuple[int, ...], holes: int, p: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`_level` by bisection over the levels, in a fixed number of steps."""
    last = 2 * max(sizes) - 1
    low = torch.zeros((), dtype=torch.int64, device=device)
    high = torch.full_like(low, last)
    for _ in range(last.bit_length()):
        middle = (low + high) // 2
        fits = _share(middle, sizes, holes) <= p
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    below, above = _share(low, sizes, holes), _share(low + 1, sizes, holes)
    return low, (p - below) / (above - below)

"""Structural Dropout: keep only the first channels of a map, so that a network can be narrowed.

`structural_dropout` is the training rule, `StructuralDropout` the module; `kept_channels` and
`width_scale` say what a trained network keeps at a chosen width.
"""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor

from medseg_reg.regularizers.base import Regularizer, check_count, check_map, check_rate, register

__all__ = ["StructuralDropout", "kept_channels", "structural_dropout", "width_scale"]

_DIVISOR = 8  # the default lower bound is an eighth of the channels: no scale above 8


def kept_channels(channels: int, width: float | int | None) -> int:
    """How many of the first channels stay at a width; at least one.

    Args:
        channels: channels of the whole map.
        width: None for all, an int for that many, a float in (0, 1] for that share, rounded up.
            The int 1 is a single channel, the float 1.0 all of them.

    Raises:
        ValueError: a width that is neither, or more channels than there are.

    Example:
        >>> [kept_channels(20, width) for width in (None, 1.0, 0.31, 7, 1)]
        [20, 20, 7, 7, 1]
    """
    check_count(channels, "channels", "kept_channels")
    width = _check_width(width, "kept_channels")
    if width is None:
        return channels
    if isinstance(width, float):
        return max(1, math.ceil(width * channels - 1e-9))  # .28 * 25 is above 7 in binary
    if width > channels:
        raise ValueError(
            f"kept_channels: the map has {channels} channels, so a width of {width} is none; "
            "pass a share in (0, 1] where layers differ in size"
        )
    return width


def width_scale(channels: int, kept: int) -> float:
    """The factor n/c of the channels that stay.

    Example:
        >>> width_scale(20, 5)
        4.0
    """
    check_count(channels, "channels", "width_scale")
    return channels / check_count(kept, "kept", "width_scale", channels)


def structural_dropout(
    x: Tensor,
    p: float = 0.5,
    lower_bound: int | None = None,
    step: int = 1,
    training: bool = True,
    *,
    faithful: bool = False,
) -> Tensor:
    """Zeroes all but the first channels, with probability p; see `StructuralDropout`.

    Example:
        >>> import torch
        >>> y = structural_dropout(torch.ones(2, 6, 3, 3), p=0.9, lower_bound=2, step=2)
        >>> int((y[0, :, 0, 0] != 0).sum()) in (2, 4, 6)
        True
    """
    p = check_rate(p, "structural_dropout")
    _check_bounds(lower_bound, step, "structural_dropout")
    if not training or p == 0.0:
        return x
    check_map(x, "structural_dropout")
    channels = x.shape[1]
    if lower_bound is None:
        lower_bound = 1 if faithful else -(-channels // _DIVISOR)
    widths = len(range(lower_bound, channels, step))
    if widths == 0:
        return x
    cut = torch.rand((), device=x.device) < (_published_probability(p) if faithful else p)
    kept = lower_bound + step * torch.randint(widths, (), device=x.device)
    return _keep_first(x, torch.where(cut, kept, channels))


def _published_probability(p: float) -> float:
    """The published code stores arccos(1 - 2p) and compares it with a uniform number."""
    return min(1.0, math.acos(1.0 - 2.0 * p))


def _keep_first(x: Tensor, kept: Tensor | int) -> Tensor:
    """Zeroes all channels but the first and multiplies those by n/c.

    A tensor is compared with, never read: reading it would stop a GPU until it is known.
    """
    channels = x.shape[1]
    exact = torch.promote_types(x.dtype, torch.float32)
    keep = torch.arange(channels, device=x.device) < kept
    scale = channels / (kept.to(exact) if isinstance(kept, Tensor) else kept)
    factor = (keep.to(exact) * scale).to(x.dtype)
    return x * factor.view(channels, *[1] * (x.dim() - 2))


@register("structural_dropout")
class StructuralDropout(Regularizer):
    """Zeroes all channels above a random cutoff, so that the network can be narrowed afterwards.

    With probability p a training pass is cut: y[:, :c] = x[:, :c] * n/c and y[:, c:] = 0, where n
    is the number of channels and c is uniform over {lower_bound, lower_bound + step, ...} below n;
    otherwise y = x. One draw serves the whole batch. The first channels learn to do without the
    later ones, which can then be cut off: set ``width`` to see what that costs.

    Unlike elsewhere, p is no share of units but the probability that a pass is cut. The expected
    share of dropped channels is p * (1 - mean(c)/n): about .44 p by default, hence .22 for
    p = .5. A map with no more channels than ``lower_bound`` is never cut.

    Set ``width`` on the trained module, there is no need to train again. In ``eval()``, None
    returns the very same tensor; otherwise the first `kept_channels` (n, width) stay, scaled by
    `width_scale`, and the rest is zero. Widths below the lower bound were never trained.

    Args:
        p: probability that a pass is cut, in [0, 1).
        lower_bound: smallest number of channels kept; None for an eighth of them, rounded up.
            The factor n/c is then at most 8, which matters in front of a normalisation.
        step: distance between the numbers of channels to choose from.
        faithful: the published rule instead, see below.

    Shapes:
        (B, C, *spatial) with one to three spatial axes; the output is alike.

    Raises:
        ValueError: a bad parameter or width, or an input of another shape or kind.

    Paper:
        J. Knodt, "Structural Dropout for Model Width Compression", arXiv 2205.06906, 2022.
        The published code (``faithful=True``) stores arccos(1 - 2p) and compares a uniform number
        with it, so a pass is cut with probability min(1, arccos(1 - 2p)): always for p = .5, .2
        for p = .01. Its default lower bound is 1. By default p is the paper's. The paper cuts the
        last axis of tokens; a map's is the channel axis. Each process of a distributed run draws
        for itself, unless their generators are seeded alike.

    Example:
        >>> import torch
        >>> layer = StructuralDropout(p=0.5).eval()
        >>> layer.width = 0.5
        >>> layer(torch.ones(1, 4, 1))[0, :, 0]
        tensor([2., 2., 0., 0.])
    """

    unit = "all channels above a cutoff"
    paper = "Knodt, arXiv 2022"
    width: float | int | None

    def __init__(
        self,
        p: float = 0.5,
        lower_bound: int | None = None,
        step: int = 1,
        faithful: bool = False,
    ) -> None:
        super().__init__(p)
        _check_bounds(lower_bound, step, type(self).__name__)
        self.lower_bound = lower_bound
        self.step = step
        self.faithful = bool(faithful)
        self.width = None

    def __setattr__(self, name: str, value: object) -> None:
        """Checks every new ``width`` too."""
        if name == "width":
            value = _check_width(value, type(self).__name__)
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """As every regularizer; in ``eval()`` with a ``width``, the narrowed map."""
        if self.training or self.width is None:
            return super().forward(x)
        check_map(x, type(self).__name__)
        kept = kept_channels(x.shape[1], self.width)
        return x if kept == x.shape[1] else _keep_first(x, kept)

    def regularize(self, x: Tensor) -> Tensor:
        """Applies `structural_dropout`."""
        return structural_dropout(x, self.p, self.lower_bound, self.step, faithful=self.faithful)


def _check_bounds(lower_bound: int | None, step: int, owner: str) -> None:
    if lower_bound is not None:
        check_count(lower_bound, "lower_bound", owner)
    check_count(step, "step", owner)


def _check_width(width: object, owner: str) -> float | int | None:
    """Returns the width as None, int or float, or raises a ValueError."""
    if width is None:
        return None
    if isinstance(width, Integral) and not isinstance(width, bool) and int(width) >= 1:
        return int(width)
    if isinstance(width, Real) and not isinstance(width, Integral) and 0.0 < float(width) <= 1.0:
        return float(width)
    raise ValueError(
        f"{owner}: width must be None, a whole number of channels, 1 or more, or a share of them "
        f"in (0, 1]; got {width!r}"
    )

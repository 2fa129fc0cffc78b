"""Weighted Channel Dropout: keep channels at random, the more likely the more active they are."""

from __future__ import annotations

import torch
from torch import Tensor

from medseg_reg.regularizers.base import (
    Regularizer,
    check_map,
    check_number,
    check_rate,
    register,
)

__all__ = ["WeightedChannelDropout", "weighted_channel_dropout"]

_FLOOR = 1e-4  # the least score, relative to the sample's greatest


def weighted_channel_dropout(
    x: Tensor,
    p: float = 0.2,
    q: float = 1.0,
    training: bool = True,
    *,
    faithful: bool = False,
) -> Tensor:
    """Zeroes the p*C channels that lose a race by activity; see `WeightedChannelDropout`.

    Example:
        >>> import torch
        >>> y = weighted_channel_dropout(torch.ones(1, 4, 8, 8), p=0.5)
        >>> sorted(y[0, :, 0, 0].tolist())
        [0.0, 0.0, 2.0, 2.0]
    """
    p = check_rate(p, "weighted_channel_dropout")
    q = _check_keep(q, "weighted_channel_dropout")
    if not training or p == 0.0:
        return x
    check_map(x, "weighted_channel_dropout")
    with torch.no_grad():
        mean = x.detach().flatten(2).mean(-1, dtype=torch.float32)
        scale = _factor(mean, p, q, faithful)
        scale = scale.view(*scale.shape, *[1] * (x.dim() - 2)).to(x.dtype)
    return x * scale


def _factor(mean: Tensor, p: float, q: float, faithful: bool) -> Tensor:
    """The factor (B, C) of every channel, from its mean."""
    finite = mean.isfinite()
    # the channels that run; by default not those without any activity: they are lost already
    runs = finite if faithful else finite & (mean != 0)
    score = torch.where(runs, mean, 0.0)
    score = score / score.amax(1, keepdim=True).clamp(min=1e-37)
    score = torch.where(runs, score.clamp(min=_FLOOR), 0.0)
    # the order of u^(1 / score): exponential times of rate score, the first ones are kept
    time = -torch.rand_like(score).clamp(min=1e-30).log() / score
    rank = torch.where(runs, time, torch.inf).argsort(1).argsort(1)
    number = runs.sum(1, keepdim=True)
    selected = (rank < _kept(number, p, faithful)) & runs
    # the sum of the scores stays what it was
    chosen = torch.where(selected, score, 0.0).sum(1, keepdim=True)
    alpha = torch.where(chosen > 0, score.sum(1, keepdim=True) / chosen.clamp(min=1e-37), 1.0)
    if q < 1.0:
        again = selected & (torch.rand_like(score) < q)
        some = again.any(1, keepdim=True)
        selected = torch.where(some, again, selected)
        alpha = alpha if faithful else torch.where(some, alpha / q, alpha)
    return torch.where(runs, selected * alpha, 1.0)


def _kept(number: Tensor, p: float, faithful: bool) -> Tensor:
    """How many of ``number`` channels are kept, at least 1: M in the paper."""
    if faithful:
        return ((1.0 - p) * number).round().clamp(min=1.0)
    wanted = p * number
    dropped = (wanted + torch.rand_like(wanted)).floor()
    return (number - dropped).clamp(min=1.0)


@register("weighted_channel_dropout")
class WeightedChannelDropout(Regularizer):
    """Zeroes channels at random, the more likely the lower their mean activity.

    score_c = mean of channel c, made at least 1e-4 of the sample's greatest score, so that maps
    that were not rectified work too. A weighted selection without replacement keeps M channels:
    those of the largest u_c^(1 / score_c), u_c ~ U(0, 1). Optionally each of these is kept only
    with probability q. Kept channels are multiplied by
    alpha = sum of all scores / sum of the selected scores.

    Channels that are zero everywhere, or whose mean is exactly 0, take no part. Of the L others,
    p*L, rounded up or down at random for each sample with mean p*L, are dropped, but never all:
    the rate is p for any number of channels, except that it is (L-1) / L where p*L is above
    L - 1, in particular 0 for a single one. Channels with NaN or infinity stay as they are.

    alpha keeps the sum of the scores of each sample, hence its mean activity: for equal scores
    it is C / M, about 1 / (1 - p), else smaller as a rule, and large in the rare draw of weak
    channels alone. It does not make the layer unbiased: with scores 1, 2, 3, 4 and two of them
    kept the mean factors are .571, .868, 1.042, 1.142, so that weak channels are weakened and
    strong ones strengthened. For the gradient it is a constant.

    Args:
        p: share of channels that the weighted selection drops, in [0, 1).
        q: probability, in (0, 1], that a selected channel is kept in the second step. Below 1
            the rate becomes 1 - (1 - p) * q, and kept channels are divided by q as well; a
            sample that would lose all its channels loses none in this step. The paper has the
            step for high layers of pretrained networks, where few channels carry almost all
            activity; .9 is the value that is passed on, but it could not be verified.
        faithful: the published rule instead, see below.

    Shapes:
        (B, C, *spatial) with one to three spatial axes; the output is alike.

    Raises:
        ValueError: ``p`` outside [0, 1), ``q`` outside (0, 1], or an input of another shape or
            kind.

    Paper:
        S. Hou, Z. Wang, "Weighted Channel Dropout for Regularization of Deep Convolutional
        Neural Network", AAAI 2019, 33(01):8425-8432, doi 10.1609/aaai.v33i01.33018425. It stands
        between the higher convolutions. No code was published.
        The published rule (``faithful=True``) keeps M = (1 - p) * C of all channels, here
        rounded to the nearest whole number and at least 1. Dead channels are the first to go,
        so with p*C dead ones it drops nothing else. alpha comes from the selection alone: with
        q < 1 the activity shrinks by q.

    Example:
        >>> import torch
        >>> layer = WeightedChannelDropout(p=0.25)
        >>> x = torch.rand(2, 8, 16, 16) + 0.1
        >>> layer.measured_rate(x, layer(x))
        0.25
    """

    unit = "channel"
    paper = "Hou and Wang, AAAI 2019"

    def __init__(self, p: float = 0.2, q: float = 1.0, faithful: bool = False) -> None:
        super().__init__(p)
        self.q = _check_keep(q, type(self).__name__)
        self.faithful = bool(faithful)

    def regularize(self, x: Tensor) -> Tensor:
        """Applies `weighted_channel_dropout`."""
        return weighted_channel_dropout(x, self.p, self.q, faithful=self.faithful)


def _check_keep(q: object, owner: str) -> float:
    """Returns ``q`` as a float, or raises a ValueError that says what is expected."""
    value = check_number(q, "q", owner, 0.0, strict=True)
    if value > 1.0:
        raise ValueError(
            f"{owner}: q is the probability that a selected channel is kept, at most 1; got {q!r}"
        )
    return value

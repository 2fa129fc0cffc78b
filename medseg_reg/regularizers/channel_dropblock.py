"""Channel DropBlock: drop one channel together with those that resemble it most.

`channel_similarity` gives the one row of the correlation matrix that is needed,
`channel_drop_block` the rule, `ChannelDropBlock` the module.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from medseg_reg.regularizers.base import (
    Regularizer,
    check_choice,
    check_map,
    check_rate,
    register,
)
from medseg_reg.regularizers.kernels.peaks import neighbourhood_peaks

__all__ = ["ChannelDropBlock", "channel_drop_block", "channel_similarity"]

Metric = Literal["max_activation", "bilinear"]
_METRICS = ("max_activation", "bilinear")


def channel_similarity(
    x: Tensor, channel: Tensor, metric: Metric = "max_activation", *, faithful: bool = False
) -> Tensor:
    """How much every channel of a sample resembles one channel of that sample.

    "bilinear": the cosine a_c . a_j / (|a_c| |a_j|) of the flattened channels; 0 where one of
    them is zero everywhere, or where its squares do not fit in float32 (beyond 1e19, below
    1e-22). "max_activation": minus the distance, in pixels, between the places where the
    channels, averaged over 3^n neighbourhoods, are greatest.

    Args:
        x: feature map.
        channel: index of the channel to compare with, one for each sample.
        metric: "max_activation" or "bilinear".
        faithful: average as published: zeros around the map count, and an axis of one or two
            pixels, over which everything becomes equal, is averaged as well.

    Shapes:
        x (B, C, *spatial) with one to three spatial axes, channel (B,); the result (B, C),
        float32.

    Raises:
        ValueError: an unknown metric, or an input of another shape or kind.

    Example:
        >>> import torch
        >>> x = torch.tensor([[[1.0, 2, 0, 0], [1, 2, 0, 0], [0, 0, 3, 1], [2, 1, 0, 0]]])
        >>> s = channel_similarity(x, torch.tensor([0]), "bilinear")
        >>> [round(v, 4) for v in s[0].tolist()]
        [1.0, 1.0, 0.0, 0.8]
    """
    check_choice(metric, "metric of channel_drop_block", _METRICS)
    check_map(x, "channel_similarity")
    device = "cpu" if x.is_meta else x.device.type  # autocast knows no meta device
    with torch.no_grad(), torch.autocast(device, enabled=False):
        if metric == "bilinear":
            return _cosine(x.detach().float(), channel)
        places = neighbourhood_peaks(x.detach(), pad_with_zeros=faithful)
        return -(places - _row(places, channel)[:, None]).square().sum(-1).sqrt()


def _row(values: Tensor, channel: Tensor) -> Tensor:
    """values[b, channel[b]]."""
    return values[torch.arange(values.shape[0], device=values.device), channel]


def _cosine(x: Tensor, channel: Tensor) -> Tensor:
    rows = x.flatten(2)
    norm = torch.linalg.vector_norm(rows, dim=-1)
    norm = torch.where(norm > 0, norm, torch.inf)
    # divided before the product, which then fits in float32 whenever the norms do
    unit = _row(rows, channel) / _row(norm, channel)[:, None]
    # row times matrix: several times faster on CPU than matrix times column, in either layout
    product = torch.bmm(unit[:, None], rows.transpose(1, 2)).squeeze(1)
    return (product / norm).nan_to_num(0.0)


def _rank(score: Tensor, random: Tensor) -> Tensor:
    """Each channel's position (B, C) by falling score; equal ones in random order."""
    shuffle = random.argsort(1)
    order = score.gather(1, shuffle).argsort(dim=1, descending=True, stable=True)
    return shuffle.gather(1, order).argsort(1)


def channel_drop_block(
    x: Tensor,
    p: float = 0.2,
    metric: Metric = "max_activation",
    training: bool = True,
    *,
    faithful: bool = False,
) -> Tensor:
    """Zeroes a random channel and those that resemble it most; see `ChannelDropBlock`.

    Example:
        >>> import torch
        >>> y = channel_drop_block(torch.rand(2, 10, 8, 8) + 1, p=0.2)
        >>> (y == 0).flatten(2).all(-1).sum(1).tolist()
        [2, 2]
    """
    p = check_rate(p, "channel_drop_block")
    check_choice(metric, "metric of channel_drop_block", _METRICS)
    if not training or p == 0.0:
        return x
    check_map(x, "channel_drop_block")
    with torch.no_grad():
        dropped = _published(x, p, metric) if faithful else _calibrated(x, p, metric)
        scale = dropped.logical_not().float() / (1.0 - p)
        scale = scale.view(*scale.shape, *[1] * (x.dim() - 2)).to(x.dtype)
    return x * scale


def _calibrated(x: Tensor, p: float, metric: Metric) -> Tensor:
    """Which channels (B, C) the default rule drops."""
    flat = x.detach().flatten(2)
    peak = torch.maximum(flat.amax(-1), -flat.amin(-1))  # abs() would copy the map
    live = (peak > 0) & peak.isfinite()
    random = torch.rand(live.shape, device=x.device)
    seed = torch.where(live, random, -1.0).argmax(1)
    score = torch.where(live, channel_similarity(x, seed, metric), -torch.inf)
    itself = torch.arange(live.shape[1], device=x.device) == seed[:, None]
    score = torch.where(itself & live, torch.inf, score)
    wanted = p * live.sum(1, keepdim=True)
    # up or down at random, so that the mean is p of the live channels, however few they are
    count = (wanted + torch.rand(wanted.shape, device=x.device)).floor()
    return live & (_rank(score, random) < count)


def _published(x: Tensor, p: float, metric: Metric) -> Tensor:
    """Which channels (B, C) the published rule drops: a threshold, and all that tie with it."""
    batch, channels = x.shape[:2]
    random = torch.rand(batch, channels, device=x.device)
    score = channel_similarity(x, random.argmax(1), metric, faithful=True)
    score = torch.where(score.isnan(), -torch.inf, score)
    count = max(1, int(channels * p))
    dropped = score >= score.topk(count, dim=1).values[:, -1:]
    # where a tie would take every channel, no more than the nominal number
    fallback = _rank(score, random) < min(count, channels - 1)
    return torch.where(dropped.all(1, keepdim=True), fallback, dropped)


@register("channel_drop_block")
class ChannelDropBlock(Regularizer):
    """Zeroes a group of channels of each sample: a random one and those that resemble it most.

    In every sample one channel c is picked at random and the n channels of highest
    `channel_similarity` to it, itself included, are dropped: y = x * mask / (1 - p). Channels
    that say the same are lost together, so that the network cannot read the lost one from its
    copies.

    Channels that are zero everywhere take no part: they are neither picked nor counted. With L
    live channels, n is p*L rounded up or down at random for each sample, with mean p*L, so that
    the share of live channels that are dropped is p for any number of channels. Equal
    similarities, as of channels whose peaks share a pixel, are decided at random. Where p*L is
    above L - 1 a sample may lose everything; in particular a single live channel is zeroed with
    probability p, as by `SpatialDropout`. Channels with NaN or infinity count as dead and stay.

    Args:
        p: share of channels to drop, in [0, 1). Published: .2 with "max_activation", .05 with
            "bilinear".
        metric: "max_activation" (distance between the channels' peaks) or "bilinear" (cosine).
        faithful: the published selection instead, see below.

    Shapes:
        (B, C, *spatial) with one to three spatial axes; the output is alike.

    Raises:
        ValueError: ``p`` outside [0, 1), an unknown metric, or an input of another shape or kind.

    Paper:
        Y. Ding, S. Dong, Y. Tong, Z. Ma, B. Xiao, H. Ling, "Channel DropBlock: An Improved
        Regularization Method for Fine-Grained Visual Classification", BMVC 2021, arXiv
        2106.03432. There it stands once, after the second stage of a ResNet-50.
        The published code (``faithful=True``) picks among all channels, dead ones too, takes
        int(p*C) and drops whatever reaches the last of their similarities: more than p where
        peaks coincide (.19 to .26 for p = .2), less where p*C is no whole number. It divides by
        1 - p all the same. Where that code fails, this does not: p*C below 1 drops one channel
        (there: an exception), and where every channel ties, as with a dead picked channel or
        with all peaks in one place, the nominal number is dropped (there: all of them), but
        never the only channel. Peaks are found with whole-number division, which newer torch
        versions broke in the published code.

    Example:
        >>> import torch
        >>> layer = ChannelDropBlock(p=0.25, metric="bilinear")
        >>> x = torch.rand(2, 8, 16, 16) + 0.1
        >>> layer.measured_rate(x, layer(x))
        0.25
    """

    unit = "group of similar channels"
    paper = "Ding et al., BMVC 2021"

    def __init__(
        self, p: float = 0.2, metric: Metric = "max_activation", faithful: bool = False
    ) -> None:
        super().__init__(p)
        check_choice(metric, "metric of channel_drop_block", _METRICS)
        self.metric: Metric = metric
        self.faithful = bool(faithful)

    def regularize(self, x: Tensor) -> Tensor:
        """Applies `channel_drop_block`."""
        return channel_drop_block(x, self.p, self.metric, faithful=self.faithful)

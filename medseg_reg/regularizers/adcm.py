"""ADCM, reconstructed: drop the channels and the positions that get little attention.

The paper's drop formula was not published in what could be found. What is known of it, the
pooling that the attention is made of and that high attention means being kept, is here without
learned weights; the rates are those of `drop_probability`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from medseg_reg.regularizers.base import (
    Regularizer,
    check_map,
    check_rate,
    register,
)
from medseg_reg.regularizers.drop_rates import check_temperature, drop_probability
from medseg_reg.regularizers.kernels.blocks import by_planes
from medseg_reg.regularizers.kernels.masks import multiply_masks

__all__ = ["ADCM", "adcm", "channel_attention", "position_attention", "stochastic_pool"]

_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_SPREAD_FLOOR = 1e-6  # relative to the largest value: below it, differences are rounding noise


def stochastic_pool(x: Tensor) -> Tensor:
    """One value of each channel, drawn with probability proportional to the value.

    P(position i) = max(x_i, 0) / sum_j max(x_j, 0); a channel without positive values gives 0.
    The position is drawn axis by axis, from the sums over the axes that follow: the same
    distribution for a few random numbers instead of one for every pixel.

    Shapes:
        x (B, C, *spatial) with one to three spatial axes; the result (B, C), float32.

    Paper:
        M. Zeiler, R. Fergus, "Stochastic Pooling for Regularization of Deep Convolutional Neural
        Networks", ICLR 2013, arXiv 1301.3557.

    Example:
        >>> import torch
        >>> stochastic_pool(torch.tensor([[[0.0, 3, 0], [-1, -2, -3]]]))
        tensor([[3., 0.]])
    """
    check_map(x, "stochastic_pool")
    with torch.no_grad():
        values = x.detach()
        while values.dim() > 2:
            mass = by_planes(_positive_sums, values)
            # the first of exponential times of rate `mass`, as 1 / time
            speed = mass / -torch.rand_like(mass).clamp(min=1e-30).log()
            index = speed.argmax(2).view(*mass.shape[:2], *[1] * (values.dim() - 2))
            size = (*mass.shape[:2], 1, *values.shape[3:])
            values = values.gather(2, index.expand(size)).squeeze(2)
        return values.float().relu()


def _positive_sums(values: Tensor) -> Tensor:
    """The sums of the positive values over all but the first spatial axis (B, C, n), float32."""
    positive = values.float().relu()
    return positive.flatten(3).sum(-1) if values.dim() > 3 else positive


def channel_attention(x: Tensor) -> Tensor:
    """The mean of each channel's maximum, average and `stochastic_pool`, each standardised.

    Standardised over the channels of a sample, so that none of the three outweighs the others.

    Shapes:
        x (B, C, *spatial) with one to three spatial axes; the result (B, C), float32.

    Example:
        >>> import torch
        >>> a = channel_attention(torch.tensor([[[4.0, 4], [2, 2], [0, 0]]]))
        >>> [round(v, 3) for v in a[0].tolist()]
        [1.225, 0.0, -1.225]
    """
    check_map(x, "channel_attention")
    with torch.no_grad():
        return _channel_attention(x)[0]


def _channel_attention(x: Tensor) -> tuple[Tensor, Tensor]:
    """`channel_attention`, and which channels (B, C) are not zero everywhere."""
    flat = x.detach().flatten(2)
    greatest, average = flat.amax(-1).float(), flat.mean(-1, dtype=torch.float32)
    attention = _standard(greatest) + _standard(average) + _standard(stochastic_pool(x))
    return attention / 3, _live(greatest, average)


def position_attention(x: Tensor) -> Tensor:
    """The mean of each position's maximum and average over the channels, smoothed 3 by 3.

    Both are standardised over the positions of a sample; the smoothing is a mean over the real
    neighbours, along the axes of three pixels and more.

    Shapes:
        x (B, C, *spatial) with one to three spatial axes; the result (B, *spatial), float32.

    Example:
        >>> import torch
        >>> a = position_attention(torch.tensor([[[3.0, 0, 0, 0]]]))
        >>> [round(v, 3) for v in a[0].tolist()]
        [0.577, 0.192, -0.577, -0.577]
    """
    check_map(x, "position_attention")
    with torch.no_grad():
        return _position_attention(x)[0]


def _position_attention(x: Tensor) -> tuple[Tensor, Tensor]:
    """`position_attention`, and which positions (B, N) are not zero in every channel."""
    sizes = x.shape[2:]
    greatest = x.detach().amax(1).float().flatten(1)
    average = x.detach().mean(1, dtype=torch.float32).flatten(1)
    both = (_standard(greatest) + _standard(average)) / 2
    window = [3 if size > 2 else 1 for size in sizes]
    pad = [k // 2 for k in window]
    smooth: Tensor = _POOL[len(sizes)](
        both.view(-1, 1, *sizes), window, 1, pad, count_include_pad=False
    )
    return smooth.squeeze(1), _live(greatest, average)


def _live(greatest: Tensor, average: Tensor) -> Tensor:
    """What is not zero everywhere: only zeros have a maximum of 0 and a mean of 0."""
    return (greatest != 0) | (average != 0)


def _standard(values: Tensor) -> Tensor:
    """(v - mean) / standard deviation along the last axis, whatever the scale of v."""
    # by the largest value first: squares of 1e25 and of 1e-25 do not fit in float32
    values = values / values.abs().amax(-1, keepdim=True).clamp(min=1e-37)
    centred = values - values.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True).sqrt() + _SPREAD_FLOOR)


def adcm(x: Tensor, p: float = 0.1, temperature: float = 1.0, training: bool = True) -> Tensor:
    """Zeroes channels and positions of low attention; see `ADCM`.

    Example:
        >>> import torch
        >>> y = adcm(torch.ones(2, 8, 6, 6), p=0.5)
        >>> set(y.flatten().tolist()) <= {0.0, 2.0}
        True
    """
    p = check_rate(p, "adcm")
    temperature = check_temperature(temperature, "adcm")
    if not training or p == 0.0:
        return x
    check_map(x, "adcm")
    sizes = x.shape[2:]
    with torch.no_grad():
        rate = _rate_of_each(p, x.shape[1], sizes.numel())
        attention, live = _channel_attention(x)
        channel = drop_probability(attention, rate[0], temperature, live)
        attention, live = _position_attention(x)
        position = drop_probability(attention.flatten(1), rate[1], temperature, live)
        channels = (torch.rand_like(channel) >= channel).float() / (1.0 - p)
        positions = torch.rand_like(position) >= position
        channels = channels.view(*channel.shape, *[1] * len(sizes)).to(x.dtype)
        positions = positions.view(-1, 1, *sizes).to(x.dtype)
    return multiply_masks(x, channels, positions)


def _rate_of_each(p: float, channels: int, positions: int) -> tuple[float, float]:
    """The rates of the two parts that drop p together; a part with a single unit rests."""
    if positions == 1:
        return p, 0.0
    if channels == 1:
        return 0.0, p
    each = 1.0 - (1.0 - p) ** 0.5
    return each, each


@register("adcm")
class ADCM(Regularizer):
    """Zeroes channels and positions, the more likely the less attention they get.

    **A reconstruction**: ADCM's drop formula was not published in what could be found, and this
    makes no claim to the paper's results. The channel part has a = `channel_attention`, from
    maximum, average and stochastic pooling; the position part has a = `position_attention`, from
    maximum and mean over the channels. In each part unit i is dropped with probability
    q_i = `drop_probability` (a, r), independently, r = 1 - sqrt(1 - p);
    y = x * channel mask * position mask / (1 - p).

    q falls with the attention and its mean is r exactly, so that the share of elements dropped
    by the two parts together is p in expectation, in every sample. Channels that are zero
    everywhere, and positions that are zero in every channel, would have the least attention; they
    take no part, and p is the share of the others. A part with a single unit
    rests, and the other drops p: a one-pixel map loses channels only, a one-channel map positions
    only. A single value is zeroed with probability p.

    Args:
        p: share of elements to drop, in [0, 1).
        temperature: how sharply the rates fall with the attention; infinity means uniform. See
            `drop_probability`.

    Shapes:
        (B, C, *spatial) with one to three spatial axes; the output is alike.

    Raises:
        ValueError: ``p`` outside [0, 1), a temperature that is not above 0, or an input of
            another shape or kind.

    Paper:
        "ADCM: attention dropout convolutional module", Neurocomputing, 2020. Known from
        descriptions: channel attention from the three poolings through a fully connected layer,
        position attention through 1x1 and 3x3 convolutions and a sigmoid, and that high
        attention makes being kept more likely. Here nothing is learned, so that no weight is
        added to the network and eval() is the identity; the calibrated rates, the equal split
        between the parts and the rescaling are ours. For want of a published rule there is no
        ``faithful``.

    Example:
        >>> import torch
        >>> ADCM(p=0.1)(torch.rand(2, 8, 16, 16)).shape
        torch.Size([2, 8, 16, 16])
    """

    unit = "channel and position"
    paper = "ADCM, Neurocomputing 2020 (reconstruction)"

    def __init__(self, p: float = 0.1, temperature: float = 1.0) -> None:
        super().__init__(p)
        self.temperature = check_temperature(temperature, type(self).__name__)

    def regularize(self, x: Tensor) -> Tensor:
        """Applies `adcm`."""
        return adcm(x, self.p, self.temperature)

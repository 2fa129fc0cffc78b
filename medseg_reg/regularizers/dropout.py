"""Torch's own dropouts as regularizers: element-wise and by channel.

They exist so that the baselines of a study take part in the registry, the schedules and the
placement reports. By channel they delegate to ``torch.nn.functional``; the element-wise rule is
torch's too, but on CPU with other draws, which take a fifth of the time.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from medseg_reg.regularizers.base import Regularizer, check_map, check_rate, register
from medseg_reg.regularizers.kernels.elements import drop_elements

__all__ = ["Dropout", "SpatialDropout", "spatial_dropout"]

_BY_CHANNEL = {1: F.dropout1d, 2: F.dropout2d, 3: F.dropout3d}


@register("dropout")
class Dropout(Regularizer):
    """Zeroes single elements at random and rescales the others.

    y = x * m / (1 - p), with m ~ Bernoulli(1 - p) drawn for every element. The function beside
    this module is ``torch.nn.functional.dropout``; off the CPU, in compiled code and for maps of
    less than 4096 values it is what this module calls. Elsewhere one seed drops other elements
    than there, and p is rounded to a multiple of 2^-16, such as .1 to .100006.

    Args:
        p: drop probability, in [0, 1).

    Shapes:
        (B, C, *spatial) with one to three spatial axes; the output is alike.

    Raises:
        ValueError: ``p`` outside [0, 1), or an input of another shape or kind.

    Paper:
        N. Srivastava, G. Hinton, A. Krizhevsky, I. Sutskever, R. Salakhutdinov, "Dropout: A
        Simple Way to Prevent Neural Networks from Overfitting", JMLR 15:1929-1958, 2014.
        This is the inverted form: rescaled while training, nothing to do afterwards.

    Example:
        >>> import torch
        >>> Dropout(0.5)(torch.ones(1, 4, 8, 8)).unique().tolist()
        [0.0, 2.0]
    """

    unit = "element"
    paper = "Srivastava et al., JMLR 2014"

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p)

    def regularize(self, x: Tensor) -> Tensor:
        """Applies `drop_elements`."""
        return drop_elements(x, self.p)


def spatial_dropout(x: Tensor, p: float = 0.1, training: bool = True) -> Tensor:
    """Zeroes whole channels of a 1-D, 2-D or 3-D map; see `SpatialDropout`.

    Example:
        >>> import torch
        >>> y = spatial_dropout(torch.ones(1, 4, 3, 5), p=0.5)
        >>> y.flatten(2).std(-1).max().item()  # every channel is constant: all 0 or all 2
        0.0
    """
    p = check_rate(p, "spatial_dropout")
    if not training or p == 0.0:
        return x
    check_map(x, "spatial_dropout")
    return _BY_CHANNEL[x.dim() - 2](x, p, training=True)


@register("spatial_dropout")
class SpatialDropout(Regularizer):
    """Zeroes whole channels at random and rescales the others.

    y[b, c] = x[b, c] * m[b, c] / (1 - p), with one m ~ Bernoulli(1 - p) for each sample and
    channel. A map of one channel is therefore zeroed as a whole with probability p.

    Args:
        p: drop probability, in [0, 1).

    Shapes:
        (B, C, *spatial) with one to three spatial axes; the output is alike.

    Raises:
        ValueError: ``p`` outside [0, 1), or an input of another shape or kind.

    Paper:
        J. Tompson, R. Goroshin, A. Jain, Y. LeCun, C. Bregler, "Efficient Object Localization
        Using Convolutional Networks", CVPR 2015, arXiv 1411.4280. ``nn.Dropout2d`` is the same
        rule, but reads a three-axis map as one without a batch; here the first axis is always
        the batch.

    Example:
        >>> import torch
        >>> SpatialDropout(0.2)(torch.ones(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    unit = "channel"
    paper = "Tompson et al., CVPR 2015"

    def __init__(self, p: float = 0.1) -> None:
        super().__init__(p)

    def regularize(self, x: Tensor) -> Tensor:
        """Applies `spatial_dropout`."""
        return spatial_dropout(x, self.p)

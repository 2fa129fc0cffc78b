"""FocusedDropout: now and then, keep only where the most active channel is strong."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from medseg_reg.regularizers.base import (
    Regularizer,
    check_map,
    check_number,
    check_rate,
    register,
)

__all__ = ["FocusedDropout", "focused_dropout"]

_TINY = 1e-37  # a maximum below it cannot be told from a share of itself in float32


def focused_dropout(
    x: Tensor,
    p: float = 0.1,
    gamma: Sequence[float] = (0.3, 0.6),
    training: bool = True,
    *,
    taking_part: bool | None = None,
) -> Tensor:
    """Zeroes, with probability p, all positions outside the focus; see `FocusedDropout`.

    ``taking_part`` replaces the coin: True applies the rule, False returns ``x`` itself.

    Example:
        >>> import torch
        >>> x = torch.ones(1, 2, 2, 2)
        >>> x[0, 0] = torch.tensor([[0.0, 4], [8, 16]])
        >>> focused_dropout(x, gamma=(0.4, 0.4), taking_part=True)[0, 1]
        tensor([[0., 0.],
                [1., 1.]])
    """
    p = check_rate(p, "focused_dropout")
    low, high = _check_gamma(gamma, "focused_dropout")
    if not training or p == 0.0 or taking_part is False:
        return x
    check_map(x, "focused_dropout")
    with torch.no_grad():
        keep = _focus(x.detach(), low, high)
        if taking_part is None:
            keep = keep | (torch.rand(1, device=x.device) >= p)
        mask = keep[:, None].to(x.dtype)
    return x * mask


def _focus(x: Tensor, low: float, high: float) -> Tensor:
    """Which positions (B, *spatial) stay: those above gamma * max in the reference channel."""
    mean = x.flatten(2).mean(-1, dtype=torch.float32)
    mean = torch.where(mean.isfinite(), mean, -torch.inf)
    sample = torch.arange(x.shape[0], device=x.device)
    reference = x[sample, mean.argmax(1)].float()
    shape = (-1, *[1] * (x.dim() - 2))
    peak = reference.flatten(1).amax(1).view(shape)
    gamma = low + (high - low) * torch.rand(peak.shape, device=x.device)
    # without a positive finite maximum there is no focus, and everything stays
    without = ~((peak > _TINY) & peak.isfinite())
    return (reference > gamma * peak) | without


@register("focused_dropout")
class FocusedDropout(Regularizer):
    """In a share p of the batches, keeps only the positions where the strongest channel is high.

    For each sample, the reference channel k is the one of greatest mean, and gamma ~ U(low,
    high); y = x * m with m(i, j) = 1 where x[k](i, j) > gamma * max x[k], for every channel, and
    nothing is rescaled. In the other batches y = x. A sample whose reference channel has no
    positive maximum stays as it is.

    Here p is **not** the share of dropped units but the participation rate: one coin for a whole
    batch. A batch that takes part loses most of its positions: 67 to 91 % of a rectified random
    map, so that the mean over all batches is near .8 * p there; `measured_rate` says what it was.

    The paper raises the weight decay in the steps that take part. That is the training loop's
    work: decide before a step, set ``taking_part`` on the layers, use ``magnified_weight_decay``
    for this step, and restore both.

    Args:
        p: share of batches that take part, in [0, 1). 0 switches the layer off, whatever
            ``taking_part`` says.
        gamma: lowest and highest share of the maximum, 0 <= low <= high < 1.
        magnified_weight_decay: the weight decay that the training loop should set in steps that
            take part; None leaves the decay alone. The layer itself does not use it.

    Attributes:
        taking_part: None (at first): the layer tosses the coin. True or False: the training loop
            has decided for this step. No argument: it is state of a step, not of a
            configuration.

    Shapes:
        (B, C, *spatial) with one to three spatial axes; the output is alike.

    Raises:
        ValueError: a bad parameter, or an input of another shape or kind.

    Paper:
        M. Liu, T. Xie, X. Cheng, J. Deng, M. Yang, X. Wang, M. Liu, "FocusedDropout for
        Convolutional Neural Network", Applied Sciences 12(15):7682, 2022, doi
        10.3390/app12157682; preprint arXiv 2103.15425. It stands after the last stage but one.
        This is the published rule, so there is no ``faithful``. Its text says gamma ~ U(.3, .6);
        the algorithm printed in the preprint says (.6, .9), which is ``gamma=(0.6, 0.9)`` and
        keeps only 1 to 9 %. One gamma for each image is a reading of "different images have a
        different number of features". A sample without a positive maximum would become zero
        by the formula. The magnified decay of .001 is the best of the paper's figure.

    Example:
        >>> import torch
        >>> layer = FocusedDropout(p=0.1)
        >>> layer.taking_part = True
        >>> layer(torch.rand(2, 8, 16, 16)).shape
        torch.Size([2, 8, 16, 16])
    """

    default_places = ("bottleneck",)
    unit = "position outside the focus"
    paper = "Liu et al., Applied Sciences 2022"

    def __init__(
        self,
        p: float = 0.1,
        gamma: Sequence[float] = (0.3, 0.6),
        magnified_weight_decay: float | None = 0.001,
    ) -> None:
        super().__init__(p)
        owner = type(self).__name__
        self.gamma = _check_gamma(gamma, owner)
        if magnified_weight_decay is not None:
            magnified_weight_decay = check_number(
                magnified_weight_decay, "magnified_weight_decay", owner, 0.0
            )
        self.magnified_weight_decay = magnified_weight_decay
        self.taking_part: bool | None = None

    def regularize(self, x: Tensor) -> Tensor:
        """Applies `focused_dropout`."""
        return focused_dropout(x, self.p, self.gamma, taking_part=self.taking_part)


def _check_gamma(gamma: object, owner: str) -> tuple[float, float]:
    """Returns the pair as floats, or raises a ValueError that says what is expected."""
    valid = (
        isinstance(gamma, Sequence)
        and len(gamma) == 2
        and all(isinstance(g, Real) and not isinstance(g, bool) for g in gamma)
        and 0.0 <= gamma[0] <= gamma[1] < 1.0
    )
    if not valid:
        raise ValueError(
            f"{owner}: gamma is the lowest and the highest share of the maximum, a pair with "
            f"0 <= low <= high < 1; got {gamma!r}. For one fixed share g pass (g, g)."
        )
    return float(gamma[0]), float(gamma[1])  # type: ignore[index]

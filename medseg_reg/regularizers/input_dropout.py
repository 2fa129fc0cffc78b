"""Dropout of input pixels, between the image and the first convolution."""

from __future__ import annotations

from torch import Tensor

from medseg_reg.regularizers.base import Regularizer, register
from medseg_reg.regularizers.kernels.elements import drop_elements

__all__ = ["InputDropout"]


@register("input_dropout")
class InputDropout(Regularizer):
    """Zeroes single input values at random and rescales the others.

    y = x * m / (1 - p), with m ~ Bernoulli(1 - p) for every pixel and input channel. The rule is
    that of `Dropout`; the method is its place: between the input and the first hidden layer, and
    nowhere else. A class of its own lets placement put it there by default. Zero should mean
    "nothing there" in the image: normalise so that it does.

    Args:
        p: drop probability, in [0, 1).

    Shapes:
        (B, C, *spatial) with one to three spatial axes; the output is alike.

    Raises:
        ValueError: ``p`` outside [0, 1), or an input of another shape or kind.

    Paper:
        "Dropout Regularization for Automatic Segmented Dental Images", ACIIDS 2021, CCIS 1371,
        doi 10.1007/978-981-16-1685-3_21: a layer that drops 30 % before the first hidden layer
        of a Keras network. No code was published, and the text once calls p the probability to
        retain; here, as in Keras, it is the probability to drop. The paper's erosion and Canny
        steps are image preparation and not part of this layer.

    Example:
        >>> import torch
        >>> layer = InputDropout(0.3)
        >>> layer(torch.ones(1, 1, 64, 64)).unique().numel()  # 0 and 1 / 0.7
        2
    """

    default_places = ("input",)
    unit = "pixel of the input"
    paper = "Majanga and Viriri, ACIIDS 2021"

    def __init__(self, p: float = 0.3) -> None:
        super().__init__(p)

    def regularize(self, x: Tensor) -> Tensor:
        """Applies `drop_elements`."""
        return drop_elements(x, self.p)

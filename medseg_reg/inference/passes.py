"""How a network passes over a slice: at once or by a sliding window, and mirrored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from torch import Tensor

from medseg_reg.errors import MedsegError
from medseg_reg.networks.build import probabilities

Flip = Literal["horizontal", "vertical"]

# Mirrored left to right, the columns run the other way.
_AXES: dict[str, int] = {"horizontal": 3, "vertical": 2}
SIGMA = 0.125


@dataclass(frozen=True)
class Passes:
    """The passes over a batch of slices whose probabilities are averaged.

    Attributes:
        window: rows and columns of a sliding window; None takes a slice at once. What is smaller
            than the window is padded with 0, as `fit: crop` pads in training.
        overlap: the share of a window that the next one covers again, in [0, 1). Where windows
            overlap, their probabilities are weighted by a Gaussian around the middle of the
            window, whose standard deviation is an eighth of the window, as in nnU-Net and MONAI.
        flips: `horizontal` and `vertical`; every combination of them is a pass more, mirrored
            back exactly.

    Raises:
        MedsegError: a window below 8 pixels, an overlap out of range, an unknown flip.
    """

    window: tuple[int, int] | None = None
    overlap: float = 0.5
    flips: tuple[Flip, ...] = ()

    def __post_init__(self) -> None:
        if self.window is not None and not all(8 <= side <= 4096 for side in self.window):
            shown = " ".join(map(str, self.window))
            raise MedsegError(f"--window {shown}: expected rows and columns from 8 to 4096.")
        if not 0 <= self.overlap < 1:
            raise MedsegError(
                f"--overlap {self.overlap:g}: expected a share of the window, from 0 to below 1."
            )
        if unknown := set(self.flips) - _AXES.keys():
            raise MedsegError(f"--flips {unknown.pop()}: expected {' or '.join(_AXES)}.")

    @property
    def mirrored(self) -> list[tuple[int, ...]]:
        """The axes along which each pass is mirrored; the first pass is not.

        >>> Passes(flips=("horizontal", "vertical")).mirrored
        [(), (2,), (3,), (2, 3)]
        """
        axes = sorted({_AXES[flip] for flip in self.flips})
        return [some for count in range(len(axes) + 1) for some in combinations(axes, count)]

    def probabilities(
        self,
        network: Callable[[Tensor], Tensor],
        images: Tensor,
        at_once: int,
        activation: Callable[[Tensor], Tensor] = probabilities,
    ) -> Tensor:
        """Return mean class probabilities (B, K, H, W), float32.

        Args:
            network: maps images to logits.
            images: (B, C, H, W).
            at_once: windows in a batch.
            activation: makes class probabilities of what the network returns.
        """

        def predict(windows: Tensor) -> Tensor:
            return activation(network(windows))

        total = self._one(predict, images, at_once)
        for axes in self.mirrored[1:]:
            total = total + self._one(predict, images.flip(axes), at_once).flip(axes)
        return total / len(self.mirrored)

    def _one(self, predict: Callable[[Tensor], Tensor], images: Tensor, at_once: int) -> Tensor:
        if self.window is None:
            return predict(images)
        from monai.inferers.utils import sliding_window_inference  # seconds to import

        # Probabilities and not logits are averaged, as everywhere else.
        found = sliding_window_inference(
            images,
            self.window,
            at_once,
            predict,
            overlap=self.overlap,
            mode="gaussian",
            sigma_scale=SIGMA,
        )
        if not isinstance(found, Tensor):
            raise TypeError(f"expected one tensor, got {type(found).__name__}")
        return found


def window_of(asked: Sequence[int], size: tuple[int, int] | None) -> tuple[int, int]:
    """Return rows and columns of the window that the numbers of `--window` ask for.

    Args:
        asked: rows and columns, one number for both, or none for the size of the training.
        size: rows and columns that the training cut slices to, None where it did not.

    Raises:
        MedsegError: more than two numbers, or none where the training had no size.

    >>> window_of([96], None), window_of([], (64, 80))
    ((96, 96), (64, 80))
    """
    if len(asked) > 2:
        shown = " ".join(map(str, asked))
        raise MedsegError(f"--window {shown}: expected rows and columns, or one number for both.")
    if asked:
        return asked[0], asked[-1]
    if size is None:
        raise MedsegError(
            "--window: the training took slices of any size, so give the rows and columns of the "
            "window, as in --window 256 256."
        )
    return size

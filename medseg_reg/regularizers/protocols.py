"""What a layer may ask of the loop that trains it: attributes, set from outside between passes.

A loop serves every layer that has the attributes, whatever its class; a layer that nobody serves
works alone, as its own documentation says.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

__all__ = ["LabelReader", "LabelTaker", "PenaltyGiver", "StepTaker"]


@runtime_checkable
class StepTaker(Protocol):
    """A layer that takes part in some optimizer steps and is the identity in the others.

    Attributes:
        p: the share of steps that it takes part in.
        taking_part: whether it does in this step, decided by one coin for all layers, batches
            and processes of the step; None leaves the coin to the layer.
        magnified_weight_decay: the optimizer's weight decay in the steps that it takes part in;
            None leaves it as it is.
    """

    p: float
    taking_part: bool | None
    magnified_weight_decay: float | None


@runtime_checkable
class PenaltyGiver(Protocol):
    """A part of a network that asks for a term of the loss which the labels know nothing of.

    Attributes:
        penalty: a scalar that the last training pass gave, to be added to the loss; None for none.
    """

    penalty: Tensor | None


@runtime_checkable
class LabelTaker(Protocol):
    """A layer that needs the labels of a batch while training.

    Attributes:
        labels: the label maps (B, *spatial) of the batch that comes next; None between batches.
    """

    labels: Tensor | None


@runtime_checkable
class LabelReader(LabelTaker, Protocol):
    """A layer that also needs what its map looks like on held-out data.

    Attributes:
        classes: how many classes it tells apart; a loop refuses data with another number.
        recording: whether passes in ``eval()`` add to ``validation_sums``.
        validation_sums: sums over the held-out passes of this process; a loop adds them up over
            all processes.
        valid_for_reporting: False where the layer reads the labels of what it is tested on.
    """

    classes: int
    recording: bool
    validation_sums: Tensor | None

    @property
    def valid_for_reporting(self) -> bool:
        """Whether scores of a network with this layer may be compared with others."""

    def finish_validation(self) -> None:
        """Turns the sums, complete now, into what the next training steps use."""

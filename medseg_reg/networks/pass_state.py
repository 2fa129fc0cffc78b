"""Modules that hold something of a pass, which their copies leave out."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn


class PassState(nn.Module):
    """A module whose copies and pickles are those of a module between two passes.

    A loss that a pass leaves behind belongs to the graph of that pass, which cannot be copied: a
    copy of the network after a step, as for an average of its weights, would fail. A loop that
    takes the loss away is no help where activations are computed again: then there is a new one.

    Attributes:
        of_a_pass: the names of what a copy begins without; a class attribute.
    """

    of_a_pass: ClassVar[tuple[str, ...]] = ("penalty",)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes, those of a pass as None."""
        return {**self.__dict__, **dict.fromkeys(self.of_a_pass)}

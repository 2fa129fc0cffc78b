"""What a coarse network says of an image, as further channels of the image for a finer network.

Y. Wang, R. Huang, S. Song, Z. Huang, G. Huang, "Not All Images are Worth 16x16 Words: Dynamic
Transformers for Efficient Image Recognition" (DVT), NeurIPS 2021, arXiv 2105.15075, whose later
stages read the tokens of earlier ones; here, for pixels, they read the classes of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from medseg_reg.networks.build import probabilities
from medseg_reg.networks.fitting import fitted, unfitted

What = Literal["probabilities", "logits"]
NAME = "coarse"


class Coarse(nn.Module):
    r"""A trained network whose answer a finer one takes in.

    .. math::
        z &= \operatorname{resize}(f_c(\operatorname{fit}(x))), \qquad
        q = \operatorname{softmax}(z) \text{ or } z \\
        f(x) &= f_f([x; q])

    with f_c the coarse network, f_f the finer one, `fit` what brings images to the size that the
    coarse one was trained on, and [;] the joining of channels.

    The network inside is a part of neither weights nor parameters nor modules of what holds it: it
    is not trained, no regularizer is found in it or put into it, it is in no checkpoint, and stays
    in evaluation mode. It follows to other devices and types. For an export, `show` makes it a
    part like any other.

    Args:
        network: maps images (B, C, H, W) to logits (B, K, H, W), K = 1 for sigmoid. It loses its
            gradients.
        channels: of what the finer network gets, which are all classes or the K outputs.
        what: `probabilities` of all classes, or the `logits` as they are.
        size: rows and columns that images get for it; None where it takes them as they are.
        fit: how they get that size, `resize` or `letterbox`.

    Example:
        >>> coarse = Coarse(nn.Conv2d(1, 3, 1), channels=3, size=(8, 8))
        >>> fine = attach(nn.Conv2d(1 + 3, 3, 3, padding=1), coarse, image_channels=1)
        >>> fine(torch.rand(2, 1, 16, 16)).shape, len(fine.state_dict())
        (torch.Size([2, 3, 16, 16]), 2)
    """

    network: nn.Module

    def __init__(
        self,
        network: nn.Module,
        channels: int,
        what: What = "probabilities",
        size: tuple[int, int] | None = None,
        fit: str = "resize",
    ) -> None:
        super().__init__()
        # Past the registration, see above.
        object.__setattr__(self, "network", network.eval().requires_grad_(False))
        self.channels, self.what, self.size, self.fit = channels, what, size, fit
        self.image_channels = 0
        super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) of any size to logits (B, K, H, W) of that size."""
        if self.size is None:
            logits: Tensor = self.network(x)
            return logits
        seen = fitted(x, self.fit, list(self.size))
        return unfitted(self.network(seen), self.fit, [x.shape[2], x.shape[3]])

    def further(self, logits: Tensor) -> Tensor:
        """Return the channels for the finer network, of the logits that `forward` gave."""
        return probabilities(logits) if self.what == "probabilities" else logits

    def widened(self, image: Tensor, logits: Tensor) -> Tensor:
        """Return images with these channels, which a finer network takes without asking again."""
        return torch.cat([image, self.further(logits).to(image.dtype)], dim=1)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the network, so that it follows to devices and types, and is counted as a part."""
        yield "network", self.network

    def train(self, mode: bool = True) -> Coarse:
        """Stay in evaluation mode."""
        return self

    def show(self) -> None:
        """Make the network a part like any other, with weights, for an export."""
        self._modules["network"] = self.__dict__.pop("network")
        if (coarser := coarse_of(self.network)) is not None:
            coarser.show()

    def extra_repr(self) -> str:
        """Say what is taken over."""
        seen = "" if self.size is None else f", {self.fit} to {self.size[0]}x{self.size[1]}"
        return f"{type(self.network).__name__}, {self.what}{seen}"

    def _widen(self, network: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor] | None:
        image: Tensor = inputs[0]
        if image.shape[1] != self.image_channels:  # those of the cascade are wide already
            return None
        return (self.widened(image, self(image)),)


def attach(network: nn.Module, coarse: Coarse, image_channels: int) -> Any:
    """Let a network take images, and join to them what a coarse one says of them.

    Its code and its weights stay as they are; images that are `widened` already pass as they are.

    Args:
        network: takes the image's channels and the further ones.
        coarse: the coarse network.
        image_channels: channels of images.

    Returns:
        The network.
    """
    coarse.image_channels = image_channels
    network.add_module(NAME, coarse)
    network.register_forward_pre_hook(coarse._widen)
    return network


def coarse_of(network: nn.Module) -> Coarse | None:
    """Return the coarse network whose answer a network takes in, if it takes one."""
    found = getattr(network, NAME, None)
    return found if isinstance(found, Coarse) else None

"""The layer whose output are the logits, in any network, and the maps that it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medseg_reg.errors import MedsegError
from medseg_reg.insertion import find_places, slots
from medseg_reg.networks.build import Network, usual_size


@dataclass(frozen=True, eq=False)
class OutputLayer:
    """The output layer, where it gets the maps, and how many there are.

    Attributes:
        module: what is hooked, the last convolution or what holds it.
        argument: of the module, by position or name.
        width: number of maps.
    """

    module: nn.Module
    argument: int | str
    width: int

    @contextmanager
    def masked(self, masks: Tensor) -> Iterator[None]:
        """Let the layer answer for each mask (number, width) in turn, as a batch.

        What runs before it runs once. The batch that comes must be one image.
        """

        def answer(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor:
            maps = self._maps(args, kwargs)
            if len(maps) != 1:
                raise ValueError(f"{len(maps)} images in a batch, expected 1")
            found = []
            for mask in masks.to(maps):
                changed = maps * mask.view(1, -1, *[1] * (maps.ndim - 2))
                # Not the module itself, whose hooks have run and would run again.
                found.append(
                    module.forward(*self._with(args, changed), **self._named(kwargs, changed))
                )
            return torch.cat(found)

        handle = self.module.register_forward_hook(answer, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def watched(self, see: Callable[[Tensor], None]) -> Iterator[None]:
        """Show the maps of each pass."""

        def show(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Tensor) -> None:
            see(self._maps(args, kwargs))

        handle = self.module.register_forward_hook(show, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _maps(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        maps: Tensor = (
            args[self.argument] if isinstance(self.argument, int) else kwargs[self.argument]
        )
        return maps

    def _with(self, args: tuple[Any, ...], maps: Tensor) -> tuple[Any, ...]:
        if not isinstance(self.argument, int):
            return args
        return (*args[: self.argument], maps, *args[self.argument + 1 :])

    def _named(self, kwargs: dict[str, Any], maps: Tensor) -> dict[str, Any]:
        return {**kwargs, self.argument: maps} if isinstance(self.argument, str) else kwargs


def output_layer(
    network: Network,
    channels: int,
    size: Sequence[int] | None,
    device: torch.device | None = None,
) -> OutputLayer:
    """Return the output layer of a network.

    This package's own networks name it; in others it is the place `head` that `find_places` finds
    by running an example. The last convolution that runs would be wrong: UNet 3+ with guidance
    asks after its logits which classes are there at all.

    Args:
        network: the network.
        channels: of the images.
        size: rows and columns of an image; None for any that the network takes.
        device: where the network is.

    Raises:
        MedsegError: no convolution makes the logits, or several do.

    >>> from medseg_reg.networks.unet import UNet
    >>> layer = output_layer(UNet(2, 1, 2, channels=(4, 8)), 1, None)
    >>> layer.module, layer.width
    (Conv2d(4, 2, kernel_size=(1, 1), stride=(1, 1)), 4)
    """
    if slots(network):
        last: Any = network.classify
        return OutputLayer(last, 0, int(last.in_channels))
    shape = (1, channels, *(size or usual_size(network)))
    example = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device)
    heads = [place for place in find_places(network, example) if place.kind == "head"]
    if len(heads) != 1 or heads[0].argument is None:
        raise MedsegError(
            f"network '{type(network).__name__}': has {len(heads)} places 'head' that can be "
            "reached, expected one convolution that makes the logits."
        )
    head = heads[0]
    return OutputLayer(network.get_submodule(head.path), head.argument or 0, head.map_size[0])

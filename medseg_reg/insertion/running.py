"""Running a network for a look at it, so that nothing of it changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules import conv

from medseg_reg.errors import MedsegError

# An input, or the arguments of the network's forward pass.
Example = torch.Tensor | Sequence[Any] | Mapping[str, Any]

_FACTORS = (2, 4, 8, 16, 32, 64, 128)


def arguments(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and named arguments that an example stands for."""
    if isinstance(example, torch.Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    return tuple(example), {}


def device_of(example: Example) -> torch.device:
    """Return the device of the first tensor of an example."""
    args, kwargs = arguments(example)
    found = (a.device for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
    return next(found, torch.device("cpu"))


@contextmanager
def seeded(device: torch.device, seed: int = 0) -> Iterator[None]:
    """Seed the generators that a network on `device` draws from, for one block."""
    devices = []
    if device.type == "cuda":
        devices = [torch.cuda.current_device() if device.index is None else device.index]
    with torch.random.fork_rng(devices=devices):
        # torch.manual_seed would seed every GPU, and only those forked get their state back.
        torch.default_generator.manual_seed(seed)
        for index in devices:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Restore at the end of a block which modules are in training mode."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def quietly(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients; modes and torch's random state are restored.

    Layers that change the number of tokens in evaluation do not, so that the places of others are
    those of the network.
    """
    acting: list[Any] = [m for m in model.modules() if getattr(m, "in_evaluation", False) is True]
    with modes_kept(model):
        model.eval()
        for layer in acting:
            layer.in_evaluation = False
        try:
            with torch.no_grad(), seeded(device):
                yield
        finally:
            for layer in acting:
                layer.in_evaluation = True


def call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the network.

    Raises:
        MedsegError: it fails; says with which shapes, and which padded size would work.
    """
    try:
        return model(*args, **kwargs)
    except MedsegError:
        raise
    except Exception as error:
        given = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
        shapes = ", ".join(str(tuple(one.shape)) for one in given)
        text = " ".join(str(error).split())
        text = text if len(text) < 400 else f"{text[:400]}..."
        raise MedsegError(
            f"{type(model).__name__} does not run with the example {shapes}: "
            f"{type(error).__name__}: {text}{_proposal(model, given)}"
        ) from error


def _proposal(model: nn.Module, given: list[torch.Tensor]) -> str:
    """Say what to try instead of images with which the network does not run."""
    axes = [len(m.kernel_size) for m in model.modules() if isinstance(m, conv._ConvNd)]
    if len(given) != 1 or not axes:
        return ""
    if given[0].dim() == max(axes) + 1:
        return " If the batch axis is missing, give example[None]."
    return _padded_size(model, given[0])


def _padded_size(model: nn.Module, image: torch.Tensor) -> str:
    """Propose the smallest padded size with which the network does run, if there is one."""
    tried = {tuple(image.shape)}
    for factor in _FACTORS:
        shape = (*image.shape[:2], *(-(-size // factor) * factor for size in image.shape[2:]))
        if shape in tried:
            continue
        tried.add(shape)
        try:
            model(image.new_zeros(shape))
        except Exception:  # noqa: S112 - the first error is the one to tell
            continue
        size = "x".join(map(str, shape[2:]))
        return f" It runs with {size}: pad the example, and your images, to multiples of {factor}."
    return ""

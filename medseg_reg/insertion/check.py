"""Whether inserted layers are reached, in evaluation and in training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from medseg_reg.errors import MedsegError
from medseg_reg.insertion import kinds
from medseg_reg.insertion.attention import needs_weights
from medseg_reg.insertion.placement import check_kind
from medseg_reg.insertion.places import Place
from medseg_reg.insertion.report import Placement
from medseg_reg.insertion.running import Example, arguments, device_of, quietly
from medseg_reg.regularizers import Regularizer, TokenMerging

# A block that stochastic depth leaves out by chance is hardly left out eight times.
_PASSES = 8


def check_reached(
    model: nn.Module, example: Example, placements: Sequence[Placement], places: Sequence[Place]
) -> None:
    """Compare what the layers get in a forward pass with the places that were found.

    Raises:
        MedsegError: a layer is not called, called too often, or gets another map.
    """
    args, kwargs = arguments(example)
    with quietly(model, device_of(example)), _watched(model, placements) as met:
        model(*args, **kwargs)
    for placement, where in zip(placements, places, strict=True):
        got = met[placement.path]
        if len(got) != where.calls or where.map_size not in got:
            raise MedsegError(
                f"regularizer {placement.regularizer} at '{where.name}': expected {where.calls} "
                f"map(s) {where.map_size} in a forward pass, got {got or 'none'}. '{where.path}' "
                "seems to call all its children in turn, the new one too: choose another place."
            )


def check_suited(model: nn.Module, layer: Regularizer, where: Place, owner: str) -> None:
    """See whether a layer is one for a place of a network.

    Raises:
        MedsegError: it is not, or no layer can be put there; says why, and what to do.
    """
    check_kind(layer, where.name, owner)
    if where.windows and isinstance(layer, TokenMerging):
        raise MedsegError(
            f"{owner} at '{where.name}': its attention sees windows, whose tokens cannot be left "
            "out or merged one by one. Use drop_key or guided_key_dropout."
        )
    if where.problem:
        raise MedsegError(f"{owner} at '{where.name}': {where.problem}")
    if where.windows and getattr(layer, "protect_foreground", False):
        raise MedsegError(
            f"{owner} at '{where.name}': all windows lose the same patches, so none can be kept "
            "for its foreground. Set protect_foreground=False."
        )
    if where.masks and not layer.hides_keys:
        said = needs_weights(where.path, model.get_submodule(where.path))
        raise MedsegError(f"{owner} at '{where.name}': {said}")
    if isinstance(layer, TokenMerging) and layer.proportional:
        for keys in where.keys:
            if keys.problem:
                raise MedsegError(
                    f"{owner} at '{where.name}': merged tokens cannot count as many as they are, "
                    f"for {keys.problem} Or pass proportional=False."
                )


def check_training(
    model: nn.Module, example: Example, placements: Sequence[Placement], places: Sequence[Place]
) -> list[str]:
    """Run the example as in training and see whether every layer is called.

    A network may take another way through its code while it trains. Normalizations stay in
    evaluation mode, which changes no way and needs no batch of two, and so do layers that were
    there before; buffers are restored.

    Returns:
        What could not be checked, because the network does not train on an example alone; empty
        if all is well.

    Raises:
        MedsegError: a layer is reached in evaluation mode only, or the network drops tokens.
    """
    args, kwargs = arguments(example)
    try:
        with (
            quietly(model, device_of(example)),
            _buffers_restored(model),
            _watched(model, placements) as met,
        ):
            own = {model.get_submodule(placement.path) for placement in placements}
            for module in model.modules():
                still = (kinds.NORM, kinds.NORM_ACT)
                other = isinstance(module, Regularizer) and module not in own
                module.training = kinds.module_kind(module) not in still and not other
            for _ in range(_PASSES):
                model(*args, **kwargs)
                _check_tokens(placements, places, met)
                if all(met[placement.path] for placement in placements):
                    return []
    except MedsegError:
        raise
    except Exception as error:
        _check_tokens(placements, places, met)
        text = " ".join(str(error).split())[:200]
        return [f"Not checked in training mode: {type(error).__name__}: {text}"]
    missed = [placement.place for placement in placements if not met[placement.path]]
    raise MedsegError(
        f"regularizer {placements[0].regularizer} at {', '.join(missed)}: the network comes here "
        "in evaluation mode only, so the layer would do nothing in training. Leave this place out."
    )


def _check_tokens(
    placements: Sequence[Placement],
    places: Sequence[Place],
    met: Mapping[str, Sequence[tuple[int, ...]]],
) -> None:
    """Refuse a network that goes on with fewer tokens in training, at other positions."""
    for placement, where in zip(placements, places, strict=True):
        if where.tokens and any(size != where.map_size for size in met[placement.path]):
            raise MedsegError(
                f"regularizer {placement.regularizer} at '{where.name}': in training this place "
                f"has {met[placement.path][0]}, in evaluation {where.map_size}. The network drops "
                "tokens itself, so their maps are wrong: build it without, as with timm's "
                "patch_drop_rate=0."
            )


@contextmanager
def _watched(
    model: nn.Module, placements: Sequence[Placement]
) -> Iterator[dict[str, list[tuple[int, ...]]]]:
    """Note the size of every map that a layer gets, by the layer's path."""
    met: dict[str, list[tuple[int, ...]]] = {placement.path: [] for placement in placements}

    def watch(path: str) -> Any:
        return lambda layer, inputs: met[path].append(tuple(inputs[0].shape[1:]))

    handles = [model.get_submodule(path).register_forward_pre_hook(watch(path)) for path in met]
    try:
        yield met
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _buffers_restored(model: nn.Module) -> Iterator[None]:
    """Give every buffer its object and its values back."""
    saved = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, values in saved:
                module._buffers[name] = buffer
                if not torch.equal(buffer, values):
                    buffer.copy_(values)

"""Cutting a network that was trained with Structural Dropout down to a smaller width."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules import batchnorm, conv
from torch.utils._pytree import tree_leaves

from medseg_reg.errors import MedsegError
from medseg_reg.insertion import kinds
from medseg_reg.insertion.flow import Flow
from medseg_reg.insertion.graph import Step, Value, record
from medseg_reg.insertion.hooks import take
from medseg_reg.insertion.insert import inserted
from medseg_reg.insertion.running import Example, arguments, device_of, quietly
from medseg_reg.insertion.slots import Slot
from medseg_reg.regularizers.structural_dropout import (
    StructuralDropout,
    kept_channels,
    width_scale,
)

# They do with each channel the same, whatever the others are.
_BY_CHANNEL = {kinds.DROPOUT, kinds.IDENTITY, kinds.PAD, kinds.CROP, kinds.POOL}
_MIXING = ("softmax", "logsoftmax", "softmin", "softmax2d", "log_softmax")
_TOLERANCE = 1e-2  # of the largest value: also where convolutions run in TF32
# f(s x) = s f(x) for s > 0, so that the factor n/c may wait until after them.
_HOMOGENEOUS = ("relu", "leaky_relu", "leakyrelu", "prelu")


@dataclass
class _Cut:
    """What has to be cut for one layer.

    Attributes:
        layer: the regularizer.
        producer: the convolution whose outputs are cut.
        between: modules on the way with parameters for each channel.
        consumer: the convolution whose inputs are cut.
        channels: how many the map has.
        kept: how many stay.
    """

    layer: StructuralDropout
    producer: conv._ConvNd
    between: list[nn.Module]
    consumer: conv._ConvNd
    channels: int
    kept: int


class _CannotCutError(Exception):
    """Why a place cannot be cut."""


def narrow(model: nn.Module, width: float | int, example: Example) -> nn.Module:
    """Return a narrower copy of a network, which computes what the whole one does at a width.

    In the network, every `StructuralDropout` layer at that width keeps the first c of n channels
    of its map, scaled by n/c, and zeroes the rest. In the copy these channels are gone: c output
    channels of the convolution before, c channels of what normalizes them, c input channels of
    the convolution behind, whose weights are multiplied by n/c. The layers are gone too.

    Args:
        model: a network with `StructuralDropout` layers, all at places where the map goes from
            one convolution to one other, such as `between_convs`.
        width: how many channels stay at each place: an int, or a share in (0, 1]; see
            `kept_channels`.
        example: an input (B, C, *spatial), or a tuple or dictionary of arguments.

    Raises:
        MedsegError: there is no such layer, or places cannot be cut; names them and says why.

    >>> from medseg_reg.insertion import insert
    >>> wide = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    >>> x = torch.ones(1, 1, 8, 8)
    >>> report = insert(wide, "structural_dropout", "between_convs", example=x)
    >>> narrow(wide, 0.25, x)[0]
    Conv2d(1, 2, kernel_size=(3, 3), stride=(1, 1))
    """
    small = copy.deepcopy(model)
    layers = {p: m for p, m in small.named_modules() if isinstance(m, StructuralDropout)}
    if not layers:
        raise MedsegError(
            "narrow: the network has no StructuralDropout layer, so nothing says what can be cut. "
            "Train it with insert(model, 'structural_dropout', ...) first."
        )
    places = {one.path: one.place for one in inserted(small)}
    flow = Flow(record(small, example, inside=False))
    cuts, reasons = [], []
    for path, layer in layers.items():
        try:
            cuts.append(_plan(flow, path, layer, width))
        except (_CannotCutError, ValueError) as reason:
            reasons.append(f"{places.get(path, path)}: {reason}")
    if reasons:
        raise MedsegError(
            f"narrow: {len(reasons)} of {len(layers)} places cannot be cut: {'; '.join(reasons)}. "
            "Take the layers there out with `remove` before narrowing."
        )
    with torch.no_grad():
        for cut in cuts:
            _apply(cut)
    for path in reversed(layers):
        _drop(small, path, inserted=path in places)
    _compare(model, small, layers, width, example)
    return small


def _compare(
    model: nn.Module, small: nn.Module, paths: Iterable[str], width: float | int, example: Example
) -> None:
    """Run both networks: a thing that was overlooked must not go into a clinic unnoticed."""
    args, kwargs = arguments(example)
    wide = [model.get_submodule(path) for path in paths]
    widths = [layer.width for layer in wide]
    try:
        for layer in wide:
            layer.width = width  # type: ignore[assignment]
        with quietly(model, device_of(example)):
            expected = tree_leaves(model(*args, **kwargs))
    finally:
        for layer, old in zip(wide, widths, strict=True):
            layer.width = old
    with quietly(small, device_of(example)):
        found = tree_leaves(small(*args, **kwargs))
    for one, other in zip(expected, found, strict=True):
        if isinstance(one, Tensor) and one.is_floating_point():
            allowed = _TOLERANCE * max(1.0, float(one.abs().max()))
            difference = float((one.float() - other.float()).abs().max())
            if not difference <= allowed:
                raise MedsegError(
                    f"narrow: the narrower network differs from the whole one by {difference:.2g} "
                    f"on the example, allowed are {allowed:.2g}. Something between the layers and "
                    "their convolutions does not work on each channel by itself."
                )


def _plan(flow: Flow, path: str, layer: StructuralDropout, width: float | int) -> _Cut:
    """Find what belongs to one layer, or say why it cannot be cut."""
    steps = [s for s in flow.graph.steps if s.path == path and not s.door and s in flow.live]
    if len(steps) != 1:
        raise _CannotCutError(f"the layer runs {len(steps)} times in a forward pass")
    value = steps[0].inputs[0]
    channels = value.shape[1]
    consumer = _behind(flow, steps[0])
    producer, between = _before(flow, steps[0])
    return _Cut(layer, producer, between, consumer, channels, kept_channels(channels, width))


def _before(flow: Flow, step: Step) -> tuple[conv._ConvNd, list[nn.Module]]:
    """Go back from a layer to the convolution that makes its map."""
    between: list[nn.Module] = []
    value = flow.content(step.inputs[0])
    while True:
        if flow.readers(value) != [step] or flow.returned(value):
            raise _CannotCutError("its map, or what it is made from, is used elsewhere too")
        step = _origin(value)
        if step.kind == kinds.CONV:
            return _convolution(flow, step), between
        module = step.module
        if isinstance(module, batchnorm._NormBase) or (
            isinstance(module, nn.PReLU) and module.num_parameters > 1
        ):
            _used_once(flow, step)
            between.append(module)
        elif not _by_channel(step):
            raise _CannotCutError(f"{_what(step)} between convolution and layer mixes channels")
        value = flow.content(step.inputs[0])


def _behind(flow: Flow, step: Step) -> conv._ConvNd:
    """Go on from a layer to the convolution that reads its map."""
    while True:
        value = step.outputs[0]
        readers = flow.readers(value)
        if len(readers) != 1 or flow.returned(value):
            read = ", ".join(map(_what, readers)) or "nothing"
            raise _CannotCutError(f"its map is not read by one convolution alone, but by {read}")
        step = readers[0]
        if step.kind == kinds.CONV:
            return _convolution(flow, step)
        name = (step.name or type(step.module).__name__).lower()
        if not _by_channel(step) or (step.kind == kinds.ACT and name not in _HOMOGENEOUS):
            raise _CannotCutError(f"{_what(step)} is between the layer and the next convolution")


def _origin(value: Value) -> Step:
    if value.origin is None or value.origin.kind == kinds.INPUT:
        raise _CannotCutError("its map comes from no convolution")
    return value.origin


def _convolution(flow: Flow, step: Step) -> conv._ConvNd:
    """Return the convolution of a step, if it can be cut."""
    module = step.module
    if not isinstance(module, conv._ConvNd) or hasattr(module, "parametrizations"):
        raise _CannotCutError(f"{_what(step)} has no weight of its own that could be cut")
    if module.groups != 1:
        raise _CannotCutError(f"{_what(step)} has {module.groups} groups")
    _used_once(flow, step)
    return module


def _used_once(flow: Flow, step: Step) -> None:
    if flow.graph.calls[step.path] != 1:
        raise _CannotCutError(f"{_what(step)} is used elsewhere too")


def _by_channel(step: Step) -> bool:
    """Whether a step treats each channel by itself and has no parameters for them."""
    if any(value.constant and value.shape[1:] for value in step.inputs):
        return False
    if step.kind == kinds.ACT:
        return (step.name or type(step.module).__name__).lower() not in _MIXING
    return step.kind in _BY_CHANNEL


def _what(step: Step) -> str:
    """Name a step in a message."""
    return f"'{step.path}'" if step.module is not None else f"{step.name} in '{step.path}'"


def _apply(cut: _Cut) -> None:
    """Cut the parameters."""
    producer, consumer = cut.producer, cut.consumer
    producer.weight = _first(producer.weight, cut.kept, int(producer.transposed))
    if producer.bias is not None:
        producer.bias = _first(producer.bias, cut.kept)
    producer.out_channels = cut.kept
    for module in cut.between:
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = _first(parameter, cut.kept)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.dim() == 1:  # others count batches
                module._buffers[name] = buffer[: cut.kept].clone()
        size = "num_parameters" if isinstance(module, nn.PReLU) else "num_features"
        setattr(module, size, cut.kept)
    scale = width_scale(cut.channels, cut.kept)
    consumer.weight = _first(consumer.weight, cut.kept, int(not consumer.transposed), scale)
    consumer.in_channels = cut.kept


def _first(tensor: Tensor, kept: int, axis: int = 0, scale: float = 1.0) -> nn.Parameter:
    """Return the first values along an axis of a parameter."""
    values = tensor.detach().narrow(axis, 0, kept).clone() * scale
    return nn.Parameter(values, requires_grad=tensor.requires_grad)


def _drop(model: nn.Module, path: str, *, inserted: bool) -> None:
    """Take a layer out; where it is written into the network, put the identity there."""
    parent, _, name = path.rpartition(".")
    host = model.get_submodule(parent)
    if inserted or isinstance(host, Slot):
        take(model, path)
    else:
        setattr(host, name, nn.Identity())

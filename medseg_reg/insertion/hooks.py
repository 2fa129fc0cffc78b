"""The hooks that call inserted layers, hung on modules and taken off again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from medseg_reg.insertion.placement import fill
from medseg_reg.insertion.places import Place
from medseg_reg.insertion.report import Placement
from medseg_reg.insertion.sequence import hang_sequence, order_ends
from medseg_reg.insertion.slots import Slot
from medseg_reg.insertion.views import MAP, View, idle
from medseg_reg.regularizers import PatchDropout, Regularizer, TokenMerging
from medseg_reg.regularizers.guided_dropout import received_attention

_CHILD = "regularizer"


@dataclass(eq=False)
class LayerHook:
    """Calls a layer that is a child of the hooked module.

    It knows the child by name and gets the module as an argument, so that it is right in copies
    of the network too. The handles travel with it: unpickled in another process they keep their
    numbers, and no later hook can take their place.

    Attributes:
        child: the name of the child.
        place: the name of the place.
        argument: which argument it changes; None for the output.
        view: how the layer sees the tensor.
        handles: remove it, and what was hung on other modules for it.
    """

    before: ClassVar[bool]  # whether it is called before the module, else behind it
    with_names: ClassVar[bool] = False  # whether it gets the named arguments too
    child: str
    place: str
    argument: int | str | None
    view: View = MAP
    handles: list[RemovableHandle] = field(default_factory=list, repr=False)

    def changed(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return what the layer makes of a tensor."""
        return self.view(getattr(module, self.child), x)

    def hang(self, module: nn.Module) -> None:
        """Hang it on its module."""
        call: Any = self
        if self.before:
            handle = module.register_forward_pre_hook(call, with_kwargs=self.with_names)
        else:
            handle = module.register_forward_hook(call)
        self.handles.append(handle)


class OutputHook(LayerHook):
    """Changes what a module returns."""

    before = False

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Any:
        """Return the layer's output in place of the module's."""
        return self.changed(module, output)


class ArgumentHook(LayerHook):
    """Changes a positional argument."""

    before = True

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """Return the arguments, one of them changed by the layer."""
        index = int(self.argument or 0)
        return (*args[:index], self.changed(module, args[index]), *args[index + 1 :])


class CallHook(LayerHook):
    """Shows tokens (B, N, C) to a layer, which changes them elsewhere."""

    before = True

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Call the layer."""
        layer = getattr(module, self.child)
        if layer.acting or not torch.compiler.is_exporting():
            layer(args[int(self.argument or 0)].transpose(1, 2))


class KeywordHook(LayerHook):
    """Changes a named argument."""

    before = with_names = True

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the arguments, one of them changed by the layer."""
        key = str(self.argument)
        return args, {**kwargs, key: self.changed(module, kwargs[key])}


@dataclass(eq=False)
class MaskHook(LayerHook):
    """Hides keys from an attention whose weights are computed where no hook comes to.

    The layer gets even weights (B, H, N, N); what it zeroes is handed to the module as the
    argument that masks its attention, beside the mask that the network itself may hand over.

    Attributes:
        position: of that argument, where the network may give it by position.
    """

    before = with_names = True
    position: int | None = None

    def hang(self, module: nn.Module) -> None:
        """Hang it on its module, and see where the mask stands among the arguments."""
        parameters = list(signature(module.forward).parameters.values())
        named = [one.name for one in parameters if one.kind == Parameter.POSITIONAL_OR_KEYWORD]
        self.position = named.index(str(self.argument)) if self.argument in named else None
        super().hang(module)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the arguments, with a mask of the keys that the layer left."""
        layer, x = getattr(module, self.child), args[0]
        if idle(layer, x):
            return None
        rows, tokens, heads = x.shape[0], x.shape[1], self.view.heads  # type: ignore[attr-defined]
        even = x.new_full((1, 1, 1, 1), 1 / tokens, dtype=torch.float32)
        even = even.expand(rows, heads, tokens, tokens)
        weights = layer(even)
        if weights is even:
            return None
        at, key = self.position, str(self.argument)
        if at is not None and len(args) > at:
            return (*args[:at], _both(weights != 0, args[at]), *args[at + 1 :]), kwargs
        return args, {**kwargs, key: _both(weights != 0, kwargs.get(key))}


class ScoreHook(LayerHook):
    """Tells a layer what each token gets of an attention; a `BlockHook` calls the layer."""

    before = False

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Note the attention."""
        layer = getattr(module, self.child)
        if layer.training and layer.p > 0.0:
            layer.attention = received_attention(output)


@dataclass(eq=False)
class BlockHook:
    """Changes what a module adds to its input, by a layer inside.

    Attributes:
        path: the layer, as seen from the module.
        view: how the layer sees what is added.
    """

    path: str
    view: View

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
        """Return the input, and what the layer leaves of what was added."""
        layer: Any = module.get_submodule(self.path)
        if not (layer.training and layer.p > 0.0):
            self.view(layer, output)  # for those who watch
            return None
        return args[0] + self.view(layer, output - args[0])


@dataclass(eq=False)
class PaddingHook:
    """Tells a layer inside a module which tokens of a window only fill it up: those that are 0.

    Attributes:
        path: the layer, as seen from the module.
    """

    path: str

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Note the padding."""
        layer: Any = module.get_submodule(self.path)
        if layer.training and layer.p > 0.0:
            layer.padding = (args[0] == 0).all(-1)


@dataclass(eq=False)
class SampleCounter:
    """Tells a layer inside a module how many samples the module got.

    Attributes:
        path: the layer, as seen from the module.
    """

    path: str

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the size of the batch."""
        first = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        layer: Any = module.get_submodule(self.path)
        layer.samples = first.shape[0]


def hang(model: nn.Module, where: Place, layer: Regularizer) -> Placement:
    """Put a layer into a place."""
    host = model.get_submodule(where.path)
    layer.train(host.training)
    if isinstance(host, Slot):
        return fill(host, where.path, layer)
    names = (f"{_CHILD}_{n}" if n else _CHILD for n in range(len(host._modules) + 1000))
    child = next(name for name in names if not hasattr(host, name))
    if isinstance(layer, PatchDropout):
        layer.prepare(where.map_size[0], next(host.parameters()).device)
    host.add_module(child, layer)
    path = f"{where.path}.{child}" if where.path else child
    hook = _way(where, layer)(child, where.name, where.argument, where.view)
    hook.hang(host)
    wanted = where.kind != "attention" or hasattr(layer, "padding")
    if where.block is not None and wanted:
        hook.handles.append(_hang_around(model.get_submodule(where.block), where, path, layer))
    hook.handles += hang_sequence(model, where, layer)
    return Placement(where.name, path, type(layer).__name__, float(layer.p))


def _way(where: Place, layer: Regularizer) -> type[LayerHook]:
    """Return how a layer gets at the tensor of a place."""
    if where.kind == "block_residual":
        return ScoreHook
    if where.masks:
        return MaskHook
    if where.argument is None:
        return OutputHook
    if isinstance(layer, TokenMerging):
        return CallHook
    return ArgumentHook if isinstance(where.argument, int) else KeywordHook


def _hang_around(around: nn.Module, where: Place, path: str, layer: Regularizer) -> RemovableHandle:
    """Hang on the module around a place what the layer, or its hook, needs from there."""
    inside = path.removeprefix(f"{where.block}.") if where.block else path
    if where.kind == "block_residual":
        handle = around.register_forward_hook(BlockHook(inside, where.view))
        # What a block adds is known for the tokens that it got, so they are completed later.
        order_ends(around)
        return handle
    if where.kind == "attention":
        return around.register_forward_pre_hook(PaddingHook(inside))
    counter = SampleCounter(inside)
    return around.register_forward_pre_hook(counter, with_kwargs=True)


def take(model: nn.Module, path: str) -> None:
    """Take the layer at a path out, with its hooks."""
    parent, _, child = path.rpartition(".")
    host = model.get_submodule(parent)
    if isinstance(host, Slot):
        del host[int(child)]
        return
    for hook in list(hooks_of(host)):
        if hook.child == child:
            for handle in hook.handles:
                handle.remove()
    delattr(host, child)


def hooks_of(module: nn.Module) -> Iterator[LayerHook]:
    """Return the hooks of a module that call inserted layers."""
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        if isinstance(hook, LayerHook):
            yield hook


def _both(keep: Tensor, mask: Tensor | None) -> Tensor:
    """Return a mask of what two masks leave; a row of which nothing is left keeps the second."""
    if mask is None:
        return keep
    if mask.dtype is not torch.bool:
        both = mask.masked_fill(~keep, -torch.inf)
        # Some networks forbid a key by -inf, others by a very low score.
        left = (both > torch.finfo(mask.dtype).min / 2).any(-1, keepdim=True)
        return torch.where(left, both, mask)
    both = keep & mask
    return torch.where(both.any(-1, keepdim=True), both, mask)

"""Which tensor feeds which module: one example, followed through a network.

Every call of a module is two doors, ENTER for each tensor argument and EXIT for the result, and
every convolution, activation, addition, ... is a step between values. The doors are where a layer
can be put without touching the network's code. While the example runs, each door hands on a new
tensor object over the same memory, so that it is always known through which doors a tensor came:
the map that a block returns and the map that it kept for itself are two values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from medseg_reg.errors import MedsegError
from medseg_reg.insertion import kinds
from medseg_reg.insertion.running import Example, arguments, call, quietly


@dataclass(eq=False)
class Value:
    """A tensor at one moment; after an in-place change it is another value.

    Attributes:
        shape: its shape.
        origin: the step that made it; None for parameters, buffers and other constants.
        readers: the steps that read it, doors included.
    """

    shape: tuple[int, ...]
    origin: Step | None = None
    readers: list[Step] = field(default_factory=list)

    @property
    def constant(self) -> bool:
        """Whether it does not depend on the network's input."""
        return self.origin is None


@dataclass(eq=False)
class Step:
    """A door, or what one module or function did.

    Attributes:
        kind: one of the constants of `kinds`.
        index: its number in the order of time.
        path: the module; for a function, the module that called it.
        module: the module; None for a function.
        call: the how many-th call of the module it belongs to.
        inputs: the values read.
        outputs: the values made.
        name: of the function; empty for a module.
        argument: of an ENTER: position or name of the argument.
        axes: of a layout function: the order of axes that it makes.
        rate: of a fused attention: the dropout that it was called with.
    """

    kind: str
    index: int
    path: str
    module: nn.Module | None
    call: int
    inputs: list[Value]
    outputs: list[Value] = field(default_factory=list)
    name: str = ""
    argument: int | str | None = None
    axes: tuple[int, ...] | None = None
    rate: float = 0.0

    @property
    def door(self) -> bool:
        """Whether it only hands a value on."""
        return self.kind in (kinds.ENTER, kinds.EXIT)


@dataclass
class Graph:
    """What `record` returns.

    Attributes:
        steps: in the order of time.
        size: the spatial size of the input.
        rank: the number of axes of a map, batch and channels included.
        inputs: the network's inputs that are maps.
        outputs: what it returned.
        calls: how often each module was called.
    """

    steps: list[Step]
    size: tuple[int, ...]
    rank: int
    inputs: list[Value]
    outputs: list[Value]
    calls: Counter[str]


@dataclass
class _Frame:
    """A call that is running."""

    module: nn.Module
    path: str
    call: int
    kind: str | None
    inputs: list[Value]
    tensors: list[tuple[torch.Tensor, int]]


class _Recorder(TorchFunctionMode):
    """Notes calls of modules by hooks and calls of functions by torch's function mode."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.paths = {module: path for path, module in model.named_modules()}
        self.steps: list[Step] = []
        self.calls: Counter[str] = Counter()
        self.frames: list[_Frame] = []
        self.paused = False
        # By id; the tensors are kept, so that no id is given twice.
        self.values: dict[int, Value] = {}
        self.kept: list[torch.Tensor] = []
        # The tensor objects over one memory: an in-place change is seen through all of them.
        self.families: dict[int, list[torch.Tensor]] = {}

    def attach(self, inside: bool) -> list[Any]:
        """Hook every module; `inside` hides what other hooks of a module do in its own call."""
        handles = []
        for module in self.paths:
            handles.append(
                module.register_forward_pre_hook(self.enter, with_kwargs=True, prepend=inside)
            )
            handles.append(module.register_forward_hook(self.leave, prepend=not inside))
        return handles

    # Values

    def value(self, tensor: torch.Tensor) -> Value:
        if id(tensor) not in self.values:
            self.bind(tensor, Value(tuple(tensor.shape)))
        return self.values[id(tensor)]

    def bind(self, tensor: torch.Tensor, value: Value) -> None:
        self.kept.append(tensor)
        self.values[id(tensor)] = value

    def change(self, tensor: torch.Tensor, value: Value) -> None:
        """Bind a value to a tensor that was changed in place."""
        for relative in self.families.get(id(tensor), [tensor]):
            if relative.shape == tensor.shape:
                self.bind(relative, value)

    def alias(self, tensor: torch.Tensor, value: Value) -> torch.Tensor:
        """Return another tensor object over the same memory."""
        self.paused = True
        try:
            other = tensor.view_as(tensor)
        finally:
            self.paused = False
        family = self.families.setdefault(id(tensor), [tensor])
        family.append(other)
        self.families[id(other)] = family
        self.bind(other, value)
        return other

    def step(self, kind: str, inputs: Iterable[Value], outputs: int, **more: Any) -> Step:
        """Note a step whose outputs, still without a shape, are constants if all inputs are."""
        step = Step(kind, len(self.steps), inputs=list(inputs), **more)
        self.steps.append(step)
        for value in dict.fromkeys(step.inputs):
            value.readers.append(step)
        live = step.kind == kinds.INPUT or not all(value.constant for value in step.inputs)
        step.outputs = [Value((), step if live else None) for _ in range(outputs)]
        return step

    # Modules

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.frames and self.frames[-1].kind is not None:
            return None
        path = self.paths[module]
        frame = _Frame(module, path, self.calls[path], kinds.module_kind(module), [], [])
        self.calls[path] += 1

        def door(argument: int | str, given: Any) -> Any:
            if not isinstance(given, torch.Tensor):
                frame.inputs += [self.value(t) for t in _tensors(given)]
                return given
            step = self.step(
                kinds.ENTER,
                [self.value(given)],
                1,
                path=path,
                module=module,
                call=frame.call,
                argument=argument,
            )
            step.outputs[0].shape = tuple(given.shape)
            frame.inputs.append(step.outputs[0])
            given = self.alias(given, step.outputs[0])
            frame.tensors.append((given, _version(given)))
            return given

        new_args = tuple(door(i, given) for i, given in enumerate(args))
        new_kwargs = {key: door(key, given) for key, given in kwargs.items()}
        self.frames.append(frame)
        return new_args, new_kwargs

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        frame = self.frames[-1]
        if frame.module is not module:
            return None
        self.frames.pop()
        place = {"path": frame.path, "module": module, "call": frame.call}
        made = _tensors(output)
        if frame.kind is not None:
            made_values = self.atomic(frame, made, place)
        else:
            for tensor in made:  # made where nobody looks, as by compiled code
                if id(tensor) not in self.values and frame.inputs:
                    step = self.step(kinds.OTHER, frame.inputs, 1, **place)
                    step.outputs[0].shape = tuple(tensor.shape)
                    self.bind(tensor, step.outputs[0])
            made_values = [self.value(tensor) for tensor in made]
        if not isinstance(output, torch.Tensor):
            return None
        step = self.step(kinds.EXIT, made_values, 1, **place)
        step.outputs[0].shape = tuple(output.shape)
        return self.alias(output, step.outputs[0])

    def atomic(self, frame: _Frame, made: list[torch.Tensor], place: dict[str, Any]) -> list[Value]:
        """Note what a module did that is followed as a whole."""
        step = self.step(frame.kind or kinds.OTHER, frame.inputs, len(made), **place)
        for tensor, value in zip(made, step.outputs, strict=True):
            value.shape = tuple(tensor.shape)
            if id(tensor) not in self.values:
                self.bind(tensor, value)
        for tensor, version in frame.tensors:
            if step.outputs and _version(tensor) != version:
                self.change(tensor, step.outputs[0])
        return step.outputs

    # Functions

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused or not self.frames or self.frames[-1].kind is not None:
            return func(*args, **kwargs)
        read = _tensors((args, kwargs))
        versions = [_version(tensor) for tensor in read]
        output = func(*args, **kwargs)
        made = _tensors(output)
        changed = [t for t, v in zip(read, versions, strict=True) if _version(t) != v]
        known = {id(tensor) for tensor in read} - {id(tensor) for tensor in changed}
        made = [tensor for tensor in made if id(tensor) not in known]
        made += [tensor for tensor in changed if not any(tensor is other for other in made)]
        if made:
            self.function(func, args, kwargs, read, made, changed)
        return output

    def function(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        read: list[torch.Tensor],
        made: list[torch.Tensor],
        changed: list[torch.Tensor],
    ) -> None:
        """Note what a function did."""
        frame, name = self.frames[-1], kinds.function_name(func)
        values = [self.value(tensor) for tensor in read]
        kind = kinds.function_kind(name)
        if name == "getitem" and read[0].dim() == made[0].dim():
            kind = kinds.CROP if read[0].shape[:2] == made[0].shape[:2] else kinds.OTHER
        step = self.step(
            kind, values, len(made), path=frame.path, module=None, call=frame.call, name=name
        )
        if kind == kinds.LAYOUT:
            self.paused = True
            step.axes = kinds.permutation(func, args, kwargs)
            self.paused = False
        if name == kinds.FUSED_ATTENTION:
            step.rate = float(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0))
        for tensor, value in zip(made, step.outputs, strict=True):
            value.shape = tuple(tensor.shape)
            if any(tensor is other for other in changed):
                self.change(tensor, value)
            else:
                self.bind(tensor, value)


def record(model: nn.Module, example: Example, *, inside: bool = True) -> Graph:
    """Run an example through a network in evaluation mode and follow every tensor.

    Modes, statistics and torch's random state are as before.

    Args:
        model: the network.
        example: an input, or a tuple or dictionary of arguments.
        inside: hide regularizers that hooks call, as if the network were without them.

    Raises:
        MedsegError: the forward pass fails, no argument is a batch of maps, or a module is
            compiled or scripted.
    """
    _check_plain(model)
    recorder = _Recorder(model)
    # Objects of its own for each argument: the same image may be given twice.
    args, kwargs = pytree.tree_map(
        lambda leaf: leaf.view_as(leaf) if isinstance(leaf, torch.Tensor) else leaf,
        arguments(example),
    )
    tensors = _tensors((args, kwargs))
    maps = [t for t in tensors if t.dim() in (3, 4, 5) and t.is_floating_point()]
    if not maps:
        shapes = ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in tensors) or "no tensor"
        raise MedsegError(
            "example: expected a floating-point batch of images (B, C, *spatial) with one to "
            f"three spatial axes, as torch.rand(1, 1, 64, 64); got {shapes}."
        )
    for tensor in maps:
        step = recorder.step(
            kinds.INPUT, [], 1, path="", module=None, call=0, argument=len(recorder.steps)
        )
        step.outputs[0].shape = tuple(tensor.shape)
        recorder.bind(tensor, step.outputs[0])
    inputs = [recorder.values[id(tensor)] for tensor in maps]
    handles: list[Any] = []
    try:
        handles = recorder.attach(inside)
        with quietly(model, maps[0].device), recorder:
            output = call(model, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    outputs = [recorder.value(tensor) for tensor in _tensors(output)]
    graph = Graph(
        recorder.steps,
        tuple(maps[0].shape[2:]),
        maps[0].dim(),
        inputs,
        outputs,
        recorder.calls,
    )
    _check_axes(graph)
    return graph


def _check_plain(model: nn.Module) -> None:
    """Refuse what hooks cannot look into."""
    for path, module in model.named_modules():
        # torch.compile wraps a module, or marks it.
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise MedsegError(
                f"'{path}' ({type(module).__name__}) is compiled. Insert first, then compile."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise MedsegError(f"'{path}' is a scripted module, which takes no layers.")


def _check_axes(graph: Graph) -> None:
    """Refuse an image without a batch axis, which torch's convolutions would take."""
    for step in graph.steps:
        size = getattr(step.module, "kernel_size", ())
        if step.kind != kinds.CONV or not isinstance(size, tuple) or not step.inputs:
            continue
        shape = step.inputs[0].shape
        if not step.inputs[0].constant and len(shape) == len(size) + 1:
            raise MedsegError(
                f"example: the convolution '{step.path}' got {shape}, which has no batch axis. "
                "Give a batch of images: example[None]."
            )


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _version(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place; 0 where torch does not count."""
    return 0 if tensor.is_inference() else tensor._version

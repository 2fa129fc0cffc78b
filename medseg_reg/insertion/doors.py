"""The doors of a recorded network: where a layer can be hung so that the right readers meet it."""

from __future__ import annotations

import torch
from torch import nn

from medseg_reg.insertion import kinds
from medseg_reg.insertion.flow import Flow
from medseg_reg.insertion.graph import Graph, Step, Value
from medseg_reg.insertion.slots import Slot
from medseg_reg.regularizers import Regularizer

# Containers may call all their children in turn; scripted modules take no hooks.
_NO_HOSTS = (
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    Regularizer,
    Slot,
    torch.jit.ScriptModule,
)


def after(graph: Graph, value: Value, *, leaf: bool = True) -> Step | None:
    """Return the door through which every reader gets a value."""
    doors: list[Step] = []
    while value not in graph.outputs:
        # What a module returns is left unread where it changed its argument in place.
        readers = [
            reader
            for reader in value.readers
            if not reader.door or reader.outputs[0].readers or reader.outputs[0] in graph.outputs
        ]
        if len(readers) != 1 or not readers[0].door:
            break
        doors.append(readers[0])
        value = readers[0].outputs[0]
    return _best(graph, doors, leaf)


def before(flow: Flow, step: Step, index: int, *, nearest: bool = False) -> Step | None:
    """Return the door through which a step, and nothing else, gets an input.

    Of several the first of a module that runs once and has no children, or the `nearest`.
    """
    doors: list[Step] = []
    value = step.inputs[index]
    while value.origin is not None:
        if any(reader is not step for reader in value.readers if reader in flow.live):
            break
        at = value.origin
        if at.door:
            doors.append(at)
        elif at.kind not in (kinds.PAD, kinds.CROP, kinds.IDENTITY) or at.module is not None:
            break
        step, value = at, at.inputs[0]
    if nearest:
        hosts = (door for door in doors if door.module is not None and _can_host(door.module))
        return next(hosts, None)
    return _best(flow.graph, doors, leaf=True)


def leaving(step: Step) -> Step | None:
    """Return the EXIT of a module, or of the last module inside that can carry a layer."""
    while step.module is not None and not _can_host(step.module):
        origin = step.inputs[0].origin
        if origin is None or origin.kind != kinds.EXIT:
            return None
        step = origin
    return step


def _best(graph: Graph, doors: list[Step], leaf: bool) -> Step | None:
    """Choose the first door of a module that runs once and, if `leaf`, has no children."""

    def order(door: Step) -> tuple[bool, bool]:
        several = graph.calls[door.path] != 1
        return (several, leaf and door.module is not None and not _is_leaf(door.module))

    hosts = [door for door in doors if door.module is not None and _can_host(door.module)]
    return min(hosts, key=order, default=None)


def _can_host(module: nn.Module) -> bool:
    return not isinstance(module, _NO_HOSTS)


def _is_leaf(module: nn.Module) -> bool:
    return kinds.module_kind(module) is not None or not any(True for _ in module.children())

"""The places of a network that a regularizer can go to, with the names a paper would use.

| kind | the map there |
|---|---|
| `input` | what the network gets |
| `between_convs` | after a convolution and its activation, read directly by a second convolution |
| `after_norm` | after a normalization, before the activation |
| `after_block` | at the end of a run of convolutions of one resolution, or of a residual block |
| `skip` | an encoder's map on its way to the decoder |
| `residual` | the branch of a residual addition, before it is added; of tokens too |
| `gate` | from which the coefficient of an attention gate is computed |
| `head` | before the last convolution |
| `attention` | the weights of an attention, after the softmax: (B, heads, queries, keys) |
| `attention_head` | what the heads of an attention give, before they are projected |
| `block_residual` | all that a transformer block adds to its tokens |
| `tokens` | what goes into the first of several transformer blocks of one resolution |
| `tree_gates` | the gates of a hierarchical mixture of experts |
| `routing` | the gates of sparsely gated experts |
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from medseg_reg.errors import MedsegError, nearest
from medseg_reg.insertion import doors, kinds
from medseg_reg.insertion.finder import KINDS, Finder
from medseg_reg.insertion.flow import Flow
from medseg_reg.insertion.graph import Graph, Step, Value, record
from medseg_reg.insertion.running import Example, arguments, call, device_of, quietly
from medseg_reg.insertion.selection import kind_of
from medseg_reg.insertion.slots import Slot, has_own_slots, slots
from medseg_reg.insertion.tokens import Claim, Keys, Tokens
from medseg_reg.insertion.views import MAP, View
from medseg_reg.insertion.windows import Windows


@dataclass(frozen=True)
class Place:
    """Somewhere in a network where a layer can be put.

    Attributes:
        name: as `encoder.2.between_convs`; numbered at the end where several share it.
        kind: the kind of place, its name without part, level and number.
        path: the module that carries the layer.
        argument: the layer gets this argument of the module, by position or name; None: it gets
            the module's output.
        map_size: channels and spatial size of the map there; heads, queries and keys of
            attention weights.
        calls: how often a forward pass comes here; above 1 where a module is used again.
        view: how a layer sees the tensor there.
        block: a module around that something is needed from; None where nothing is.
        masks: the weights of a fused attention are never there: what a layer zeroes is handed to
            the module as the argument that masks its attention.
        tokens: whether it is a place of tokens.
        prefix: how many tokens in front are no patches.
        problem: why no layer can be put here; empty where one can.
        note: what is odd here.
        chain: for `tokens`: the modules that they go through one after the other.
        keys: for `tokens`: those of the attentions inside.
        windows: of these, what is known where their attention is one of windows.
    """

    name: str
    kind: str
    path: str
    argument: int | str | None
    map_size: tuple[int, ...]
    calls: int = 1
    view: View = MAP
    block: str | None = None
    masks: bool = False
    tokens: bool = False
    prefix: int = 0
    problem: str = ""
    note: str = ""
    chain: tuple[str, ...] = ()
    keys: tuple[Keys, ...] = ()
    windows: tuple[Windows, ...] = ()

    def __str__(self) -> str:
        """Name, size and module, for a list to read."""
        size = "x".join(map(str, self.map_size))
        where = "output" if self.argument is None else f"argument {self.argument}"
        module = f"'{self.path}'" if self.path else "the network"
        return f"{self.name} ({size}): {where} of {module}"


def find_places(model: nn.Module, example: Example) -> list[Place]:
    """Find the places of a network by following one example through it.

    A network of this package has explicit slots; then these are its places.

    The network is as before: its weights, statistics, modes, and torch's random state.

    Args:
        model: the network, in any mode; it is looked at in evaluation mode.
        example: an input (B, C, *spatial), or a tuple or dictionary of arguments.

    Raises:
        MedsegError: the network does not run with the example.

    >>> import torch
    >>> block = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]
    >>> for place in find_places(nn.Sequential(*block, nn.Conv2d(4, 2, 1)), torch.rand(1, 1, 8, 8)):
    ...     print(place)
    input (1x8x8): argument 0 of '0'
    encoder.0.between_convs (4x8x8): argument 0 of '2'
    encoder.0.after_block (4x8x8): output of '3'
    head (4x8x8): argument 0 of '4'
    """
    known = slots(model)
    found = _slot_places(model, known, example) if known else []
    return found if has_own_slots(model) else [*_places(record(model, example)), *found]


def path_places(graph: Graph, globs: Sequence[str], owner: str) -> list[Place]:
    """Return a place behind each module whose path matches a pattern.

    It is one of maps, or one where tokens of a residual branch come out.

    Raises:
        MedsegError: a pattern matches no module that ran, or one that returns no map.
    """
    flow = Flow(graph)
    found: dict[str, Place] = {}
    branches = {
        place.path: place
        for _, place in _token_places(flow)
        if place.kind == "residual" and place.argument is None
    }
    ran = [path for path in graph.calls if path]
    for glob in globs:
        paths = [path for path in ran if fnmatchcase(path, glob)]
        if not paths:
            raise MedsegError(
                f"{owner}: no module that runs matches 'path:{glob}'.{nearest(glob, ran)} "
                f"Modules are, for example, {', '.join(ran[:4])}."
            )
        for path in paths:
            if path in branches:
                found[path] = replace(branches[path], name=f"path:{path}")
                continue
            exits = [s for s in graph.steps if s.kind == kinds.EXIT and s.path == path]
            used = [s for s in exits if s in flow.live and flow.is_map(s.outputs[0])]
            hosts = {door.path for step in used if (door := doors.leaving(step)) is not None}
            if len(used) < graph.calls[path] or len(hosts) != 1:
                raise MedsegError(
                    f"{owner}: behind 'path:{path}' is no place: the module returns no map "
                    "(B, C, *spatial) that the network goes on with, and no branch of tokens. Name "
                    "a module inside."
                )
            size = used[0].outputs[0].shape[1:]
            note = kinds.own_drop_path(used[0].module)
            found[path] = Place(
                f"path:{path}", "path", hosts.pop(), None, size, len(used), note=note
            )
    return list(found.values())


def _slot_places(model: nn.Module, known: dict[str, Slot], example: Example) -> list[Place]:
    """Return the slots that a network uses, in its own order."""
    seen: dict[nn.Module, list[tuple[int, ...]]] = defaultdict(list)

    def note(slot: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen[slot].append(tuple(inputs[0].shape[1:]))

    hooks = [slot.register_forward_pre_hook(note) for slot in known.values()]
    try:
        with quietly(model, device_of(example)):
            call(model, *arguments(example))
    finally:
        for hook in hooks:
            hook.remove()
    return [
        Place(name, kind_of(name), name, None, seen[slot][-1], len(seen[slot]))
        for name, slot in known.items()
        if slot in seen
    ]


def _places(graph: Graph) -> list[Place]:
    """Return every place of a recorded network, in the order of its forward pass."""
    finder = Finder(graph)
    claims: dict[tuple[str, str, int | str | None], list[tuple[Step, Value]]] = {}
    for kind in KINDS:
        for value, door in finder.claims(kind):
            if door is not None and finder.flow.is_map(value):
                key = (kind, door.path, door.argument)
                claims.setdefault(key, []).append((door, value))
    found = _token_places(finder.flow)
    for (kind, path, argument), met in claims.items():
        # A module that runs several times must be this place each time.
        if len({door.call for door, _ in met}) == graph.calls[path]:
            door, value = met[0]
            name, size = _name(finder.flow, kind, value), value.shape[1:]
            note = kinds.own_drop_path(door.module) if kind == "residual" else ""
            place = Place(name, kind, path, argument, size, graph.calls[path], note=note)
            found.append((door.index, place))
    return _numbered([place for _, place in sorted(found, key=lambda one: one[0])])


def _token_places(flow: Flow) -> list[tuple[int, Place]]:
    """Return every place of tokens, each with the index of its door."""
    claims: dict[tuple[str, str, int | str | None], list[Claim]] = {}
    for claim in Tokens(flow).claims():
        argument = claim.door.argument if claim.argument is None else claim.argument
        claims.setdefault((claim.kind, claim.door.path, argument), []).append(claim)
    found = []
    for (kind, path, argument), met in claims.items():
        calls = flow.graph.calls[path]
        if len({claim.door.call for claim in met}) < calls:
            continue
        claim = met[0]
        pixels = math.prod(flow.graph.size) / claim.tokens
        level = max(0, round(math.log2(pixels) / len(flow.graph.size)))
        part = "decoder" if flow.risen(claim.value) else "encoder"
        place = Place(
            name=f"{part}.{level}.{kind}",
            kind=kind,
            path=path,
            argument=argument,
            map_size=claim.size,
            calls=calls,
            view=claim.view,
            block=claim.block,
            masks=claim.masks,
            tokens=True,
            prefix=claim.prefix,
            problem=claim.problem,
            note=claim.note,
            chain=claim.chain,
            keys=claim.keys,
            windows=claim.windows,
        )
        found.append((claim.door.index, place))
    return found


def _name(flow: Flow, kind: str, value: Value) -> str:
    """Return the name of a place without a number: part, level, kind."""
    if kind in ("input", "head"):
        return kind
    level = _level(flow.graph.size, value.shape[2:])
    if kind == "skip":
        return f"skip.{level}"
    pixels = math.prod(value.shape[2:])
    if pixels == flow.smallest and pixels < math.prod(flow.graph.size):
        return f"bottleneck.{kind}"
    # What depends on nothing enlarged is the encoder's, wherever the code has it.
    return f"{'decoder' if flow.risen(value) else 'encoder'}.{level}.{kind}"


def _level(size: Sequence[int], here: Sequence[int]) -> int:
    """Return the rounded binary logarithm of full size over size, of the axis most reduced."""
    return max(0, *(round(math.log2(n / m)) for n, m in zip(size, here, strict=True)))


def _numbered(places: list[Place]) -> list[Place]:
    """Number the places that share a name."""
    count = Counter(place.name for place in places)
    seen: Counter[str] = Counter()
    result = []
    for place in places:
        name = place.name
        if count[name] > 1:
            place = replace(place, name=f"{name}.{seen[name]}")
            seen[name] += 1
        result.append(place)
    return result

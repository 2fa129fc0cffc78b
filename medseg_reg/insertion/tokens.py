"""Where a network of tokens takes layers: attention weights, heads, blocks and their branches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from medseg_reg.insertion import doors, kinds
from medseg_reg.insertion.attention import Attention, Attentions, needs_weights
from medseg_reg.insertion.graph import Step, Value
from medseg_reg.insertion.views import MAP, ChannelsLast, Heads, View
from medseg_reg.insertion.windows import Windows


@dataclass(frozen=True)
class Keys:
    """Where something meets the keys of an attention.

    Attributes:
        path: the module.
        argument: the weights are this argument of it; None: they are its output.
        masks: the weights are never there, and the argument masks them.
        problem: why there is no such place; empty where there is one.
    """

    path: str
    argument: int | str | None = None
    masks: bool = False
    problem: str = ""


@dataclass(frozen=True)
class Claim:
    """A place of tokens, at one call of its module.

    Attributes:
        kind: the kind of place.
        value: the tensor there.
        door: where the layer is hung.
        size: what the layer sees, without the batch.
        tokens: how many a sample has.
        view: how the layer sees the tensor.
        block: the module around that a layer needs something from: for `attention` the tokens
            that come in, for the others one entry for each sample.
        masks: the layer's zeros are handed to the door's module as a mask.
        argument: in place of the door's own.
        prefix: tokens in front that are no patches.
        problem: why no layer can be put there.
        note: what is odd there.
        chain: the modules that tokens go through one after the other, the door's first.
        keys: those of the attentions inside the chain.
        windows: of these, what is known where their attention is one of windows.
    """

    kind: str
    value: Value
    door: Step
    size: tuple[int, ...]
    tokens: int
    view: View = MAP
    block: str | None = None
    masks: bool = False
    argument: int | str | None = None
    prefix: int = 0
    problem: str = ""
    note: str = ""
    chain: tuple[str, ...] = ()
    keys: tuple[Keys, ...] = ()
    windows: tuple[Windows, ...] = ()


class Tokens(Attentions):
    """Goes through the places of tokens of a recorded network."""

    def claims(self) -> Iterator[Claim]:
        """Return every place that can be named."""
        for attention in self.attentions:
            yield from self._weights(attention)
            yield from self._heads(attention)
            yield from self._blocks(attention)
        for step in self.steps:
            yield from self._residual(step)
        yield from self._sequence()

    # Kinds

    def _weights(self, attention: Attention) -> Iterator[Claim]:
        product, size = attention.product, attention.size
        more: dict[str, Any] = {
            "size": size,
            "tokens": self.tokens(product),
            "prefix": self.prefix(attention),
            "note": self.wrong_bias(attention),
        }
        if attention.weights is not None:
            index = product.inputs.index(attention.weights)
            door = doors.before(self.flow, product, index)
            if door is not None:
                inside = door.path.startswith(f"{product.path}.") and size[1] == size[2]
                block = product.path if inside and self.entrance(product) else None
                yield Claim("attention", attention.weights, door, **more, block=block)
            return
        door = self.entrance(product)
        if door is not None and door.module is not None:
            problem = self.no_mask(attention, door)
            view = Heads(size[0])
            yield Claim(
                "attention", product.outputs[0], door, **more,
                view=view, masks=True, argument="attn_mask", problem=problem,
            )  # fmt: skip

    def _heads(self, attention: Attention) -> Iterator[Claim]:
        product, (heads, queries, _) = attention.product, attention.size
        found = self.projection(attention)
        door = None if found is None else doors.before(self.flow, found, 0)
        if found is None or door is None:
            return
        value = found.inputs[0]
        windows = product.outputs[0].shape[0] // self.batch
        yield Claim(
            "attention_head",
            value,
            door,
            (heads, windows * queries, value.shape[-1] // heads),
            self.tokens(product),
            view=Heads(heads),
            block=self.block(product.path),
            note=self.wrong_bias(attention),
        )

    def _blocks(self, attention: Attention) -> Iterator[Claim]:
        """Return what the block around an attention adds to its tokens."""
        product, (_, queries, keys) = attention.product, attention.size
        block = self.block(product.path)
        entrance = None if block is None else self.entrance_of(block)
        exits = [s for s in self.graph.steps if s.kind == kinds.EXIT and s.path == block]
        if block is None or entrance is None or entrance.argument != 0 or not exits:
            return
        shape = entrance.inputs[0].shape
        if shape != exits[0].outputs[0].shape or self.flow.is_map(exits[0].outputs[0]):
            return
        problem, door = "", self.entrance(product)
        others = {one.product.path for one in self.attentions} - {product.path}
        if block in map(self.block, others):
            problem = (
                f"'{block}', the module around the attention of '{product.path}', holds other "
                "attentions too, so it is no block of its own. Use guided_key_dropout."
            )
        elif attention.weights is None:
            problem = needs_weights(product.path, None if door is None else door.module)
        elif len(shape) != 3 or shape[1] != queries or queries != keys:
            problem = (
                f"the attention of '{product.path}' sees windows or fewer keys than the block has "
                "tokens, so they get no attention of their own. Use guided_key_dropout."
            )
        else:
            door = doors.before(self.flow, product, product.inputs.index(attention.weights))
        if door is None or (not problem and door.kind != kinds.EXIT):
            return
        yield Claim(
            "block_residual",
            product.outputs[0],
            door,
            (shape[-1], *shape[1:-1]),
            self.tokens(product),
            view=ChannelsLast(),
            block=block,
            prefix=self.prefix(attention),
            problem=problem,
        )

    def _residual(self, step: Step) -> Iterator[Claim]:
        branch = self._branch(step)
        door = None
        if branch is not None:
            index = step.inputs.index(branch)
            door = doors.before(self.flow, step, index, nearest=True)
        if branch is None or door is None:
            return
        grid, channels = branch.shape[1:-1], branch.shape[-1]
        yield Claim(
            "residual",
            branch,
            door,
            (channels, *grid),
            math.prod(grid),
            view=ChannelsLast(),
            note="; ".join(filter(None, (kinds.own_drop_path(door.module), self.odd(door.path)))),
        )

    def _sequence(self) -> Iterator[Claim]:
        """Return the tokens that go into the first of the blocks around the attentions."""
        paths = [self.block(one.product.path) for one in self.attentions]
        chain = [path for path in dict.fromkeys(paths) if path]
        entrance = self.entrance_of(chain[0]) if chain else None
        if entrance is None or entrance.argument != 0:
            return
        shape = entrance.inputs[0].shape
        stages = self._stages(chain)
        if stages:
            yield from stages
            return
        yield Claim(
            "tokens",
            entrance.inputs[0],
            entrance,
            (shape[-1], *shape[1:-1]),
            self.tokens(self.attentions[0].product),
            view=ChannelsLast(),
            prefix=self.prefix(self.attentions[0]),
            problem=self._broken(chain, shape),
            chain=tuple(chain),
            keys=tuple(map(self._keys, self.attentions)),
        )

    def _keys(self, attention: Attention) -> Keys:
        """Return where the keys of an attention can be given weights."""
        claim = next(self._weights(attention), None)
        if claim is None:
            path = attention.product.path
            return Keys(path, problem=f"the weights of '{path}' are made and read in one go.")
        argument = claim.door.argument if claim.argument is None else claim.argument
        return Keys(claim.door.path, argument, claim.masks, claim.problem)

    def _stages(self, chain: list[str]) -> list[Claim]:
        """Return the tokens of each resolution of a transformer of windows; empty if it is none."""
        blocks = {path: one for path in chain if (one := self._block_of_windows(path)) is not None}
        if len(blocks) < len(chain):
            return []
        claims = []
        for _, group in itertools.groupby(chain, self._shape_of):
            paths = list(group)
            entrance = self.entrance_of(paths[0])
            if entrance is None or entrance.argument != 0:
                return []
            value, (_, height, width, channels) = entrance.inputs[0], self._shape_of(paths[0])
            known = tuple(blocks[path] for path in paths)
            sides = {one.side for one in known}
            problem = ""
            if len(sides) > 1 or height % min(sides) or width % min(sides):
                problem = (
                    f"the map of {height}x{width} patches of '{paths[0]}' is no multiple of its "
                    f"windows of {min(sides)}x{min(sides)}, so they cannot all lose the same "
                    "patches. Use images, or windows, that fit: with a window w and patches of P "
                    "pixels, multiples of P w, 2 P w, 4 P w and so on for the resolutions. Or use "
                    "drop_key."
                )
            claims.append(
                Claim(
                    "tokens",
                    value,
                    entrance,
                    (channels, height, width),
                    height * width,
                    view=ChannelsLast(),
                    problem=problem,
                    note=self.odd(paths[0]),
                    chain=tuple(paths),
                    windows=known,
                )
            )
        return claims

    def _shape_of(self, path: str) -> tuple[int, ...]:
        """Return the shape of what comes into a module."""
        entrance = self.entrance_of(path)
        return () if entrance is None else tuple(entrance.inputs[0].shape)

    def _block_of_windows(self, path: str) -> Windows | None:
        """Return what is known of a block of square windows.

        Its attention keeps the numbers of relative positions in a buffer, as in the published code
        of Swin, MONAI and timm, and it says itself by how much its windows are shifted.
        """
        shape = self._shape_of(path)
        found = [one for one in self.attentions if self.block(one.product.path) == path]
        entrances = [self.entrance(one.product) for one in found]
        if len(shape) != 4 or len(found) != 1 or entrances[0] is None:
            return None
        attention, block = entrances[0].module, self._module(path)
        mlp = self.entrance_of(f"{path}.mlp")
        side = math.isqrt(found[0].size[1])
        index = getattr(attention, "relative_position_index", None)
        shift = getattr(block, "shift_size", None)
        if mlp is None or index is None or shift is None or found[0].size[1:] != (side**2, side**2):
            return None
        shift = [shift] * 2 if isinstance(shift, int) else list(shift)
        by = [0 if n <= side else int(s) for n, s in zip(shape[1:3], shift, strict=True)]
        flat = len(mlp.inputs[0].shape) == 3
        return Windows(path, entrances[0].path, mlp.path, flat, side, (by[0], by[1]))

    def _module(self, path: str) -> nn.Module | None:
        """Return the module of a path that was entered."""
        steps = (s for s in self.graph.steps if s.kind == kinds.ENTER and s.path == path)
        return next((step.module for step in steps), None)

    def _broken(self, chain: list[str], shape: tuple[int, ...]) -> str:
        """Say why blocks could not run on a part of the tokens; empty if they can."""
        sizes = {one.size[1:] for one in self.attentions}
        if len(shape) != 3 or sizes != {(shape[1], shape[1])}:
            return (
                "its attention sees windows or fewer keys than tokens, which cannot be left out "
                "or merged one by one. Use drop_key or guided_key_dropout."
            )
        before: Value | None = None
        for path in chain:
            doors_in = [s for s in self.graph.steps if s.kind == kinds.ENTER and s.path == path]
            doors_out = [s for s in self.graph.steps if s.kind == kinds.EXIT and s.path == path]
            given = self.flow.content(doors_in[0].inputs[0])
            more = ", ".join(str(door.argument) for door in doors_in[1:])
            if more:
                return f"'{path}' gets more tensors than its tokens ({more})."
            if not doors_out:
                return f"'{path}' returns more than its tokens, as a tuple of several tensors."
            if before is not None and given is not before:
                return f"'{path}' does not get what the block before it gives."
            before = self.flow.content(doors_out[0].outputs[0])
        return ""

    def _branch(self, step: Step) -> Value | None:
        """Return the branch of an addition of tokens to what a few layers make of them."""
        inputs = [value for value in step.inputs if not value.constant]
        if step.kind != kinds.ADD or len(inputs) != 2 or self.flow.main(step) is not None:
            return None
        shape = inputs[0].shape
        if len(shape) < 3 or shape[0] != self.batch or inputs[1].shape != shape:
            return None
        common = self.flow.ancestors(inputs[0]) & self.flow.ancestors(inputs[1])
        if not common or any(map(self.flow.is_map, inputs)):
            return None
        last = common.bit_length() - 1
        work = [[s for s in self.flow.between(v, last) if not s.door] for v in inputs]
        short = min((0, 1), key=lambda i: sum(map(_works, work[i])))
        if any(map(_works, work[short])):
            return None
        reads = (s.inputs[0].shape[-1] for s in work[1 - short] if s.kind == kinds.LINEAR)
        return inputs[1 - short] if shape[-1] in reads else None


def _works(step: Step) -> bool:
    return step.kind in (kinds.CONV, kinds.LINEAR, kinds.NORM, kinds.ACT, kinds.POOL)

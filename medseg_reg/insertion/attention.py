"""Where a network of tokens takes layers: attention weights, heads, branches of residual additions.

An attention is a product of weights that come out of a softmax with values, or one call of torch's
fused function. Tokens are (B, N, C), or (B, *spatial, C) where they keep their grid; windows of
tokens are (B * windows, n, C).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import signature

from torch import nn

from medseg_reg.insertion import doors, kinds
from medseg_reg.insertion.flow import Flow
from medseg_reg.insertion.graph import Step, Value
from medseg_reg.insertion.views import MAP, ChannelsLast, Heads, View

_PASSING = {*kinds.TRANSPARENT, kinds.MUL}
_PREFIX = 16  # more tokens than this are no class, distillation or register tokens


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


@dataclass(frozen=True)
class Attention:
    """One attention.

    Attributes:
        product: the step that applies the weights to the values.
        weights: the weights (B, H, N, M); None where torch's fused function keeps them.
        fused: whether it does.
    """

    product: Step
    weights: Value | None

    @property
    def fused(self) -> bool:
        """Whether the weights are never there."""
        return self.weights is None

    @property
    def size(self) -> tuple[int, int, int]:
        """Heads, queries and keys."""
        if self.weights is not None:
            return self.weights.shape[1:]  # type: ignore[return-value]
        query, key = self.product.inputs[:2]
        return query.shape[1], query.shape[2], key.shape[2]


class Tokens:
    """Goes through the places of tokens of a recorded network."""

    def __init__(self, flow: Flow) -> None:
        self.flow, self.graph = flow, flow.graph
        self.batch = self.graph.inputs[0].shape[0]
        self.steps = [step for step in self.graph.steps if step in flow.live and not step.door]
        self.attentions = [one for step in self.steps if (one := self._attention(step))]

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
        more = {
            "size": size,
            "tokens": self._tokens(product),
            "prefix": self._prefix(attention),
            "note": self._wrong_bias(attention),
        }
        if attention.weights is not None:
            index = product.inputs.index(attention.weights)
            door = doors.before(self.flow, product, index)
            if door is not None:
                inside = door.path.startswith(f"{product.path}.") and size[1] == size[2]
                block = product.path if inside and self._entrance(product) else None
                yield Claim("attention", attention.weights, door, **more, block=block)
            return
        door = self._entrance(product)
        if door is not None and door.module is not None:
            problem = self._no_mask(attention, door)
            view = Heads(size[0])
            yield Claim(
                "attention", product.outputs[0], door, **more,
                view=view, masks=True, argument="attn_mask", problem=problem,
            )  # fmt: skip

    def _heads(self, attention: Attention) -> Iterator[Claim]:
        product, (heads, queries, _) = attention.product, attention.size
        found = self._projection(attention)
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
            self._tokens(product),
            view=Heads(heads),
            block=self._block(product.path),
        )

    def _blocks(self, attention: Attention) -> Iterator[Claim]:
        """Return what the block around an attention adds to its tokens."""
        product, (_, queries, keys) = attention.product, attention.size
        block = self._block(product.path)
        entrance = None if block is None else self._entrance_of(block)
        exits = [s for s in self.graph.steps if s.kind == kinds.EXIT and s.path == block]
        if block is None or entrance is None or entrance.argument != 0 or not exits:
            return
        shape = entrance.inputs[0].shape
        if shape != exits[0].outputs[0].shape or self.flow.is_map(exits[0].outputs[0]):
            return
        problem, door = "", self._entrance(product)
        if attention.weights is None:
            problem = needs_weights(product.path)
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
            self._tokens(product),
            view=ChannelsLast(),
            block=block,
            prefix=self._prefix(attention),
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
            note=_own_drop_path(door.module),
        )

    def _sequence(self) -> Iterator[Claim]:
        """Return the tokens that go into the first of the blocks around the attentions."""
        paths = [self._block(one.product.path) for one in self.attentions]
        chain = [path for path in dict.fromkeys(paths) if path]
        entrance = self._entrance_of(chain[0]) if chain else None
        if entrance is None or entrance.argument != 0:
            return
        shape = entrance.inputs[0].shape
        yield Claim(
            "tokens",
            entrance.inputs[0],
            entrance,
            (shape[-1], *shape[1:-1]),
            self._tokens(self.attentions[0].product),
            view=ChannelsLast(),
            prefix=self._prefix(self.attentions[0]),
            problem=self._broken(chain, shape),
            chain=tuple(chain),
        )

    def _broken(self, chain: list[str], shape: tuple[int, ...]) -> str:
        """Say why blocks could not run on a part of the tokens; empty if they can."""
        sizes = {one.size[1:] for one in self.attentions}
        if len(shape) != 3 or sizes != {(shape[1], shape[1])}:
            return (
                "its attention sees windows or fewer keys than tokens, which cannot be left out "
                "one by one. Use drop_key or guided_key_dropout."
            )
        before: Value | None = None
        for path in chain:
            doors_in = [s for s in self.graph.steps if s.kind == kinds.ENTER and s.path == path]
            doors_out = [s for s in self.graph.steps if s.kind == kinds.EXIT and s.path == path]
            given = self.flow.content(doors_in[0].inputs[0])
            more = ", ".join(str(door.argument) for door in doors_in[1:])
            if more or not doors_out:
                return f"'{path}' gets more tensors than its tokens ({more})."
            if before is not None and given is not before:
                return f"'{path}' does not get what the block before it gives."
            before = self.flow.content(doors_out[0].outputs[0])
        return ""

    # Finding

    def _attention(self, step: Step) -> Attention | None:
        """Return the attention whose values a step weights, if it does so."""
        if step.kind != kinds.LINEAR or step.module is not None or not step.outputs:
            return None
        out = step.outputs[0].shape
        if step.name == kinds.FUSED_ATTENTION:
            return Attention(step, None) if len(out) == 4 else None
        for value, other in zip(step.inputs, reversed(step.inputs), strict=True):
            shape = value.shape
            if not len(shape) == len(other.shape) == len(out) == 4 or len(step.inputs) != 2:
                return None
            fits = shape[-1] == other.shape[-2] and out == (*shape[:-1], other.shape[-1])
            if fits and not value.constant and self._softmax(value):
                return Attention(step, value)
        return None

    def _softmax(self, value: Value) -> bool:
        """Whether a value comes out of a softmax, through dropouts and the like."""
        at = self.flow.content(value).origin
        while at is not None and at.kind in (kinds.DROPOUT, kinds.IDENTITY) and at.inputs:
            at = self.flow.content(at.inputs[0]).origin
        name = "" if at is None else at.name or type(at.module).__name__
        return name.lower() in ("softmax", "softmax2d")

    def _projection(self, attention: Attention) -> Step | None:
        """Return the linear layer that reads the heads side by side, head after head."""
        rows, heads, tokens, channels = attention.product.outputs[0].shape
        wanted = (rows, tokens, heads * channels)
        waiting = [(attention.product.outputs[0], tuple(range(4)))]
        while waiting:
            value, axes = waiting.pop()
            for reader in self.flow.readers(value):
                if not reader.outputs:
                    continue
                result = reader.outputs[0]
                if reader.kind == kinds.LINEAR:
                    if isinstance(reader.module, nn.Linear) and value.shape == wanted and not axes:
                        return reader
                elif reader.kind == kinds.LAYOUT and reader.axes is not None and axes:
                    waiting.append((result, tuple(axes[i] for i in reader.axes)))
                elif result.shape == value.shape and reader.kind in _PASSING:
                    waiting.append((result, axes))
                elif axes == (0, 2, 1, 3) and result.shape == wanted:
                    waiting.append((result, ()))
        return None

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
        reads = (s.inputs[0].shape[-1] for s in work[1 - short] if isinstance(s.module, nn.Linear))
        return inputs[1 - short] if shape[-1] in reads else None

    # Facts

    def _tokens(self, product: Step) -> int:
        """Return how many tokens a sample has, without those that fill its windows up."""
        rows, heads, queries, channels = product.outputs[0].shape
        block = self._block(product.path)
        entrance = None if block is None else self._entrance_of(block)
        if entrance is None:
            return rows * queries // self.batch
        return max(1, round(math.prod(entrance.inputs[0].shape[1:]) / (heads * channels)))

    def _prefix(self, attention: Attention) -> int:
        """Return how many tokens are more than the patches that a convolution made."""
        product, (_, queries, keys) = attention.product, attention.size
        if product.outputs[0].shape[0] != self.batch or queries != keys:
            return 0
        ancestors = self.flow.ancestors(product.outputs[0])
        for step in reversed(self.graph.steps[: product.index]):
            made = ancestors >> step.index & 1 and step.kind == kinds.CONV and step.outputs
            if made and len(step.outputs[0].shape) == self.graph.rank:
                more = queries - math.prod(step.outputs[0].shape[2:])
                return more if 0 < more <= _PREFIX else 0
        return 0

    def _block(self, path: str) -> str | None:
        """Return the nearest module around that gets one entry for each sample."""
        while path:
            path = path.rpartition(".")[0]
            entrance = self._entrance_of(path)
            if entrance is not None and entrance.inputs[0].shape[:1] == (self.batch,):
                return path
        return None

    def _entrance(self, step: Step) -> Step | None:
        """Return the first door into the call of the module that a step belongs to."""
        wanted = (kinds.ENTER, step.path, step.call, 0)
        for other in reversed(self.graph.steps[: step.index]):
            if (other.kind, other.path, other.call, other.argument) == wanted:
                return other
        return None

    def _entrance_of(self, path: str) -> Step | None:
        doors_in = (s for s in self.graph.steps if s.kind == kinds.ENTER and s.path == path)
        return next((door for door in doors_in if not door.inputs[0].constant), None)

    # What is wrong

    def _no_mask(self, attention: Attention, door: Step) -> str:
        """Say why a fused attention takes no mask; empty if it does."""
        module, path = door.module, door.path
        if attention.product.rate > 0:
            return (
                f"the fused attention of '{path}' draws its dropout of {attention.product.rate:g} "
                "in evaluation too, so the network gives another result each time. Build it with "
                "dropout_rate=0, or without flash attention."
            )
        switch = next((s for s in ("fused_attn", "use_flash_attention") if hasattr(module, s)), "")
        remedy = f"set '{path}.{switch}' to False first" if switch else "build it without"
        if switch == "use_flash_attention" and "attn_mask" not in _arguments(module):
            return (
                f"'{path}' computes a fused attention wherever no gradients are, as in MC dropout, "
                f"and would leave the layer out there: {remedy}."
            )
        _, queries, keys = attention.size
        if "attn_mask" not in _arguments(module) or queries != keys or door.argument != 0:
            return (
                f"the attention of '{path}' is fused: its weights are never there, and it takes no "
                f"argument attn_mask: {remedy}."
            )
        return ""

    def _wrong_bias(self, attention: Attention) -> str:
        """Say so where a window is smaller than the table of its relative positions."""
        entrance = self._entrance(attention.product)
        index = getattr(None if entrance is None else entrance.module, "relative_position_index", 0)
        keys = attention.size[2]
        known = index.shape[-1] if hasattr(index, "shape") and index.shape else keys
        if keys >= known:
            return ""
        return (
            f"windows of {keys} tokens take the first of the relative positions for {known}, so "
            "that most pairs get the offset of another pair; train on larger images (MONAI's "
            "SwinUNETR: at least 112 pixels)"
        )


def needs_weights(path: str) -> str:
    """Say what to do where a layer needs weights that a fused attention keeps."""
    return (
        f"the attention of '{path}' is fused, so its weights are never there and the layer would "
        f"never be called. Set '{path}.fused_attn' or the like to False, or TIMM_FUSED_ATTN=0 in "
        "the environment before the network is built."
    )


def _works(step: Step) -> bool:
    return step.kind in (kinds.CONV, kinds.LINEAR, kinds.NORM, kinds.ACT, kinds.POOL)


def _arguments(module: nn.Module | None) -> set[str]:
    return set() if module is None else set(signature(module.forward).parameters)


def _own_drop_path(module: nn.Module | None) -> str:
    """Say so where a network drops this branch itself."""
    if type(module).__name__ != "DropPath" or not getattr(module, "drop_prob", 0.0):
        return ""
    return "the network drops these branches by a DropPath of its own; both rates act"

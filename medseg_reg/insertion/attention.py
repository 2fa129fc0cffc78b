"""The attentions of a recorded network, and the facts about each that its places need.

An attention is a product of weights that come out of a softmax with values, or one call of torch's
fused function. Tokens are (B, N, C), or (B, *spatial, C) where they keep their grid; windows of
tokens are (B * windows, n, C).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from inspect import signature

from torch import nn

from medseg_reg.insertion import kinds
from medseg_reg.insertion.flow import Flow
from medseg_reg.insertion.graph import Step, Value

_PASSING = {*kinds.TRANSPARENT, kinds.MUL}
_TIMM, _FLASH = "fused_attn", "use_flash_attention"  # of timm and of MONAI
_PREFIX = 16  # more tokens than this are no class, distillation or register tokens


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


class Attentions:
    """Finds the attentions of a network and says about each what a layer has to know."""

    def __init__(self, flow: Flow) -> None:
        self.flow, self.graph = flow, flow.graph
        self.batch = self.graph.inputs[0].shape[0]
        self.steps = [step for step in self.graph.steps if step in flow.live and not step.door]
        self.attentions = [one for step in self.steps if (one := self._attention(step))]

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

    def projection(self, attention: Attention) -> Step | None:
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

    # Facts

    def tokens(self, product: Step) -> int:
        """Return how many tokens a sample has, without those that fill its windows up."""
        rows, heads, queries, channels = product.outputs[0].shape
        block = self.block(product.path)
        entrance = None if block is None else self.entrance_of(block)
        if entrance is None:
            return rows * queries // self.batch
        shape, width = entrance.inputs[0].shape, heads * channels
        first, last = shape[1] == width, shape[-1] == width
        # The heads need not be as wide as the tokens: then what is known of its axes decides.
        maps = first if first != last else self.flow.is_map(entrance.inputs[0])
        return max(1, math.prod(shape[2:] if maps else shape[1:-1]))

    def prefix(self, attention: Attention) -> int:
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

    def block(self, path: str) -> str | None:
        """Return the nearest module around that gets one entry for each sample."""
        while path:
            path = path.rpartition(".")[0]
            entrance = self.entrance_of(path)
            if entrance is not None and entrance.inputs[0].shape[:1] == (self.batch,):
                return path
        return None

    def entrance(self, step: Step) -> Step | None:
        """Return the first door into the call of the module that a step belongs to."""
        wanted = (kinds.ENTER, step.path, step.call, 0)
        for other in reversed(self.graph.steps[: step.index]):
            if (other.kind, other.path, other.call, other.argument) == wanted:
                return other
        return None

    def entrance_of(self, path: str) -> Step | None:
        """Return the first door into a module through which the network's input comes."""
        doors_in = (s for s in self.graph.steps if s.kind == kinds.ENTER and s.path == path)
        return next((door for door in doors_in if not door.inputs[0].constant), None)

    # What is wrong

    def no_mask(self, attention: Attention, door: Step) -> str:
        """Say why a fused attention takes no mask; empty if it does."""
        module, path = door.module, door.path
        if attention.product.rate > 0:
            return (
                f"the fused attention of '{path}' draws its dropout of {attention.product.rate:g} "
                "in evaluation too, so the network gives another result each time. Build it with "
                "dropout_rate=0, or without flash attention."
            )
        switch = _switch(module)
        remedy = f"set '{path}.{switch}' to False first" if switch else "build it without"
        if switch == _FLASH and "attn_mask" not in _arguments(module):
            return (
                f"'{path}' computes a fused attention wherever no gradients are, as in MC dropout, "
                f"and would leave the layer out there: {remedy}."
            )
        _, queries, keys = attention.size
        why = ""
        if "attn_mask" not in _arguments(module):
            why = "it takes no argument attn_mask"
        elif queries != keys:
            why = f"it has {queries} queries for {keys} keys, where keys are no tokens to hide"
        if why:
            return (
                f"the attention of '{path}' is fused: its weights are never there, and {why}: "
                f"{remedy}."
            )
        return ""

    def odd(self, path: str) -> str:
        """Say what is odd about the attentions of the block that a module is in; empty if nothing.

        Layers beside the attention meet the same tokens.
        """
        for one in self.attentions:
            block = self.block(one.product.path)
            if block is not None and f"{path}.".startswith(f"{block}."):
                return self.wrong_bias(one)
        return ""

    def wrong_bias(self, attention: Attention) -> str:
        """Say so where a window is smaller than the table of its relative positions."""
        entrance = self.entrance(attention.product)
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


def needs_weights(path: str, module: nn.Module | None) -> str:
    """Say what to do where a layer needs weights that a fused attention keeps.

    Args:
        path: the module that computes the attention.
        module: the same; None where it is not known.
    """
    switch = _switch(module)
    remedy = "Build the network with an attention that computes its weights."
    if switch:
        remedy = f"Set '{path}.{switch}' to False first."
    if switch == _TIMM:
        remedy = (
            f"Set '{path}.{switch}' to False, or TIMM_FUSED_ATTN=0 in the environment before the "
            "network is built."
        )
    return (
        f"the attention of '{path}' is fused, so its weights are never there and the layer would "
        f"never be called. {remedy}"
    )


def _switch(module: nn.Module | None) -> str:
    """Return the attribute of a module that turns its fused attention off; empty without one."""
    return next((name for name in (_TIMM, _FLASH) if hasattr(module, name)), "")


def _arguments(module: nn.Module | None) -> set[str]:
    return set() if module is None else set(signature(module.forward).parameters)

"""What a recorded graph says about its maps: whose map is it, at which level, in which part."""

from __future__ import annotations

import math

from medseg_reg.insertion import kinds
from medseg_reg.insertion.graph import Graph, Step, Value

# More than padding or a convolution without padding changes.
_RESIZED = 1.5


class Flow:
    """Facts about the values and steps of a graph; doors are looked through.

    Attributes:
        graph: the graph.
        live: the steps that the network's output depends on.
        gated: the steps that only make attention coefficients.
        gates: the convolutions whose one channel becomes such coefficients.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.live = _live(graph)
        self._axes: dict[Value, tuple[int, ...] | None] = {}
        self._squeezed: set[Value] = set()
        self._risen: set[Value] = set()
        self._root: dict[Value, tuple[Step, bool]] = {}
        self._ancestors: dict[Value, int] = {}
        self._readers: dict[Value, list[Step]] = {}
        for step in graph.steps:
            self._follow(step)
        self.gates: list[Step] = []
        self.gated: set[Step] = set()
        for step in graph.steps:
            self._find_gate(step)
        self._close_gates()
        sizes = [math.prod(v.shape[2:]) for v in self._maps() if not self.squeezed(v)]
        self.smallest = min(sizes, default=0)

    # Values

    def content(self, value: Value) -> Value:
        """Return the value before it was handed through doors."""
        while value.origin is not None and value.origin.door:
            value = value.origin.inputs[0]
        return value

    def readers(self, value: Value) -> list[Step]:
        """Return the live steps that read a value, through doors too."""
        if value not in self._readers:
            found: dict[Step, None] = {}
            for step in value.readers:
                if step.door:
                    found.update(dict.fromkeys(self.readers(step.outputs[0])))
                elif step in self.live:
                    found[step] = None
            self._readers[value] = list(found)
        return self._readers[value]

    def returned(self, value: Value) -> bool:
        """Whether the network returns this value, through doors or not."""
        return value in self.graph.outputs or any(
            step.door and self.returned(step.outputs[0]) for step in value.readers
        )

    def is_map(self, value: Value) -> bool:
        """Whether a value is (B, C, *spatial), channels first."""
        if value.constant or len(value.shape) != self.graph.rank or 0 in value.shape:
            return False
        # A convolution that reads it is the proof, whatever was done to it before; so is a known
        # map beside which it is concatenated or to which it is added.
        return self._straight(value) or any(
            self.content(step.inputs[0]) is self.content(value)
            if step.kind == kinds.CONV
            else step.kind in (kinds.CAT, kinds.ADD) and self._straight(step.outputs[0])
            for step in self.readers(value)
        )

    def _straight(self, value: Value) -> bool:
        return self._axes.get(value) == tuple(range(self.graph.rank))

    def squeezed(self, value: Value) -> bool:
        """Whether all of it went through a global pooling."""
        return value in self._squeezed

    def risen(self, value: Value) -> bool:
        """Whether it depends on an enlarged map."""
        return value in self._risen

    def root(self, value: Value) -> Step | None:
        """Return the step whose map this still is: the last that was not transparent."""
        return self._root[value][0] if value in self._root else None

    def activated(self, value: Value) -> bool:
        """Whether an activation came after the root."""
        return self._root[value][1] if value in self._root else False

    def ancestors(self, value: Value) -> int:
        """Return the indices of all steps before a value, as bits."""
        return self._ancestors.get(value, 0)

    # Steps

    def main(self, step: Step) -> Value | None:
        """Return the input whose map a transparent step hands on; None where there is no such.

        A product with a coefficient for each channel or each pixel, and a sum with what is no
        map, are transparent; so is what joins a map with itself, as x * sigmoid(x).
        """
        inputs = [value for value in step.inputs if not value.constant]
        if step.kind in kinds.TRANSPARENT:
            return inputs[0] if inputs else None
        if step.kind not in (kinds.MUL, kinds.ADD) or not step.outputs:
            return None
        shape = step.outputs[0].shape
        whole = [v for v in inputs if v.shape == shape and not self.squeezed(v)]
        if len(whole) <= 1:
            return whole[0] if whole else (inputs[0] if len(inputs) == 1 else None)
        first = self.root(whole[0])
        if first is not None and all(self.root(value) is first for value in whole):
            return max(whole, key=self.activated)
        return None

    def passes(self, step: Step, value: Value) -> bool:
        """Whether a step hands on the map of a value that it reads."""
        main = self.main(step)
        if main is None:
            return False
        inputs = [v for v in step.inputs if self.content(v) is self.content(value)]
        return any(v is main for v in inputs) or self.root(value) is self.root(main)

    def stride(self, step: Step) -> float:
        """Return by how much a step shrinks its map; below 1 it enlarges it."""
        value = next((v for v in step.inputs if not v.constant), None)
        if value is None or not step.outputs or len(value.shape) != len(step.outputs[0].shape):
            return 1.0
        return kinds.stride_of(step.kind, step.module, (value.shape[2:], step.outputs[0].shape[2:]))

    def rises(self, step: Step) -> bool:
        """Whether a step enlarges a map that was not pooled globally."""
        inputs = [value for value in step.inputs if not value.constant]
        if not inputs or all(self.squeezed(value) for value in inputs):
            return False
        if step.kind == kinds.OTHER:  # reshaping tokens or windows is no enlargement
            resizes = all(map(self.is_map, (inputs[0], *step.outputs)))
        else:
            resizes = step.kind in (kinds.CONV, kinds.UP)
        return resizes and self.stride(step) < 1 / _RESIZED

    def shrinks(self, step: Step) -> bool:
        """Whether a step makes a map clearly smaller."""
        return self.stride(step) > _RESIZED

    def between(self, value: Value, ancestor: int) -> list[Step]:
        """Return the steps from an ancestor, excluded, to a value."""
        mask = self.ancestors(value)
        return [
            step
            for step in self.graph.steps[ancestor + 1 :]
            if mask >> step.index & 1
            and step.outputs
            and self.ancestors(step.outputs[0]) >> ancestor & 1
        ]

    def branches(self, step: Step) -> tuple[Value, Value] | None:
        """Return branch and shortcut of a residual addition; None if it is something else.

        Both come from one map without an enlargement on the way: the shortcut through at most
        one convolution, the branch through at least one step of work.
        """
        inputs = [v for v in step.inputs if not v.constant]
        if step.kind != kinds.ADD or self.main(step) is not None or len(inputs) != 2:
            return None
        common = self.ancestors(inputs[0]) & self.ancestors(inputs[1])
        if not common or not all(self.is_map(value) for value in inputs):
            return None
        last = common.bit_length() - 1
        work = []
        for value in inputs:
            steps = [s for s in self.between(value, last) if not s.door]
            if any(self.rises(s) for s in steps):
                return None
            work.append(sum(s.kind in (kinds.CONV, kinds.LINEAR) for s in steps))
        shortcut = work.index(min(work))
        if work[shortcut] > 1 or max(work) < 1:
            return None
        return inputs[1 - shortcut], inputs[shortcut]

    # Building

    def _maps(self) -> list[Value]:
        return [
            value
            for step in self.graph.steps
            if step in self.live and not step.door
            for value in step.outputs
            if self.is_map(value)
        ]

    def _follow(self, step: Step) -> None:
        """Derive the facts of a step's outputs from those of its inputs."""
        live = [value for value in step.inputs if not value.constant]
        if not live and step.kind != kinds.INPUT:
            return
        ancestors = 1 << step.index
        for value in live:
            ancestors |= self.ancestors(value)
        main = live[0] if step.door else self.main(step)
        source = [main] if main is not None else live
        for value in step.outputs:
            if value.constant:
                continue
            self._ancestors[value] = ancestors
            self._axes[value] = self._axes_after(step, live, value)
            if self._pools_all(step, live, value) or (live and all(self.squeezed(v) for v in live)):
                self._squeezed.add(value)
            if any(self.risen(v) for v in source) or self.rises(step):
                self._risen.add(value)
            if main is None:
                self._root[value] = (step, False)
            elif main in self._root:
                root, activated = self._root[main]
                activated |= step.kind in (kinds.ACT, kinds.NORM_ACT)
                self._root[value] = (root, activated)

    def _axes_after(self, step: Step, live: list[Value], value: Value) -> tuple[int, ...] | None:
        """Return where each axis of a map is now; None where that is unknown."""
        rank = len(value.shape)
        straight = tuple(range(rank))
        if step.kind in (kinds.CONV, kinds.POOL, kinds.UP, kinds.INPUT):
            return straight if rank == self.graph.rank else None
        known = [self._axes.get(v) for v in live if len(v.shape) == rank]
        axes = next((a for a in known if a is not None), None)
        if axes is None:
            return None
        if step.kind == kinds.LAYOUT:
            return tuple(axes[i] for i in step.axes) if step.axes is not None else None
        kept = step.door or step.kind in kinds.TRANSPARENT
        if kept or step.kind in (kinds.ADD, kinds.MUL, kinds.CAT, kinds.LINEAR):
            return axes
        return None

    def _pools_all(self, step: Step, live: list[Value], value: Value) -> bool:
        """Whether a step pools a whole map to one value for each channel."""
        if step.kind not in (kinds.POOL, kinds.REDUCE) or not live or not self.is_map(live[0]):
            return False
        before, after = live[0].shape, value.shape
        pixels = math.prod(before[2:])
        if pixels == 1 or math.prod(after) != before[0] * before[1]:
            return False
        adaptive = "adaptive" in f"{step.name}{type(step.module).__name__}".lower()
        # A pooling of stride 2 may well end at one pixel: that is the bottleneck.
        return step.kind == kinds.REDUCE or adaptive or max(before[2:]) > 3

    def _find_gate(self, step: Step) -> None:
        """Note a convolution of one channel whose sigmoid multiplies a larger map."""
        if step.kind != kinds.MUL or step not in self.live or self.main(step) is None:
            return
        shape = self.main(step).shape  # type: ignore[union-attr]
        if len(shape) != self.graph.rank or shape[1] == 1 or math.prod(shape[2:]) == 1:
            return
        for value in step.inputs:
            if value.constant or len(value.shape) != len(shape) or value.shape[1] != 1:
                continue
            sigmoid = False
            chain: list[Step] = []
            at = self.content(value)
            while at.origin is not None and (
                at.origin.kind in kinds.TRANSPARENT or at.origin.kind == kinds.UP
            ):
                chain.append(at.origin)
                name = f"{at.origin.name}{type(at.origin.module).__name__}".lower()
                sigmoid |= at.origin.kind == kinds.ACT and "sigmoid" in name
                at = self.content(at.origin.inputs[0])
            if sigmoid and at.origin is not None and at.origin.kind == kinds.CONV:
                self.gates.append(at.origin)
                self.gated.update([*chain, at.origin])

    def _close_gates(self) -> None:
        """Add what feeds gates alone, back to the last change of resolution."""
        for step in reversed(self.graph.steps):
            if step.door or step not in self.live or step in self.gated:
                continue
            if self.shrinks(step) or self.rises(step) or step.kind == kinds.INPUT:
                continue
            readers = [r for value in step.outputs for r in self.readers(value)]
            returned = any(self.returned(value) for value in step.outputs)
            if readers and not returned and all(r in self.gated for r in readers):
                self.gated.add(step)


def _live(graph: Graph) -> set[Step]:
    """Return the steps that the output depends on."""
    found: set[Step] = set()
    waiting = [value.origin for value in graph.outputs]
    while waiting:
        step = waiting.pop()
        if step is None or step in found:
            continue
        found.add(step)
        waiting += [value.origin for value in step.inputs]
    return found

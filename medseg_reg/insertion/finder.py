"""Which maps of a recorded network are which kind of place."""

from __future__ import annotations

from collections.abc import Iterator

from medseg_reg.insertion import doors, kinds
from medseg_reg.insertion.flow import Flow
from medseg_reg.insertion.graph import Graph, Step, Value

# Functions after the last convolution that leave logits logits, or make them probabilities.
_FINAL = {
    kinds.IDENTITY,
    kinds.DROPOUT,
    kinds.UP,
    kinds.PAD,
    kinds.CROP,
    kinds.ADD,
    kinds.CAT,
    kinds.LAYOUT,
    kinds.OTHER,
    kinds.POINTWISE,
    kinds.REDUCE,
}
_PROBABILITIES = ("sigmoid", "softmax", "tanh", "clamp")


# In this order where several are at one door.
KINDS = (
    "input",
    "between_convs",
    "after_norm",
    "residual",
    "after_block",
    "skip",
    "gate",
    "head",
)


class Finder:
    """Goes through the kinds of places: each gives maps, and the doors at which they are met alone.

    Attributes:
        heads: the last convolutions.
        residual: the residual additions, with branch and shortcut.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.flow = Flow(graph)
        self.steps = [step for step in graph.steps if step in self.flow.live and not step.door]
        self.heads = {
            step
            for step in self.steps
            if step.kind == kinds.CONV
            and self.map_in(step) is not None
            and self.final(step.outputs[0])
        }
        self.residual = {
            step: parts for step in self.steps if (parts := self.flow.branches(step)) is not None
        }

    def claims(self, kind: str) -> Iterator[tuple[Value, Step | None]]:
        """Return the maps of one kind, each with its door; None where it cannot be reached."""
        yield from getattr(self, f"_{kind}")()

    # Kinds

    def _input(self) -> Iterator[tuple[Value, Step | None]]:
        for value in self.graph.inputs:
            yield value, doors.after(self.graph, value)

    def _between_convs(self) -> Iterator[tuple[Value, Step | None]]:
        for step in self.steps:
            value = self.map_in(step)
            if step.kind != kinds.CONV or value is None or step in self.heads:
                continue
            root = self.flow.root(value)
            if root is None or root.kind != kinds.CONV or not self.flow.activated(value):
                continue
            if self.flow.rises(step) or self.only_raised(step) or root in self.flow.gated:
                continue
            # A strided convolution that a skip or pooling competes with begins the next level.
            if self.flow.shrinks(step) and self.readers(self.flow.content(value)) != [step]:
                continue
            yield value, doors.before(self.flow, step, 0)

    def _after_norm(self) -> Iterator[tuple[Value, Step | None]]:
        for step in self.steps:
            if step.kind == kinds.NORM and self.map_in(step) is not None:
                value = step.outputs[0]
                if self.leads_to_activation(value):
                    yield value, doors.after(self.graph, value)

    def _after_block(self) -> Iterator[tuple[Value, Step | None]]:
        done: set[Step] = set()
        for step in self.steps:
            for value in step.outputs[:1]:
                root = self.flow.root(value)
                if root is None or root in done or not self.ends_block(value, root):
                    continue
                done.add(root)
                yield value, doors.after(self.graph, value, leaf=False)

    def _residual(self) -> Iterator[tuple[Value, Step | None]]:
        for step, (branch, _) in self.residual.items():
            if step not in self.flow.gated:
                yield branch, doors.before(self.flow, step, step.inputs.index(branch))

    def _skip(self) -> Iterator[tuple[Value, Step | None]]:
        for step in self.steps:
            if self.merges(step) and step not in self.flow.gated:
                for index in self.skips(step):
                    yield step.inputs[index], doors.before(self.flow, step, index)

    def _gate(self) -> Iterator[tuple[Value, Step | None]]:
        for step in self.flow.gates:
            yield step.inputs[0], doors.before(self.flow, step, 0)

    def _head(self) -> Iterator[tuple[Value, Step | None]]:
        for step in self.steps:
            if step in self.heads:
                yield step.inputs[0], doors.before(self.flow, step, 0)

    # What the kinds ask

    def map_in(self, step: Step) -> Value | None:
        """Return the map that a step reads, unless it belongs to an attention branch."""
        value = step.inputs[0] if step.inputs else None
        if value is None or step in self.flow.gated or self.flow.squeezed(value):
            return None
        return value if self.flow.is_map(value) else None

    def readers(self, value: Value) -> list[Step]:
        """Return who reads a map, without the attention that then multiplies it."""
        readers = [r for r in self.flow.readers(value) if r not in self.flow.gated]
        if any(r.kind == kinds.MUL and self.flow.passes(r, value) for r in readers):
            readers = [r for r in readers if not all(map(self.flow.squeezed, r.outputs))]
        return readers

    def final(self, value: Value) -> bool:
        """Whether a value reaches the output as logits or probabilities, and goes nowhere else."""
        readers = self.flow.readers(value)
        for step in readers:
            name = f"{step.name}{type(step.module).__name__}".lower()
            end = step.kind == kinds.ACT and any(word in name for word in _PROBABILITIES)
            if not (end or step.kind in _FINAL) or not self.final(step.outputs[0]):
                return False
        return bool(readers) or self.flow.returned(value)

    def only_raised(self, step: Step) -> bool:
        """Whether a convolution is a part of an up-sampling: only that reads its bare output."""
        waiting, found = [step.outputs[0]], False
        while waiting:
            value = waiting.pop()
            for reader in self.flow.readers(value):
                if reader.kind in (kinds.IDENTITY, kinds.DROPOUT):
                    waiting.append(reader.outputs[0])
                elif reader.kind == kinds.UP:
                    found = True
                else:
                    return False
        return found

    def leads_to_activation(self, value: Value) -> bool:
        """Whether the next that is not transparent or a dropout is an activation."""
        readers = self.flow.readers(value)
        if not readers:
            return False
        return all(
            reader.kind == kinds.ACT
            or (
                reader.kind in (kinds.DROPOUT, kinds.IDENTITY)
                and self.leads_to_activation(reader.outputs[0])
            )
            or (reader.kind == kinds.MUL and self.flow.activated(reader.outputs[0]))
            for reader in readers
        )

    def ends_block(self, value: Value, root: Step) -> bool:
        """Whether a map is the end of a run of convolutions or of a residual block."""
        if not self.flow.is_map(value) or self.flow.squeezed(value) or root in self.flow.gated:
            return False
        used = self.uses(value)
        if root in self.residual:
            return self.flow.returned(value) or any(
                not self.flow.passes(r, value) or r.kind in (kinds.NORM, kinds.NORM_ACT)
                for r in used
            )
        if root.kind != kinds.CONV or root in self.heads or self.only_raised(root):
            return False
        if not self.flow.activated(value):
            before = root.inputs[0]
            start = self.flow.root(before)
            within = start is not None and start.kind == kinds.CONV and self.flow.activated(before)
            if not within or self.flow.rises(root):
                return False
        used = [r for r in used if not self.flow.passes(r, value)]
        if len(used) == 1 and used[0].kind == kinds.CONV and self.flow.shrinks(used[0]):
            return not self.flow.activated(value)  # else it is between two convolutions
        return self.flow.returned(value) or any(self.leaves(r, value) for r in used)

    def uses(self, value: Value) -> list[Step]:
        """Return who reads a map, through modules that do nothing too."""
        found = []
        for reader in self.readers(value):
            idle = reader.kind == kinds.IDENTITY and bool(reader.outputs)
            found += self.uses(reader.outputs[0]) if idle else [reader]
        return found

    def source(self, value: Value) -> Value:
        """Return the value before doors and modules that do nothing."""
        value = self.flow.content(value)
        while value.origin is not None and value.origin.kind == kinds.IDENTITY:
            value = self.flow.content(value.origin.inputs[0])
        return value

    def leaves(self, step: Step, value: Value) -> bool:
        """Whether a map that this step reads is done with at its resolution."""
        if step in self.residual:
            return self.source(self.residual[step][1]) is self.source(value)
        if step.kind != kinds.CONV:
            return True
        resized = self.flow.shrinks(step) or self.flow.rises(step)
        return resized or step in self.heads or self.only_raised(step)

    def merges(self, step: Step) -> bool:
        """Whether a step joins maps of different origin."""
        joins = step.kind in (kinds.CAT, kinds.ADD) and step not in self.residual
        return joins and self.flow.main(step) is None

    def skips(self, step: Step) -> list[int]:
        """Return which operands of a concatenation or sum came past the levels below."""
        maps = [i for i, v in enumerate(step.inputs) if self.flow.is_map(v)]

        def rank(i: int) -> tuple[bool, bool, int]:
            value = step.inputs[i]
            root = self.flow.root(value)
            raised = root is not None and self.flow.rises(root)
            return (not self.straight(value), raised, self.flow.ancestors(value).bit_count())

        if len(maps) < 2:
            return []
        below = max(maps, key=rank)
        if not self.flow.risen(step.inputs[below]):
            return []
        found = []
        for i in maps:
            common = self.flow.ancestors(step.inputs[i]) & self.flow.ancestors(step.inputs[below])
            if i == below or not common:
                continue
            start = common.bit_length() - 1
            if self.straight(step.inputs[i]) or self.parted(
                step.inputs[i], step.inputs[below], start
            ):
                found.append(i)
        return found

    def parted(self, value: Value, below: Value, start: int) -> bool:
        """Whether a map was enlarged by itself while the one from below still went down.

        So it is where an encoder of tokens has one resolution only.
        """
        if any(map(self.merges, self.flow.between(value, start))):
            return False
        return any(
            step.kind in (kinds.CONV, kinds.LINEAR) and not self.flow.risen(step.outputs[0])
            for step in self.flow.between(below, start)
        )

    def straight(self, value: Value) -> bool:
        """Whether a map, or a part of a concatenated map, depends on nothing enlarged."""
        if not self.flow.risen(value):
            return True
        root = self.flow.root(value)
        return (
            root is not None
            and root.kind == kinds.CAT
            and any(self.flow.is_map(v) and self.straight(v) for v in root.inputs)
        )

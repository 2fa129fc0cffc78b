"""The layers of a network, their outputs, weights and multiply-adds, as a table or as numbers.

Multiply-adds are those of convolutions, linear layers and attention, for one image in evaluation
mode, half of what `torch.utils.flop_counter` counts; normalizations, activations and interpolations
are not among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from medseg_reg.networks.build import parameter_count
from medseg_reg.networks.shapes import run_on_shape


@dataclass(frozen=True)
class LayerRow:
    """One layer.

    Attributes:
        path: its path in the network; empty for the network itself.
        kind: its class.
        outputs: the shape of what it returned each time it was called.
        parameters: trainable values, those of its parts included.
        multiply_adds: of one image, those of its parts included.
    """

    path: str
    kind: str
    outputs: tuple[tuple[int, ...], ...]
    parameters: int
    multiply_adds: int

    @property
    def depth(self) -> int:
        """How deep it lies in the network; 0 is the network itself."""
        return self.path.count(".") + 1 if self.path else 0


@dataclass(frozen=True)
class Summary:
    """All layers of a network.

    Attributes:
        shape: the input, (1, C, *spatial).
        rows: the layers; the first is the network itself.
    """

    shape: tuple[int, ...]
    rows: tuple[LayerRow, ...]

    def numbers(self) -> dict[str, Any]:
        """Return the numbers of the whole network, for JSON."""
        whole = self.rows[0]
        return {
            "input": list(self.shape),
            "parameters": whole.parameters,
            "multiply_adds": whole.multiply_adds,
        }

    def table(self, depth: int = 2) -> str:
        """Return a table of the layers down to a depth, and the sums; empty slots are left out."""
        cells = [("layer", "output", "parameters", "multiply-adds")]
        for row in self.rows:
            if row.depth > depth or (row.kind == "Slot" and self._is_empty(row)):
                continue
            name = row.path.rpartition(".")[2]
            name = f"{'  ' * row.depth}{name} ({row.kind})" if name else row.kind
            shown = "x".join(map(str, row.outputs[0][1:])) if row.outputs else ""
            if len(row.outputs) > 1:
                shown += f" and {len(row.outputs) - 1} more"
            cells.append((name, shown, f"{row.parameters:,}", f"{row.multiply_adds:,}"))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}"
            for a, b, c, d in cells
        ]
        size, whole = "x".join(map(str, self.shape[1:])), self.rows[0]
        lines += [
            "-" * (sum(widths) + 6),
            f"for one image of {size}: {whole.parameters:,} trainable parameters, "
            f"{whole.multiply_adds / 1e9:.3g} billion multiply-adds",
        ]
        return "\n".join(lines)

    def _is_empty(self, slot: LayerRow) -> bool:
        return not any(row.path.startswith(f"{slot.path}.") for row in self.rows)


def summarize(network: nn.Module, shape: Sequence[int]) -> Summary:
    """Run a shape without values through a network and note what every layer does.

    The network stays as it is, and takes no memory for the maps.

    Args:
        network: with or without regularizers.
        shape: of the input, (1, C, *spatial).

    >>> from medseg_reg.networks import UNet
    >>> print(summarize(UNet(2, 1, 2, channels=(4, 8)), (1, 1, 16, 16)).table(depth=1))
    layer                     output   parameters  multiply-adds
    UNet                      2x16x16       1,682        222,208
      encoder (ModuleList)                    196         46,080
      pool (MaxPool2d)        4x8x8             0              0
      bottleneck (ConvBlock)  8x8x8           896         55,296
      skip (ModuleList)                         0              0
      decoder (ModuleList)                    580        118,784
      classify (Conv2d)       2x16x16          10          2,048
    ------------------------------------------------------------
    for one image of 1x16x16: 1,682 trainable parameters, 0.000222 billion multiply-adds
    """
    met: dict[str, list[tuple[int, ...]]] = {}

    def note(path: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            met.setdefault(path, []).extend(tuple(x.shape) for x in _tensors(output))

        return hook

    modules = dict(network.named_modules())
    hooks = [module.register_forward_hook(note(path)) for path, module in modules.items()]
    counter = FlopCounterMode(display=False)
    try:
        with counter:
            run_on_shape(network, shape, values=True)
    finally:
        for hook in hooks:
            hook.remove()
    root, flops = type(network).__name__, counter.get_flop_counts()

    def multiply_adds(path: str) -> int:
        if path and path not in met:  # a container is not called itself
            children = (f"{path}.{name}" for name, _ in modules[path].named_children())
            return sum(map(multiply_adds, children))
        return sum(flops.get(f"{root}.{path}" if path else root, {}).values()) // 2

    return Summary(
        tuple(shape),
        tuple(
            LayerRow(
                path,
                type(module).__name__,
                tuple(met.get(path, ())),
                parameter_count(module),
                multiply_adds(path),
            )
            for path, module in modules.items()
        ),
    )


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    return (
        [x for part in output for x in _tensors(part)] if isinstance(output, list | tuple) else []
    )

"""Running the blocks of a Swin transformer on a part of the patches of every window.

The modules of such a block see windows (B * windows, w^2, C) in the attention, and tokens
(B, H, W, C) or (B, H W, C) in the MLP. Each gets the patches that are kept, and gives zeros for the
others, which the block's shortcut then adds to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from medseg_reg.regularizers import PatchDropout

_INDEX, _AREA = "relative_position_index", "window_area"


@dataclass(eq=False)
class WindowsEnter:
    """Gives an attention the kept patches of its windows, with their positions and masks.

    The numbers of the relative positions are a buffer of the module, (w^2, w^2); for the pass it
    is that of the kept patches alone. `WindowsLeave` puts back what was there.

    Attributes:
        layer: knows which patches are kept.
        shift: by how much the windows are shifted.
        before: what the module had, while it runs.
    """

    layer: PatchDropout
    shift: tuple[int, int]
    before: dict[str, Any] = field(default_factory=dict)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the arguments, with a part of the patches."""
        keep = self.layer.in_window(self.shift)
        if keep is None:
            return None
        index = module.get_buffer(_INDEX)
        self.before = {_INDEX: index}
        module._buffers[_INDEX] = index[keep][:, keep]
        if hasattr(module, _AREA):
            self.before[_AREA] = getattr(module, _AREA)
            setattr(module, _AREA, len(keep))
        mask = kwargs.get("mask")
        if mask is not None:
            kwargs = {**kwargs, "mask": mask[:, keep][:, :, keep]}
        return (args[0][:, keep], *args[1:]), kwargs


@dataclass(eq=False)
class WindowsLeave:
    """Puts the patches that an attention did not get back as zeros.

    Attributes:
        enter: what took them away.
    """

    enter: WindowsEnter

    def __call__(self, module: nn.Module, args: Any, output: Tensor | None) -> Any:
        """Return whole windows; without an output, where the module failed, tidy up alone."""
        before, self.enter.before = self.enter.before, {}
        if not before:
            return None
        module._buffers[_INDEX] = before[_INDEX]
        if _AREA in before:
            setattr(module, _AREA, before[_AREA])
        keep = self.enter.layer.in_window(self.enter.shift)
        if output is None or keep is None:
            return None
        whole = output.new_zeros(len(output), self.enter.layer.window**2, output.shape[-1])
        return whole.index_copy(1, keep, output)


@dataclass(eq=False)
class LinesEnter:
    """Gives an MLP the kept patches alone.

    Attributes:
        layer: knows which patches are kept.
        grid: height and width of the map.
    """

    layer: PatchDropout
    grid: tuple[int, int]

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """Return the arguments, with a part of the patches, (B, k, C)."""
        kept = self.kept()
        if kept is None:
            return None
        x = args[0]
        return (x.reshape(len(x), -1, x.shape[-1])[:, kept], *args[1:])

    def kept(self) -> Tensor | None:
        """Return the numbers of the kept patches of the map."""
        layer = self.layer
        if layer.rows is None or layer.columns is None:
            return None
        lines = [
            (torch.arange(0, size, layer.window, device=one.device)[:, None] + one).flatten()
            for size, one in zip(self.grid, (layer.rows, layer.columns), strict=True)
        ]
        return (lines[0][:, None] * self.grid[1] + lines[1]).flatten()


@dataclass(eq=False)
class LinesLeave:
    """Puts the patches that an MLP did not get back as zeros.

    Attributes:
        enter: what took them away.
        flat: whether the MLP gets its tokens as (B, H W, C).
    """

    enter: LinesEnter
    flat: bool

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Any:
        """Return all patches."""
        kept = self.enter.kept()
        if kept is None:
            return None
        whole = output.new_zeros(len(output), math.prod(self.enter.grid), output.shape[-1])
        whole = whole.index_copy(1, kept, output)
        return whole if self.flat else torch.unflatten(whole, 1, self.enter.grid)


@dataclass(eq=False)
class MaskAgain:
    """Puts the mask token for the patches that a block did not get.

    Attributes:
        layer: the layer.
    """

    layer: PatchDropout

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Any:
        """Return the map of a block, (B, H, W, C)."""
        if self.layer.rows is None:
            return None
        return self.layer.masked(output.movedim(-1, 1)).movedim(1, -1)


@dataclass(frozen=True)
class Windows:
    """What is known of a block of windows.

    Attributes:
        block: its path.
        attention: the path of its attention.
        mlp: the path of its MLP.
        flat: whether the MLP gets its tokens as (B, H W, C).
        side: of its windows.
        shift: by how much they are shifted.
    """

    block: str
    attention: str
    mlp: str
    flat: bool
    side: int
    shift: tuple[int, int]


def hang_windows(
    model: nn.Module, layer: PatchDropout, found: Windows, grid: tuple[int, int]
) -> list[RemovableHandle]:
    """Let a block run on the patches that a layer keeps."""
    block = model.get_submodule(found.block)
    attention, mlp = model.get_submodule(found.attention), model.get_submodule(found.mlp)
    windows, lines = WindowsEnter(layer, found.shift), LinesEnter(layer, grid)
    return [
        attention.register_forward_pre_hook(windows, with_kwargs=True),
        attention.register_forward_hook(WindowsLeave(windows), always_call=True),
        mlp.register_forward_pre_hook(lines),
        mlp.register_forward_hook(LinesLeave(lines, found.flat)),
        block.register_forward_hook(MaskAgain(layer)),
    ]

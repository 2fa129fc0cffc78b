"""The network as a program of `torch.export`, and as a .pt2 file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from medseg_reg.inference.export.plan import Plan, images

METADATA = "metadata.json"


def program_of(network: nn.Module, plan: Plan) -> ExportedProgram:
    """Return a network as a program that takes any batch, and any size where the plan says so.

    Raises:
        Exception: what torch says if the network cannot be exported so.
    """
    free = {0: Dim.DYNAMIC}
    if plan.dynamic:
        # With a bound the program says it by itself: "Guard failed: x.size()[2] >= 17".
        size = Dim.DYNAMIC if plan.smallest == 1 else Dim.DYNAMIC(min=plan.smallest)
        free |= {2: size, 3: size}
    with torch.no_grad():
        return torch.export.export(network, (images(plan.example, 0),), dynamic_shapes=(free,))


def write_pt2(program: ExportedProgram, path: Path, metadata: str) -> None:
    """Write a program with its metadata into one file."""
    torch.export.save(program, path, extra_files={METADATA: metadata})


def open_pt2(path: Path) -> Callable[[Tensor], Tensor]:
    """Return the program of a file as a function."""
    module = torch.export.load(path).module()
    return lambda x: module(x)

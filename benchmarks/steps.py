"""A training step of a U-Net with one regularizer in its places, beside a step without.

    python -m benchmarks.steps                                     # every registered method
    python -m benchmarks.steps heuristic_dropout --rounds 40
    python -m benchmarks.steps heuristic_dropout --width 64 --size 512 --batch 1 --rounds 10
    python -m benchmarks.steps --formats --norm instance           # number formats, memory orders
    python -m benchmarks.steps --compile                           # and compiled by torch

A method stands where it stands in a configuration that names no places. For most that is between
the two convolutions of each pair, of which a U-Net of five levels has nine; for others it is the
input or the bottleneck. Precision and memory format are those that a training chooses, and freed
memory is kept as in a training. Each method takes turns with a network that has none, so that other
work on the machine disturbs both; the ratio is that of these medians.

--formats and --compile measure the network without a method instead: in float32 and bfloat16,
contiguous and channels-last; as it is and compiled, with the time of the first step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from benchmarks.ratios import Row, markdown, rows_of, spread
from medseg_reg.config import parse_config
from medseg_reg.engine.compiling import compiled_pass, told_in_a_line
from medseg_reg.engine.host import keep_freed_memory
from medseg_reg.engine.memory_format import choose_memory_format
from medseg_reg.engine.network import build_run_network
from medseg_reg.engine.precision import choose_precision
from medseg_reg.errors import MedsegError
from medseg_reg.regularizers import regularizer_names
from medseg_reg.regularizers.protocols import LabelReader, StepTaker
from medseg_reg.summary import assumed_facts

BASE = "without"


class Step:
    """One training step, to be called again and again.

    Args:
        options: size, batch, width, levels, norm and device.
        layer: the entry of a layer in a configuration, or None.
        order: the memory format.
        precision: the number format.
        compiled: whether torch compiles the network.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        layer: dict[str, Any] | None = None,
        order: str = "auto",
        precision: str = "auto",
        compiled: bool = False,
    ) -> None:
        torch.manual_seed(0)
        content = {
            "name": "step",
            "data": {
                "store": "none",
                "image": {"size": [options.size, options.size]},
                "split": {"kind": "fractions"},
            },
            "network": {
                "channels": [options.width * 2**level for level in range(options.levels)],
                "norm": options.norm,
            },
            "regularization": {"architecture": [] if layer is None else [layer]},
        }
        network, placed = build_run_network(parse_config(content, "step"), assumed_facts(1, 2))
        self.places = sum(len(entry.placements) for entry in placed)
        layout = choose_memory_format(order, network, options.device)
        self.network = network.to(options.device).to(memory_format=layout).train()
        self.forward = compiled_pass(network) if compiled else network
        self.optimizer = torch.optim.Adam(network.parameters(), 1e-3, fused=True)
        shape = (options.batch, options.size, options.size)
        self.image = torch.rand(shape, device=options.device)[:, None]
        self.image = self.image.contiguous(memory_format=layout)
        self.mask = torch.randint(0, 2, shape, device=options.device)
        self.device = options.device
        self.mixed = choose_precision(precision, options.device) == "bf16-mixed"

    def __call__(self) -> float:
        """Return the seconds of a step."""
        start = time.perf_counter()
        for module in self.network.modules():
            if isinstance(module, LabelReader):
                module.labels = self.mask
            if isinstance(module, StepTaker):
                module.taking_part = True
        with torch.autocast(self.device, torch.bfloat16, enabled=self.mixed):
            logits = self.forward(self.image)
        self.optimizer.zero_grad()
        functional.cross_entropy(logits.float(), self.mask).backward()
        self.optimizer.step()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def step_with(options: argparse.Namespace, name: str) -> Step:
    """Return a step with a method in its default places, or between the convolutions.

    Raises:
        MedsegError, ValueError: it has no place in this network.
    """
    try:
        return Step(options, {"name": name})
    except (MedsegError, ValueError):  # such as residual branches, of which there are none here
        return Step(options, {"name": name, "places": "between_convs"})


def titled(options: argparse.Namespace) -> str:
    """Return what stands in the first column."""
    norm = "" if options.norm == "batch" else f", {options.norm} norm"
    return f"step, batch {options.batch} of {options.size}{norm}"


def measure_formats(options: argparse.Namespace) -> list[Row]:
    """Return a row for each number format and memory order, over float32 and contiguous."""
    keep_freed_memory()
    steps = {
        f"{precision}, {order}": Step(options, None, order, precision)
        for precision in ("32", "bf16")
        for order in ("contiguous", "channels_last")
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(options.rounds + 2):
        for name, step in steps.items():
            took = step()
            if number > 1:  # the first ones choose kernels and ask for memory
                times[name].append(took)
    return rows_of(titled(options), times, "32, contiguous")


def measure_compiling(options: argparse.Namespace) -> list[Row]:
    """Return a row for the compiled step, and one for its first call."""
    keep_freed_memory()
    layer = {"name": options.names[0]} if options.names else None
    plain, compiled = Step(options, layer), Step(options, layer, compiled=True)
    with told_in_a_line():
        first = compiled()
    pairs = [(plain(), compiled()) for _ in range(options.rounds + 2)][2:]
    times = {"plain": [pair[0] for pair in pairs], "compiled": [pair[1] for pair in pairs]}
    ratio = first / statistics.median(times["plain"])
    rows = rows_of(titled(options), times, "plain")
    return [*rows, Row(titled(options), "compiled, the first", "plain", ratio, first)]


def measure_steps(options: argparse.Namespace, names: Sequence[str]) -> list[Row]:
    """Return a row for each method, and one for the step without."""
    keep_freed_memory()
    base, bare, rows, title = Step(options), [], [], titled(options)
    for name in names:
        try:
            step = step_with(options, name)
            step()
        except (MedsegError, ValueError, RuntimeError) as error:
            print(f"{name}: not measured ({str(error).splitlines()[0][:120]})")
            continue
        step(), base()  # the first ones choose kernels and ask for memory
        pairs = [(base(), step()) for _ in range(options.rounds)]
        without, with_it = ([pair[side] for pair in pairs] for side in (0, 1))
        bare += without
        took = statistics.median(with_it)
        places = f"{name} at {step.places} place" + "s" * (step.places != 1)
        ratio = took / statistics.median(without)
        rows.append(Row(title, places, BASE, ratio, took, spread(with_it)))
        del step  # its weights and moments, before the next one's
    if not bare:
        return rows
    return [Row(title, BASE, BASE, 1.0, statistics.median(bare), spread(bare)), *rows]


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    made.add_argument("names", nargs="*", help="registered names (default: all)")
    made.add_argument("--size", type=int, default=128, help="rows and columns")
    made.add_argument("--batch", type=int, default=4)
    made.add_argument("--width", type=int, default=16, help="feature maps of the first level")
    made.add_argument("--levels", type=int, default=5, help="levels of the U-Net")
    made.add_argument("--norm", choices=("batch", "instance"), default="batch")
    made.add_argument("--rounds", type=int, default=11)
    made.add_argument("--formats", action="store_true", help="number formats and memory orders")
    made.add_argument("--compile", action="store_true", help="a compiled step beside a plain one")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return made


def rows(options: argparse.Namespace) -> list[Row]:
    """Return the rows of this part for `python -m benchmarks`."""
    words = ["--device", options.device]
    if options.full:
        words += ["--size", "512", "--batch", "8", "--width", "64", "--rounds", "21"]
    chosen = parser().parse_args(words)
    return [*measure_formats(chosen), *measure_steps(chosen, regularizer_names())]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    options = parser().parse_args(arguments)
    if options.formats:
        found = measure_formats(options)
    elif options.compile:
        found = measure_compiling(options)
    else:
        found = measure_steps(options, options.names or regularizer_names())
    print(markdown(found))


if __name__ == "__main__":
    main()

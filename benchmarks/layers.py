"""What each regularizer costs, forward and backward, beside nn.Dropout2d and a convolution.

    python -m benchmarks.layers                                  # every registered method
    python -m benchmarks.layers heuristic_dropout drop_block --shape 2x64x256x256 2x256x64x64

For every map, the layers take turns in rounds: nn.Dropout2d, a 3x3 convolution with batch
normalization and ReLU, a copy of the map, then the methods with their defaults. The table gives the
median time of a method over that of nn.Dropout2d, and over that of the convolution; then the peak
of the memory that one pass allocates, output and gradient included, in maps. Maps are rectified
noise, each channel scaled and shifted as by a batch normalization before a ReLU; --signed leaves
the ReLU out, --alike the scales and shifts, --channels-last changes the layout. Where numba is
installed, its loops are used; with MEDSEG_REG_NUMBA=0 in the environment they are not. With
``python -m benchmarks.layers`` a checkout measures itself, whatever is installed.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.ratios import Row, rows_of
from medseg_reg.regularizers import build, regularizer_names
from medseg_reg.regularizers.kernels import loops

SHAPES = ("2x16x128x128", "2x64x64x64", "2x256x16x16")
BESIDE = ("nn.Dropout2d", "conv + norm + relu", "copy")


def shape(text: str) -> tuple[int, ...]:
    """Read a shape such as 2x64x32x32."""
    sizes = tuple(int(size) for size in text.split("x"))
    if len(sizes) not in (3, 4, 5):
        raise argparse.ArgumentTypeError(f"{text!r} is no BxCxHxW")
    return sizes


def feature_map(sizes: tuple[int, ...], options: argparse.Namespace) -> Tensor:
    """Return noise of channels that differ, rectified unless it is to be signed."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sizes, generator=generator)
    if not options.alike:
        each = (sizes[1], *[1] * (len(sizes) - 2))
        scale = torch.rand(each, generator=generator)
        x = scale * x + 0.3 * torch.randn(each, generator=generator)
    if not options.signed:
        x = x.relu()
    x = x.to(options.device, getattr(torch, options.dtype))
    if options.channels_last:
        x = x.to(memory_format=torch.channels_last)
    return x.requires_grad_()


def tasks(names: list[str], x: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return what is timed, by name; every layer in training mode."""
    conv = nn.Sequential(
        nn.Conv2d(x.shape[1], x.shape[1], 3, padding=1), nn.BatchNorm2d(x.shape[1])
    )
    layers: dict[str, Callable[[Tensor], Tensor]] = {
        "nn.Dropout2d": nn.Dropout2d(0.1),
        "conv + norm + relu": nn.Sequential(conv, nn.ReLU()).to(x.device, x.dtype),
        "copy": torch.clone,
    }
    for name in names:
        layers[name] = build(name).to(x.device).train()
    return layers


def seconds(task: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor, repeats: int) -> float:
    """Return the time of one forward and backward pass, the mean over some repeats."""
    start = time.perf_counter()
    for _ in range(repeats):
        x.grad = None
        task(x).backward(grad)
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def peak_memory(task: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> float:
    """Return the most memory that one forward and backward pass holds, in sizes of the map."""
    x.grad = None
    size = x.numel() * x.element_size()
    if x.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        task(x).backward(grad)
        return (torch.cuda.max_memory_allocated() - before) / size
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        task(x).backward(grad)
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return float(max(itertools.accumulate(changes))) / size


def measure(
    sizes: tuple[int, ...], options: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return the times of all rounds, the layers in turns, and the peak memory of each."""
    x = feature_map(sizes, options)
    grad = torch.randn_like(x)
    timed = tasks(options.names, x)
    times: dict[str, list[float]] = {name: [] for name in timed}
    repeats: dict[str, int] = {}
    for name, task in timed.items():  # warms up, and chooses how many passes make 20 ms
        seconds(task, x, grad, 1)
        repeats[name] = max(1, min(50, round(0.02 / seconds(task, x, grad, 1))))
    for _ in range(options.rounds):
        for name, task in timed.items():
            times[name].append(seconds(task, x, grad, repeats[name]))
    return times, {name: peak_memory(task, x, grad) for name, task in timed.items()}


def report(text: str, times: dict[str, list[float]], memory: dict[str, float]) -> None:
    """Print ratios of medians, and the spread of each."""
    middle = {name: statistics.median(values) for name, values in times.items()}
    dropout, conv = middle[BESIDE[0]], middle[BESIDE[1]]
    print(f"\n{text}: nn.Dropout2d {1e3 * dropout:.2f} ms, convolution {1e3 * conv:.2f} ms")
    print(f"{'layer':28} {'/ Dropout2d':>12} {'/ convolution':>14} {'spread':>8} {'memory':>7}")
    for name, value in sorted(middle.items(), key=lambda pair: pair[1]):
        spread = (max(times[name]) - min(times[name])) / value
        ratios = f"{value / dropout:12.2f} {value / conv:14.3f}"
        print(f"{name:28} {ratios} {spread:8.0%} {memory[name]:7.2f}")


def rows(options: argparse.Namespace) -> list[Row]:
    """Return the rows of this part for `python -m benchmarks`."""
    shapes = ("8x64x512x512", "8x256x128x128") if options.full else ("2x16x128x128", "2x64x64x64")
    wanted = argparse.Namespace(
        names=list(regularizer_names()),
        signed=False,
        dtype="bfloat16" if options.device == "cuda" else "float32",
        device=options.device,
        alike=False,
        channels_last=False,
        rounds=7 if options.full else 4,
    )
    found = []
    for text in shapes:
        times, memory = measure(shape(text), wanted)
        found += rows_of(f"layer, {text}", times, BESIDE[0])
        found += rows_of(f"layer, {text}", times, BESIDE[1])
        found += [Row(f"memory, {text}", name, "map", size) for name, size in memory.items()]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a table for each map."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help="registered names (default: all)")
    parser.add_argument("--shape", nargs="+", default=SHAPES, metavar="BxCxHxW")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument("--signed", action="store_true", help="maps that were not rectified")
    parser.add_argument("--alike", action="store_true", help="no scales and shifts of channels")
    parser.add_argument("--channels-last", action="store_true", help="the memory format of maps")
    options = parser.parse_args(arguments)
    options.names = options.names or list(regularizer_names())
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rules = "numba's loops" if loops.installed() else "torch's operators alone"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.dtype}, {rules}")
    for text in options.shape:
        report(text, *measure(shape(text), options))


if __name__ == "__main__":
    main()

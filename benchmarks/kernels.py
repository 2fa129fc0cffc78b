"""What the Triton kernels of Heuristic Dropout cost on a GPU, beside the plain rules and a copy.

    python -m benchmarks.kernels
    python -m benchmarks.kernels --shape 8x64x512x512 --dtype float32 --rounds 9

For every map, in both memory formats: first, that both select the same channels and give the same
result; then, in rounds, the scores by the kernel, by the plain rule and by the plain rule under
torch.compile; the filtered planes of a tenth of the channels likewise; the whole layer, forward
and backward, with kernels and without; and a copy of the map, which is what one pass costs. The
table gives the median time over that of the copy. Without a GPU there is nothing to measure.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.layers import feature_map, shape
from benchmarks.ratios import Row, markdown, rows_of
from medseg_reg.errors import MedsegError, run_main
from medseg_reg.regularizers import HeuristicDropout
from medseg_reg.regularizers.kernels import histogram, operators, planes

LEVELS = histogram.level_thresholds(10, False)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Let every map take the plain rules."""
    real = operators.fits
    operators.fits = lambda x, levels=0: False
    try:
        yield
    finally:
        operators.fits = real


def plain(task: Callable[[], object]) -> Callable[[], object]:
    """Return a task that runs by the plain rules."""

    def run() -> object:
        with without_kernels():
            return task()

    return run


def require_agreement(x: Tensor) -> None:
    """Refuse to measure kernels that are not used, or that give something else.

    Raises:
        RuntimeError: says which.
    """
    for name in ("sum_levels", "filter_planes"):
        if not (operators.fits(x, len(LEVELS)) and operators._sound(name, x.device)):
            raise RuntimeError(f"the kernel {name} is not used for {x.dtype} on {x.device}")
    layer, image = HeuristicDropout(0.25), x.detach()
    torch.manual_seed(0)
    found = layer(image)
    torch.manual_seed(0)
    with without_kernels():
        expected = layer(image)
    changed = [(y != image).flatten(2).any(-1) for y in (found, expected)]
    if not torch.equal(*changed):
        raise RuntimeError("the kernels select other channels than the plain rule")
    torch.testing.assert_close(found, expected)


def tasks(x: Tensor) -> dict[str, Callable[[], object]]:
    """Return what is timed, by name."""
    detached, layer = x.detach(), HeuristicDropout(0.1)
    grad = torch.randn_like(detached)
    count = max(1, x.shape[1] // 10)
    index = torch.rand(x.shape[:2], device=x.device).topk(count).indices
    chosen = torch.ones_like(index, dtype=torch.bool)
    sums = torch.compile(lambda x: histogram.plain_sums(x.float(), LEVELS), dynamic=False)

    def both_passes() -> None:
        x.grad = None
        layer(x).backward(grad)

    return {
        "copy": detached.clone,
        "scores, kernel": lambda: operators.sum_levels(detached, LEVELS),
        "scores, plain": lambda: histogram.plain_sums(detached.float(), LEVELS),
        "scores, plain, compiled": lambda: sums(detached),
        "planes, kernel": lambda: operators.filter_planes(detached, index, chosen, False),
        "planes, plain": lambda: planes.plain_filter(detached, index, chosen, False),
        "layer, kernels": both_passes,
        "layer, plain": plain(both_passes),
    }


def measure(
    sizes: tuple[int, ...], dtype: str, channels_last: bool, rounds: int, repeats: int = 20
) -> dict[str, list[float]]:
    """Return the seconds of each task in each round, the tasks in turns."""
    options = argparse.Namespace(
        alike=False, signed=False, device="cuda", dtype=dtype, channels_last=channels_last
    )
    x = feature_map(sizes, options)
    require_agreement(x)
    timed = tasks(x)
    times: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(rounds + 1):
        for name, task in timed.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                task()
            torch.cuda.synchronize()
            if number:  # the first compiles
                times[name].append((time.perf_counter() - start) / repeats)
    return times


def table(shapes: Sequence[str], dtype: str, rounds: int) -> list[Row]:
    """Return the rows of all maps in both memory formats."""
    found = []
    for text in shapes:
        for last in (False, True):
            part = f"kernels, {text} {dtype}{', channels-last' if last else ''}"
            found += rows_of(part, measure(shape(text), dtype, last, rounds), "copy")
    return found


def rows(options: argparse.Namespace) -> list[Row]:
    """Return the rows of this part for `python -m benchmarks`."""
    if options.device != "cuda":
        print("Triton kernels: not measured (they run on a GPU)")
        return []
    large = ("8x64x512x512", "8x256x128x128", "8x1024x32x32")
    shapes = large if options.full else ("2x64x128x128",)
    kinds = ("bfloat16", "float32") if options.full else ("bfloat16",)
    return [row for dtype in kinds for row in table(shapes, dtype, 7 if options.full else 4)]


def main(arguments: Sequence[str]) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--shape", nargs="+", default=["8x64x256x256", "8x256x64x64"], metavar="BxCxHxW"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise MedsegError("the Triton kernels run on a GPU, and torch sees none here.")
    print(markdown(table(options.shape, options.dtype, options.rounds)))


if __name__ == "__main__":
    run_main(main)

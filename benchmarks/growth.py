"""How costs grow: layers with batch, channels and size, loading with cases and workers.

    python -m benchmarks.growth
    python -m benchmarks.growth heuristic_dropout drop_block --rounds 15

For layers, the time of a map that is twice as large in one way over that of the map itself: 2 is
linear for batch and channels, 4 for rows and columns together. For loading, the time of a slice
from a store of four times the cases (1: it does not matter), and the time of an epoch's slice with
one and two worker processes over that in the training process (below 1: workers help).
"""

from __future__ import annotations

import argparse
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from benchmarks import layers
from benchmarks.ratios import Row, markdown, rows_of
from data_prep.phantom import make_demo
from medseg_reg.data.module import SliceDataModule
from medseg_reg.data.preprocessing import ImageSpec
from medseg_reg.data.sampling import SamplingSpec
from medseg_reg.data.splits import SplitSpec, make_splits
from medseg_reg.data.store import SliceStore
from medseg_reg.networks import UNet

METHODS = ("heuristic_dropout", "corrdrop_spatial", "drop_block")
START = (2, 32, 64, 64)
LARGER = {
    "batch x 2": (4, 32, 64, 64),
    "channels x 2": (2, 64, 64, 64),
    "rows and columns x 2": (2, 32, 128, 128),
}


def layer_growth(options: argparse.Namespace, names: Sequence[str]) -> list[Row]:
    """Return the time of each layer on larger maps over that on the first one."""
    words = argparse.Namespace(
        names=list(names),
        signed=False,
        dtype="float32",
        device=options.device,
        alike=False,
        channels_last=False,
        rounds=options.rounds,
    )
    shapes = {"map": START, **LARGER}
    times = {title: layers.measure(sizes, words)[0] for title, sizes in shapes.items()}
    found = []
    for name in (*layers.BESIDE[:2], *names):
        of_sizes = {title: times[title][name] for title in shapes}
        found += rows_of(f"growth of {name}", of_sizes, "map")
    return found


def loaded(store: Path, workers: int, slices: int) -> float:
    """Return the seconds of a training slice, over an epoch, once the workers run."""
    opened = SliceStore(store)
    data = SliceDataModule(
        opened,
        make_splits(opened, SplitSpec.model_validate({"kind": "fractions"})),
        image=ImageSpec(window=(-100.0, 240.0)),
        sampling=SamplingSpec(per_epoch=slices),
        augmentation=[("Affine", {"rotate": (-10, 10), "scale": (0.9, 1.1), "p": 1.0})],
        batch_size=8,
        workers=workers,
        seed=0,
    )
    batches = iter(data.train_dataloader())
    next(batches)  # a worker imports and opens files
    start, seen = time.perf_counter(), 0
    for batch in batches:
        seen += len(batch["mask"])
    return (time.perf_counter() - start) / seen


def loading_growth(options: argparse.Namespace) -> list[Row]:
    """Return the time of a loaded slice with more cases and with workers."""
    cases: dict[int, list[float]] = {8: [], 32: []}
    workers: dict[int, list[float]] = {0: [], 1: [], 2: []}
    with tempfile.TemporaryDirectory() as name:
        stores = {number: Path(name) / str(number) / "store" for number in cases}
        for number, store in stores.items():
            make_demo(store, cases=number, size=128, slices=8, tell=lambda _: None)
        for _ in range(min(5, options.rounds)):
            for number, times in cases.items():
                times.append(loaded(stores[number], 0, options.slices))
            for number, times in workers.items():
                times.append(loaded(stores[8], number, options.slices))
    of_cases = {f"cases: {number}": times for number, times in cases.items()}
    of_workers = {f"workers: {number}": times for number, times in workers.items()}
    return [
        *rows_of("growth of loading", of_cases, "cases: 8"),
        *rows_of("growth of loading", of_workers, "workers: 0"),
    ]


def train_a_rank(rank: int, ranks: int, port: int, steps: int, out: Path) -> None:
    """Train a small U-Net in one of several processes; the first writes its time a slice."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", address, world_size=ranks, rank=rank)
    batch = 4
    network = DistributedDataParallel(UNet(2, 1, 2, channels=(16, 32, 64, 128)))
    optimizer = torch.optim.AdamW(network.parameters())
    image, labels = torch.rand(batch, 1, 128, 128), torch.randint(2, (batch, 128, 128))
    start = 0.0
    for number in range(steps + 2):
        if number == 2:  # the first steps allocate memory and divide the gradients into buckets
            torch.distributed.barrier()
            start = time.perf_counter()
        functional.cross_entropy(network(image), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.distributed.barrier()
    if rank == 0:
        out.write_text(str((time.perf_counter() - start) / (steps * batch * ranks)))
    torch.distributed.destroy_process_group()


def rank_growth(options: argparse.Namespace) -> list[Row]:
    """Return the time of a training slice with two processes."""
    times: dict[str, list[float]] = {f"processes: {ranks}": [] for ranks in (1, 2)}
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "seconds"
        for _ in range(min(3, options.rounds)):
            for ranks, found in zip((1, 2), times.values(), strict=True):
                with socket.socket() as free:
                    free.bind(("127.0.0.1", 0))
                    port = free.getsockname()[1]
                torch.multiprocessing.spawn(  # type: ignore[attr-defined, no-untyped-call]
                    train_a_rank, (ranks, port, options.steps, out), nprocs=ranks
                )
                found.append(float(out.read_text()))
    return rows_of("growth of training", times, "processes: 1")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    made.add_argument("names", nargs="*", help=f"registered names (default: {', '.join(METHODS)})")
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--slices", type=int, default=800, help="slices of an epoch")
    made.add_argument("--steps", type=int, default=10, help="training steps of each process")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return made


def rows(options: argparse.Namespace) -> list[Row]:
    """Return the rows of this part for `python -m benchmarks`."""
    words = ["--device", options.device, *(["--rounds", "21"] if options.full else [])]
    chosen = parser().parse_args(words)
    return [*layer_growth(chosen, METHODS), *loading_growth(chosen), *rank_growth(chosen)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    options = parser().parse_args(arguments)
    found = layer_growth(options, options.names or METHODS)
    print(markdown([*found, *loading_growth(options), *rank_growth(options)]))


if __name__ == "__main__":
    main()

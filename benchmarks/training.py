"""The training of the toolkit beside plain scripts of MONAI and segmentation-models-pytorch.

    python -m benchmarks.training                               # small: minutes on two cores
    python -m benchmarks.training --size 512 --batch 8 --width 64 --device cuda --rounds 5

Each pair trains the same network with the same data, batch, optimizer, loss and augmentation: the
plain script as its tutorials write it (float32, contiguous), the same with the precision and
memory format that the toolkit chooses, the toolkit with its defaults, and the toolkit held to the
plain script's choices. Every training has its own process, because the allocator is the process's;
they take turns in rounds. The first steps are left out; the time of a step includes its data. The
plain scripts hold all slices in memory; the toolkit reads them from its store.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.ratios import Row, rows_of, spread
from medseg_reg.errors import MedsegError, run_main

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 5
WINDOW = (-100, 240)
WAYS = ("plain", "plain, our precision and format", "toolkit", "toolkit, plain's settings")
PAIRS = ("monai", "smp")


def network_of(pair: str, width: int) -> dict[str, Any]:
    """Return the network of a pair, as written in a configuration."""
    if pair == "smp":
        return {"name": "smp.Unet", "encoder_name": "resnet18", "encoder_weights": None}
    features = [width, width, 2 * width, 4 * width, 8 * width, width]
    return {"name": "monai.BasicUNet", "features": features}


def configuration(options: argparse.Namespace, store: Path, run: Path, plain: bool) -> Any:
    """Return the configuration of one epoch of the toolkit."""
    from medseg_reg.config import parse_config

    accelerator = "gpu" if options.device == "cuda" else options.device
    training = {"epochs": 1, "progress": False, "accelerator": accelerator}
    if plain:
        training |= {"precision": "32", "memory_format": "contiguous", "keep_memory": False}
    return parse_config(
        {
            "name": "benchmark",
            "run": str(run),
            "data": {
                "store": str(store),
                "image": {"window": list(WINDOW)},
                "split": {"kind": "counts", "train": 2, "val": 1, "test": 1},
                "sampling": {"per_epoch": options.steps * options.batch},
                "batch_size": options.batch,
                "workers": options.workers,
            },
            "network": network_of(options.pair, options.width),
            "regularization": {
                "data": [{"name": "Affine", "rotate": [-10, 10], "scale": [0.9, 1.1], "p": 0.5}],
                "error": {"ce": 1.0, "dice": 1.0},
            },
            "training": training,
        },
        "benchmark",
    )


def synchronized() -> float:
    """Return the time when all that was asked of the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def toolkit(options: argparse.Namespace, store: Path, plain: bool) -> list[float]:
    """Train by the toolkit and return the times at which its steps ended."""
    from lightning.pytorch.callbacks import Callback

    from medseg_reg.data.splits import make_splits
    from medseg_reg.data.store import SliceStore
    from medseg_reg.engine.beginning import data_module
    from medseg_reg.engine.fit import make_trainer
    from medseg_reg.engine.host import keep_freed_memory
    from medseg_reg.engine.module import SegmentationModule
    from medseg_reg.engine.network import build_run_network
    from medseg_reg.engine.regularization import RegularizationControl
    from medseg_reg.engine.run_directory import DataFacts, RunDirectory
    from medseg_reg.losses import MixedLoss

    class Clock(Callback):
        """Notes when each step ends."""

        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_train_batch_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(synchronized())

    run = RunDirectory(store.parent / "run")
    config = configuration(options, store, run.path, plain)
    if config.training.keep_memory:
        keep_freed_memory()
    slices = SliceStore(store)
    splits = make_splits(slices, config.data.split)
    data = data_module(config, slices, splits)
    network, entries = build_run_network(config, DataFacts.of(slices, data.channels))
    loss = MixedLoss(**config.regularization.error.arguments)
    module = SegmentationModule(network, loss, config, splits.val, 2)
    module.network.to(memory_format=module.memory_format)
    clock = Clock()
    control = RegularizationControl(network, entries, 0)
    make_trainer(run, config, [control, clock]).fit(module, data)
    return clock.ends


def arrays(store: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the images and masks of two cases, in memory."""
    found = []
    for path in sorted((store / "images").glob("*.npy"))[:2]:
        pair = np.load(path), np.load(store / "masks" / path.name)
        found += [(image.astype(np.float32), mask) for image, mask in zip(*pair, strict=True)]
    return found


def monai_script(options: argparse.Namespace, store: Path) -> tuple[nn.Module, Any, Any]:
    """Return network, loss and loader as MONAI's tutorials build them."""
    from monai.data import CacheDataset, DataLoader
    from monai.losses import DiceCELoss
    from monai.networks.nets import BasicUNet
    from monai.transforms import Compose, EnsureChannelFirstd, RandAffined, ScaleIntensityRanged

    both = ["image", "label"]
    steps = Compose(
        [
            EnsureChannelFirstd(both, channel_dim="no_channel"),
            ScaleIntensityRanged("image", *WINDOW, 0.0, 1.0, clip=True),
            RandAffined(
                both,
                prob=0.5,
                rotate_range=0.17,
                scale_range=0.1,
                mode=("bilinear", "nearest"),
                padding_mode="zeros",
            ),
        ]
    )
    items = [{"image": image, "label": mask} for image, mask in arrays(store)]
    data = CacheDataset(items, steps, progress=False)
    loader = DataLoader(data, batch_size=options.batch, shuffle=True, num_workers=options.workers)
    network = BasicUNet(2, 1, 2, features=network_of("monai", options.width)["features"])
    loss = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
    return network, loss, (lambda: ((b["image"], b["label"]) for b in loader))


class SmpDataset(torch.utils.data.Dataset[Any]):
    """Slices with albumentations, as in the examples of segmentation-models-pytorch."""

    def __init__(self, store: Path) -> None:
        import albumentations as A

        self.items = arrays(store)
        self.change = A.Compose([A.Affine(rotate=(-10, 10), scale=(0.9, 1.1), p=0.5)])

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, mask = self.items[index]
        image = np.clip((image - WINDOW[0]) / (WINDOW[1] - WINDOW[0]), 0, 1)
        changed = self.change(image=image[..., None], mask=mask)
        return changed["image"].transpose(2, 0, 1).astype(np.float32), changed["mask"]


def smp_script(options: argparse.Namespace, store: Path) -> tuple[nn.Module, Any, Any]:
    """Return network, loss and loader as the examples of segmentation-models-pytorch do."""
    import segmentation_models_pytorch as smp

    network = smp.Unet("resnet18", encoder_weights=None, in_channels=1, classes=2)
    dice, ce = smp.losses.DiceLoss("multiclass", classes=[1]), nn.CrossEntropyLoss()
    loader = torch.utils.data.DataLoader(
        SmpDataset(store), options.batch, shuffle=True, num_workers=options.workers
    )
    return network, (lambda logits, mask: dice(logits, mask) + ce(logits, mask)), (lambda: loader)


def plain(options: argparse.Namespace, store: Path, equal: bool) -> list[float]:
    """Train by a plain loop and return the times at which its steps ended.

    Args:
        options: the numbers of the benchmark.
        store: the slice store.
        equal: whether to take the precision and memory format that the toolkit chooses.
    """
    from medseg_reg.engine.memory_format import choose_memory_format
    from medseg_reg.engine.precision import choose_precision

    script: Callable[..., Any] = monai_script if options.pair == "monai" else smp_script
    network, loss, batches = script(options, store)
    order, dtype = torch.contiguous_format, None
    if equal:
        order = choose_memory_format("auto", network, options.device)
        precision = choose_precision("auto", options.device)
        dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    network = network.to(options.device, memory_format=order)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    scaler = torch.amp.GradScaler(options.device, enabled=dtype == torch.float16)
    ends: list[float] = []
    while len(ends) < options.steps:
        ends += _epoch(network, loss, batches(), optimizer, scaler, options, order, dtype)
    return ends[: options.steps]


def _epoch(
    network: nn.Module,
    loss: Callable[..., torch.Tensor],
    batches: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    scaler: Any,
    options: argparse.Namespace,
    order: torch.memory_format,
    dtype: torch.dtype | None,
) -> list[float]:
    ends = []
    for image, mask in batches:
        image = image.to(options.device, memory_format=order)
        mask = mask.to(options.device)
        with torch.autocast(options.device, dtype or torch.bfloat16, enabled=dtype is not None):
            logits = network(image)
        optimizer.zero_grad()
        value = loss(logits.float(), mask if options.pair == "monai" else mask.long())
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        value.item()  # every script prints its loss
        ends.append(synchronized())
    return ends


def one(options: argparse.Namespace) -> list[float]:
    """Train once, and return the seconds of the steps without the first ones."""
    number = WAYS.index(options.one)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "store").symlink_to(options.store.resolve())
        train = toolkit if number >= 2 else plain
        ends = train(options, folder / "store", number in (1, 3))
    return [b - a for a, b in pairwise(ends)][WARM_UP:]


def measure(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Return for each pair and way the seconds of the steps of all rounds."""
    from data_prep.phantom import make_demo

    times: dict[str, dict[str, list[float]]] = {p: {w: [] for w in WAYS} for p in PAIRS}
    with tempfile.TemporaryDirectory() as name:
        store = Path(name) / "store"
        make_demo(store, cases=4, size=options.size, slices=24, tell=lambda _: None)
        for _ in range(options.rounds):
            for pair in PAIRS:
                for way in WAYS:
                    child = [
                        *(sys.executable, "-W", "ignore", "-m", "benchmarks.training"),
                        *("--one", way, "--pair", pair, "--store", str(store)),
                        *("--size", str(options.size), "--batch", str(options.batch)),
                        *("--width", str(options.width), "--steps", str(options.steps)),
                        *("--workers", str(options.workers), "--device", options.device),
                    ]
                    done = subprocess.run(
                        child, capture_output=True, text=True, check=False, cwd=ROOT
                    )
                    if done.returncode:
                        last = " / ".join(done.stderr.strip().splitlines()[-3:])
                        raise MedsegError(f"{pair}, {way}: the training failed: {last[-500:]}")
                    times[pair][way] += json.loads(done.stdout.splitlines()[-1])
    return times


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    made.add_argument("--size", type=int, default=128, help="rows and columns")
    made.add_argument("--batch", type=int, default=4)
    made.add_argument("--width", type=int, default=16, help="feature maps of the first level")
    made.add_argument("--steps", type=int, default=25, help="steps of one training")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--workers", type=int, default=0)
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    made.add_argument("--pair", choices=PAIRS, help=argparse.SUPPRESS)
    made.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    return made


def rows(options: argparse.Namespace) -> list[Row]:
    """Return the rows of this part for `python -m benchmarks`."""
    words = ["--device", options.device]
    if options.full:
        words += ["--size", "512", "--batch", "8", "--width", "64", "--steps", "60"]
        words += ["--rounds", "5", "--workers", "4"]
    else:
        words += ["--steps", "25", "--rounds", "1"]
    measured = measure(parser().parse_args(words))
    return [row for pair in PAIRS for row in rows_of(f"training, {pair}", measured[pair], "plain")]


def main(arguments: Sequence[str]) -> None:
    """Measure in turns and print slices per second and ratios."""
    options = parser().parse_args(arguments)
    if options.one:
        print(json.dumps(one(options)))
        return
    for pair, ways in measure(options).items():
        print(f"\n{network_of(pair, options.width)['name']}, {options.size}, batch {options.batch}")
        print(f"{'':36} {'slices/s':>9} {'x plain':>8} {'spread':>7}")
        base = statistics.median(ways["plain"])
        for way, seconds in ways.items():
            middle = statistics.median(seconds)
            rate, wide = options.batch / middle, spread(seconds)
            print(f"{way:36} {rate:9.1f} {base / middle:8.2f} {wide:7.0%}")


if __name__ == "__main__":
    run_main(main)

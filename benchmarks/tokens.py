"""A transformer that runs on fewer tokens, beside the same transformer on all of them.

    python -m benchmarks.tokens                                # 196 patches, then 1024
    python -m benchmarks.tokens --sides 32 --width 384 --heads 6 --rounds 10

MONAI's ViT, 6 blocks with an MLP of four times the width. The variants take turns in rounds: a
training step, forward and backward, and a forward pass in evaluation. Patch dropout changes
training alone; token merging is asked to act in evaluation too; selection computes all tokens in
training and a part of them in evaluation, in the later five of the six blocks. The table gives the
median time of each over that of the plain network; on a CPU it is processor time of one thread,
which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
from monai.networks.nets import ViT
from torch import Tensor, nn

from benchmarks.ratios import Row, markdown, rows_of
from medseg_reg.insertion import insert
from medseg_reg.networks.token_selection import use_token_selection

PATCH, BLOCKS = 8, 6
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "patch_dropout, p 0.25": ("patch_dropout", {"p": 0.25}),
    "patch_dropout, p 0.5": ("patch_dropout", {"p": 0.5}),
    "token_merging, p 0.25": ("token_merging", {"p": 0.25, "in_evaluation": True}),
    "token_merging, p 0.5": ("token_merging", {"p": 0.5, "in_evaluation": True}),
}
SELECTIONS: dict[str, dict[str, Any]] = {
    "token_selection, keep 0.7": {"keep": 0.7},
    "token_selection, keep 0.5 in one stage": {"keep": 0.5, "stages": 1},
    "token_selection of the MLP, keep 0.5 in one stage": {
        "keep": 0.5,
        "stages": 1,
        "mode": "feed_forward",
    },
}


def networks(side: int, options: argparse.Namespace) -> dict[str, nn.Module]:
    """Return the plain network and its variants, of the same weights, by name."""
    torch.manual_seed(0)
    size, width = (side * PATCH,) * 2, options.width
    plain = ViT(1, size, (PATCH,) * 2, width, 4 * width, BLOCKS, options.heads, spatial_dims=2)
    found = {"plain": plain}
    for name, (layer, parameters) in LAYERS.items():
        found[name] = copy.deepcopy(plain)
        insert(found[name], layer, "tokens", example=torch.rand(1, 1, *size), **parameters)
    for name, parameters in SELECTIONS.items():
        found[name] = copy.deepcopy(plain)
        use_token_selection(found[name], (1, 1, *size), "ViT", **parameters)
    return {name: network.to(options.device) for name, network in found.items()}


def seconds(network: nn.Module, image: Tensor, training: bool) -> float:
    """Return the time of one training step without an optimizer, or of one evaluation."""
    network.train(training)
    clock = time.perf_counter if image.is_cuda else time.process_time
    start = clock()
    with torch.set_grad_enabled(training):
        y = network(image)[0]
        if training:
            y.square().mean().backward()
    if image.is_cuda:
        torch.cuda.synchronize()
    return clock() - start


def rows(options: argparse.Namespace) -> list[Row]:
    """Return the rows of all sizes."""
    found = []
    for side in options.sides:
        timed = networks(side, options)
        image = torch.rand(options.batch, 1, side * PATCH, side * PATCH, device=options.device)
        for training, part in ((True, "training step"), (False, "evaluation")):
            times: dict[str, list[float]] = {name: [] for name in timed}
            for number in range(options.rounds + 1):
                for name, network in timed.items():
                    took = seconds(network, image, training)
                    if number:  # the first one warms up
                        times[name].append(took)
            found += rows_of(f"{part}, {side * side} patches", times, "plain")
    return found


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    first, rest = (__doc__ or "").split("\n", 1)
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.tokens",
        description=first,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--sides", type=int, nargs="+", default=[14, 32], help="patches a side")
    made.add_argument("--width", type=int, default=192)
    made.add_argument("--heads", type=int, default=3)
    made.add_argument("--batch", type=int, default=4)
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    torch.set_num_threads(1)
    print(markdown(rows(parser().parse_args(arguments))))


if __name__ == "__main__":
    main()

"""NSDropout on scikit-learn's digits: accuracies as published, with the test labels, and without.

    python benchmarks/nsdropout_leak.py                       # the table; half a minute
    python benchmarks/nsdropout_leak.py --figure docs/nsdropout_leak.png

The published inference of NSDropout multiplies the units by the mask of the class that a test image
really has. So the network is told the answer. Here the same trained networks are tested in four
ways: with the mask of the true class (as published), without a mask and with the mean of all masks
(both clean, they read no label), and with the mask of a wrong class, where it counts how often the
answer is that wrong class. Beside NSDropout stand masks that are drawn once for each class at
random: they know nothing of any data, so that what they gain is the leak alone.

200 of the 1797 images train an MLP (64-128-128-10, Adam, 0.005), 100 validate, the others test.
Numbers are means over seeds, which draw images, weights and masks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg_reg.regularizers import Dropout, NSDropout, Regularizer

CLASSES, TRAIN, VALIDATION = 10, 200, 100
LOOKS, SEEDS, LR = (1, 2, 5, 10, 20, 40, 60), 3, 5e-3


class RandomMasks(NSDropout):
    """One random mask for each class, drawn once; it knows no validation data at all."""

    def regularize(self, x: Tensor) -> Tensor:
        """Multiply by the mask of the true class, as NSDropout does while training."""
        if self.masks is None:
            self.masks = torch.rand(self.classes, x.shape[1]).argsort(1) >= self.p * x.shape[1]
        assert self.labels is not None
        return x * self.masks[self.labels][..., None] / (1 - self.p)


class Accuracies(NamedTuple):
    """Shares of the test images, each tested in another way.

    Attributes:
        published: answered rightly with the mask of the true class.
        none: answered rightly without a mask.
        mean_mask: answered rightly with the mean of all masks.
        wrong: with the mask of a wrong class, answered by that class.
    """

    published: float
    none: float
    mean_mask: float
    wrong: float


def digits(seed: int) -> tuple[Tensor, Tensor]:
    """Return the images (1797, 64) in [0, 1] and their classes, in an order of the seed."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(found.data).float()[order] / 16, torch.tensor(found.target)[order]


def train(
    layer: Regularizer,
    x: Tensor,
    y: Tensor,
    looks: Sequence[int] = LOOKS,
    batch: int = TRAIN,
) -> dict[int, Accuracies]:
    """Train an MLP with a layer behind its first activation; test it after some epochs.

    Args:
        layer: an `NSDropout`, which is given labels and a validation after each epoch, or another.
        x: features (N, 64): the first 200 train, the next 100 validate, the others test.
        y: their classes.
        looks: the epochs to test after; the last one ends the training.
        batch: samples in a step.
    """
    net = nn.Sequential(
        nn.Linear(x.shape[1], 128),
        nn.ReLU(),
        nn.Unflatten(1, (128, 1)),
        layer,
        nn.Flatten(),
        nn.Linear(128, 128),
        nn.ReLU(),
        nn.Linear(128, CLASSES),
    )
    optimizer = torch.optim.Adam(net.parameters(), LR)
    end = TRAIN + VALIDATION
    found = {}
    for epoch in range(1, looks[-1] + 1):
        net.train()
        order = torch.randperm(TRAIN) if batch < TRAIN else torch.arange(TRAIN)
        for rows in order.split(batch):
            _tell(layer, y[rows])
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
        net.eval()
        if isinstance(layer, NSDropout):
            _validate(net, layer, x[TRAIN:end], y[TRAIN:end])
        if epoch in looks:
            found[epoch] = tested(net, layer, x[end:], y[end:])
    return found


def tested(net: nn.Module, layer: Regularizer, x: Tensor, y: Tensor) -> Accuracies:
    """Test a network in the four ways; without masks they are one."""

    def share(mode: str, labels: Tensor, wanted: Tensor) -> float:
        if isinstance(layer, NSDropout):
            layer.eval_mode = mode
        _tell(layer, labels)
        with torch.no_grad():
            return float((net(x).argmax(1) == wanted).float().mean())

    wrong = (y + 1) % CLASSES
    return Accuracies(
        published=share("true_label", y, y),
        none=share("none", y, y),
        mean_mask=share("mean_mask", y, y),
        wrong=share("true_label", wrong, wrong),
    )


def _tell(layer: Regularizer, labels: Tensor) -> None:
    if isinstance(layer, NSDropout):
        layer.labels = labels


def _validate(net: nn.Module, layer: NSDropout, x: Tensor, y: Tensor) -> None:
    layer.eval_mode = "none"  # what is recorded has no mask
    layer.recording, layer.labels = True, y
    with torch.no_grad():
        net(x)
    layer.recording = False
    layer.finish_validation()


Arm = tuple[Callable[[], Regularizer], int]
ARMS: dict[str, Arm] = {
    "no dropout": (lambda: Dropout(0.0), TRAIN),
    "dropout, p = .2": (lambda: Dropout(0.2), TRAIN),
    "dropout, p = .5": (lambda: Dropout(0.5), TRAIN),
    "NSDropout, p = .2": (lambda: NSDropout(0.2, CLASSES, faithful=True), TRAIN),
    "NSDropout, p = .5": (lambda: NSDropout(0.5, CLASSES, faithful=True), TRAIN),
    "NSDropout, p = .2, steps of 40": (lambda: NSDropout(0.2, CLASSES, faithful=True), 40),
    "random masks, p = .2": (lambda: RandomMasks(0.2, CLASSES), TRAIN),
    "random masks, p = .5": (lambda: RandomMasks(0.5, CLASSES), TRAIN),
}


def run(arm: Arm, seeds: int = SEEDS, looks: Sequence[int] = LOOKS) -> dict[int, Accuracies]:
    """Return the mean accuracies over the seeds, by epoch."""
    make, batch = arm
    runs = []
    for seed in range(seeds):
        x, y = digits(seed)
        torch.manual_seed(seed)
        runs.append(train(make(), x, y, looks, batch))
    means = {}
    for epoch in looks:
        ways = zip(*(found[epoch] for found in runs), strict=True)
        means[epoch] = Accuracies(*(sum(way) / seeds for way in ways))
    return means


def table(found: dict[str, dict[int, Accuracies]]) -> str:
    """Return the accuracies by epoch, in Markdown."""
    lines = ["| trained with | test | " + " | ".join(map(str, next(iter(found.values())))) + " |"]
    lines.append("|---" * (2 + len(next(iter(found.values())))) + "|")
    ways = {
        "published": "mask of the true class",
        "none": "no mask",
        "mean_mask": "mean mask",
        "wrong": "mask of a wrong class: answers that class",
    }
    for arm, epochs in found.items():
        masked = any(one.published != one.none for one in epochs.values())
        for way, words in ways.items():
            if way != "none" and not masked:
                continue
            shares = " | ".join(f"{getattr(one, way):.2f}" for one in epochs.values())
            lines.append(f"| {arm} | {words} | {shares} |")
    return "\n".join(lines)


def figure(found: dict[str, dict[int, Accuracies]], path: Path) -> None:
    """Draw published and clean accuracies over the epochs, one panel a rate."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    drawn, panels = plt.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
    for rate, axes in zip((".2", ".5"), panels, strict=True):
        for color, method in enumerate(("NSDropout", "random masks", "dropout")):
            curve = found[f"{method}, p = {rate}"]
            clean = [one.none for one in curve.values()]
            plain = method == "dropout"
            label = "ordinary dropout" if plain else f"{method}, no mask"
            axes.plot(list(curve), clean, color=f"C{color}", label=label)
            if not plain:
                told = [one.published for one in curve.values()]
                label = f"{method}, told the test label"
                axes.plot(list(curve), told, color=f"C{color}", linestyle="--", label=label)
        axes.set(title=f"p = {rate}", xlabel="epoch", ylim=(0, 1.02))
    panels[0].set_ylabel("test accuracy")
    panels[0].legend(fontsize=7)
    drawn.savefig(path, dpi=80)
    plt.close(drawn)


def main(arguments: Sequence[str]) -> None:
    """Print the table, and draw the figure if a path is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--figure", type=Path, help="where to draw the curves")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = {name: run(arm) for name, arm in ARMS.items()}
    print(table(found))
    if options.figure is not None:
        figure(found, options.figure)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Tree dropout on a synthetic regression: errors in training and test, for shallow and deep trees.

    python benchmarks/tree_dropout.py                       # the table; three minutes
    python benchmarks/tree_dropout.py --figure docs/tree_dropout.png

Irsoy and Alpaydin (Neurocomputing 2021) show on a synthetic regression that dropout in a
hierarchical mixture of experts keeps trees of many levels from overfitting. Their data are not
published in a form that could be rebuilt; this one is: y = (|x| + 1/2) sin(3 pi x) plus noise of
variance 0.09, x uniform in [-1, 1], 40 points to train on and 1000 to test with. Experts and gates
are linear in x. Errors are medians over 16 draws of data and weights: where no point was trained
on, a tree may answer anything, and a mean would be that of its worst draw.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from medseg_reg.regularizers import TreeDropout, tree_mixture

DEPTHS, RATES = (2, 4, 6), (0.0, 0.05, 0.1, 0.2)
POINTS, TEST_POINTS, NOISE, DRAWS = 40, 1000, 0.3, 16
STEPS, LOOKS, LR = 5000, 25, 0.1


class Curve(NamedTuple):
    """Mean squared errors over the training, each the median over the draws.

    Attributes:
        steps: after how many steps.
        train: on the points that were trained on, in evaluation mode.
        test: on new points; the noise alone makes 0.09.
    """

    steps: tuple[int, ...]
    train: tuple[float, ...]
    test: tuple[float, ...]


def points(count: int, draws: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return inputs and noisy targets, each (draws, count)."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(draws, count, generator=generator) - 1
    noise = NOISE * torch.randn(draws, count, generator=generator)
    return x, (x.abs() + 0.5) * torch.sin(3 * math.pi * x) + noise


class Trees:
    """Trees of one depth, side by side, one for each draw of the data."""

    def __init__(self, depth: int, draws: int, p: float) -> None:
        leaves, generator = 2**depth, torch.Generator().manual_seed(depth)

        def drawn(width: int, scale: float) -> Tensor:
            values = 2 * torch.rand(draws, width, 2, generator=generator) - 1
            return (scale * values).requires_grad_()

        # Gates that divide the interval from the first step on, at random points.
        self.gates, self.experts = drawn(leaves - 1, 5.0), drawn(leaves, 1.0)
        self.dropout = TreeDropout(p)

    def __call__(self, x: Tensor) -> Tensor:
        """Return answers (draws, count); each point has coins of its own."""
        draws, count = x.shape

        def linear(weights: Tensor) -> Tensor:
            slope, offset = weights.unbind(2)
            lines = slope[:, None] * x[:, :, None] + offset[:, None]
            return lines.flatten(0, 1)[..., None]

        gates = self.dropout(torch.sigmoid(linear(self.gates))) * self.dropout.evaluation_factor
        return tree_mixture(linear(self.experts)[:, :, None], gates).view(draws, count)


def train(
    depth: int, p: float, *, steps: int = STEPS, looks: int = LOOKS, draws: int = DRAWS
) -> Curve:
    """Train trees of one depth with one rate."""
    torch.manual_seed(0)
    trees = Trees(depth, draws, p)
    (x, y), (new_x, new_y) = points(POINTS, draws, 1), points(TEST_POINTS, draws, 2)
    optimizer = torch.optim.Adam([trees.gates, trees.experts], lr=LR)
    found = []
    for step in range(1, steps + 1):
        # A sum over the draws, so that each tree learns as it would alone.
        loss = (trees(x) - y).square().mean(1).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % (steps // looks) == 0:
            trees.dropout.eval()
            with torch.no_grad():
                squares = [(trees(a) - b).square() for a, b in ((x, y), (new_x, new_y))]
            trees.dropout.train()
            found.append((step, *(float(each.mean(1).quantile(0.5)) for each in squares)))
    return Curve(*zip(*found, strict=True))


def table(curves: dict[tuple[int, float], Curve]) -> str:
    """Return the errors at the end, and the smallest error in test on the way."""
    lines = ["depth  p     train  test   least test"]
    for (depth, p), curve in curves.items():
        lines.append(
            f"{depth:<5}  {p:<4g}  {curve.train[-1]:.3f}  {curve.test[-1]:.3f}  "
            f"{min(curve.test):.3f}"
        )
    return "\n".join(lines)


def figure(curves: dict[tuple[int, float], Curve], path: Path) -> None:
    """Draw the curves, one panel a depth; training dashed."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    depths = sorted({depth for depth, _ in curves})
    drawn, panels = plt.subplots(1, len(depths), figsize=(9, 3), sharey=True, layout="constrained")
    for depth, axes in zip(depths, panels, strict=True):
        for index, p in enumerate(sorted({p for _, p in curves})):
            curve = curves[depth, p]
            axes.plot(curve.steps, curve.test, color=f"C{index}", label=f"p = {p:g}")
            axes.plot(curve.steps, curve.train, color=f"C{index}", linestyle="--", linewidth=0.8)
        axes.set(title=f"{2**depth} experts", xlabel="step", yscale="log")
    panels[0].set_ylabel("mean squared error")
    panels[0].legend(fontsize=8)
    drawn.savefig(path, dpi=80)


def main(arguments: Sequence[str]) -> None:
    """Print the table, and draw the figure if a path is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--figure", type=Path, help="where to draw the curves")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    curves = {(depth, p): train(depth, p) for depth in DEPTHS for p in RATES}
    print(table(curves))
    if options.figure is not None:
        figure(curves, options.figure)


if __name__ == "__main__":
    main(sys.argv[1:])

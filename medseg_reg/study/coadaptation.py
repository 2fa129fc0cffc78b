"""How much the maps before the output layer lean on each other.

Three measures of one trained network: what is left of its DICE when some of these maps are taken
away at random, how strongly they are correlated, and how much better it is on the cases that it was
trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from medseg_reg.engine.network import load_run_network
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.errors import MedsegError
from medseg_reg.inference.evaluation import Part, case_table, count_cases, run_predictor

RATES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def coadaptation(
    run: RunDirectory,
    rates: Sequence[float] = RATES,
    draws: int = 5,
    seed: int = 0,
    part: Part = "test",
    store_path: Path | None = None,
) -> pd.DataFrame:
    """Score a network of which random maps before the output layer are set to 0.

    Of C maps, round(rate C) are taken at random, the same for all images of a draw, and the others
    are left as they are. The flatter the curve of DICE over the rate, the less the maps depend on
    each other.

    Args:
        run: a finished run.
        rates: shares of the maps that are set to 0, each from 0 to below 1.
        draws: draws for each rate; the rate 0 is computed once.
        seed: of the draws. Equal seeds take equal maps of networks of equal width.
        part: the part of the split.
        store_path: the slice store, where it has moved since the training.

    Returns:
        Columns `rate` (asked for), `draw`, `group` and `dice` (mean over classes and cases).

    Raises:
        MedsegError: the run is not finished, its data are missing, or a number is out of range.

    Paper:
        D. Shi, R. Liu, L. Tao, C. Yuan, Heuristic Dropout: An Efficient Regularization Method for
        Medical Image Segmentation Models, ICASSP 2022, figure 4. How many draws were made there is
        not said.
    """
    if bad := [rate for rate in rates if not 0 <= rate < 1]:
        raise MedsegError(f"rate {bad[0]}: expected shares of the maps, from 0 to below 1.")
    if draws < 1:
        raise MedsegError(f"{draws} draws: expected at least 1.")
    subject = _Subject(run, store_path)
    layer = subject.output_layer()
    rows = []
    for rate in rates:
        count = round(rate * _width(layer))
        for draw in range(draws if count else 1):
            generator = torch.Generator().manual_seed(1000 * seed + draw)
            dropped = torch.randperm(_width(layer), generator=generator)[:count]
            with _changed_input(layer, _without(dropped)):
                scores = subject.dice(part)
            rows += [
                {"rate": rate, "draw": draw, "group": group, "dice": value}
                for group, value in scores.items()
            ]
    return pd.DataFrame(rows)


def channel_correlation(
    run: RunDirectory, part: Part = "test", store_path: Path | None = None
) -> float:
    """Return the mean absolute correlation between pairs of maps before the output layer.

    |r_ij| of Pearson over all pixels of a part, averaged over i < j; maps that are constant are
    left out. NaN with fewer than two others.

    Args:
        run: a finished run.
        part: the part of the split.
        store_path: the slice store, where it has moved since the training.

    Raises:
        MedsegError: as in `coadaptation`.
    """
    subject = _Subject(run, store_path)
    layer = subject.output_layer()
    width = _width(layer)
    sums, products, count = torch.zeros(width).double(), torch.zeros(width, width).double(), 0

    def add(x: Tensor) -> Tensor:
        nonlocal count
        flat = x.detach().double().cpu().transpose(0, 1).flatten(1)
        sums.add_(flat.sum(dim=1))
        products.add_(flat @ flat.T)
        count += flat.shape[1]
        return x

    with _changed_input(layer, add):
        subject.dice(part)
    mean = sums / count
    covariance = (products / count - mean[:, None] * mean).numpy()
    spread = np.sqrt(np.clip(np.diag(covariance), 0, None))
    varied = np.flatnonzero(spread > 1e-6 * spread.max(initial=0)) if spread.any() else []
    if len(varied) < 2:
        return float("nan")
    r = covariance[np.ix_(varied, varied)] / np.outer(spread[varied], spread[varied])
    return float(np.abs(r[np.triu_indices(len(varied), 1)]).mean())


def generalization_gap(run: RunDirectory, store_path: Path | None = None) -> dict[str, float]:
    """Return the mean DICE on the cases of the training, of the validation, and their difference.

    All three from the finished network in evaluation mode and without augmentation, so that a layer
    that is on in training alone does not look like a gap.

    Args:
        run: a finished run.
        store_path: the slice store, where it has moved since the training.

    Returns:
        `train`, `val` and `gap`, which is train minus val.

    Raises:
        MedsegError: as in `coadaptation`.
    """
    subject = _Subject(run, store_path)
    train, val = (float(subject.dice(part).mean()) for part in ("train", "val"))
    return {"train": train, "val": val, "gap": train - val}


class _Subject:
    """A finished run with its network and data."""

    def __init__(self, run: RunDirectory, store_path: Path | None) -> None:
        self.config = run.config()
        self.network = load_run_network(run)
        self.store, self.splits = run.data(store_path or self.config.data.store)
        self.predictor = run_predictor(run, self.network)

    def dice(self, part: str) -> pd.Series[float]:
        """Return the volume DICE of each group of a part, over classes and cases."""
        cases = getattr(self.splits, part)
        counts = count_cases(self.store, cases, self.predictor, part, progress=False)
        table = case_table(self.store, counts, self.config.evaluation.empty)
        means = table.groupby(["group", "class"], sort=True)["dice"].mean()
        return means.groupby("group", sort=True).mean()

    def output_layer(self) -> nn.Module:
        """Return the last convolution that runs: its maps are the logits."""
        ran: list[nn.Module] = []
        handles = [
            module.register_forward_hook(lambda m, _, __: ran.append(m))
            for module in self.network.modules()
            if isinstance(module, _CONVOLUTIONS)
        ]
        first = self.splits.test[0]
        try:
            self.predictor.labels(self.store.image(first)[:1], first, self.store.mask(first)[:1])
        finally:
            for handle in handles:
                handle.remove()
        if not ran:
            raise MedsegError("the network has no convolution, so it has no maps to take away.")
        return ran[-1]


def _width(layer: nn.Module) -> int:
    width: Any = layer.in_channels
    return int(width)


def _without(channels: Tensor) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        return x.index_fill(1, channels.to(x.device), 0) if len(channels) else x

    return change


@contextmanager
def _changed_input(layer: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    handle = layer.register_forward_pre_hook(lambda _, inputs: (change(inputs[0]), *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()

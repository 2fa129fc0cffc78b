"""How much the maps before the output layer lean on each other.

Of one trained network: what is left of its DICE when some of these maps are taken away at random,
how strongly they are correlated, and how much better it is on what it was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from medseg_reg.engine.metrics_table import MetricsTable, kept_epoch
from medseg_reg.engine.network import load_run_network
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.errors import MedsegError
from medseg_reg.inference.evaluation import Part, case_table, count_slices, run_predictor
from medseg_reg.inference.predictor import require_finite
from medseg_reg.study.output_layer import OutputLayer, output_layer

RATES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)

# Zeroed and whole maps run in one batch or one by one; both must give the same probabilities.
_TOLERANCE = 1e-4


def coadaptation(
    run: RunDirectory,
    rates: Sequence[float] = RATES,
    draws: int = 5,
    seed: int = 0,
    part: Part = "test",
    store_path: Path | None = None,
) -> pd.DataFrame:
    """Score a network of which random maps before the output layer are set to 0.

    Of C maps, rate C (rounded, halves up) are set to 0, the same for all slices of a draw; the
    others are left as they are and not scaled up. Within a draw a higher rate takes the maps of a
    lower one and more. The flatter the curve of DICE over the rate, the less the maps depend on
    each other. Look at the height too: a network that has learned little is flat as well.

    The network runs once a slice, whatever the number of rates and draws; only what comes behind
    the maps is computed for each. Its layers are in evaluation mode, and torch's random state is
    not touched.

    Args:
        run: a finished run.
        rates: shares of the maps that are set to 0, each from 0 to below 1.
        draws: draws for each rate; a rate at which no map is taken is computed once, as draw 0.
        seed: of the draws. Equal seeds take equal maps of networks of equal width.
        part: the part of the split.
        store_path: the slice store, where it has moved since the training.

    Returns:
        Columns `rate` (asked for), `draw`, `group` and `dice` (volume DICE, mean over cases and
        classes), sorted.

    Raises:
        MedsegError: the run is not finished, its data are missing, a number is out of range, or
            the network has no convolution at its end.

    Source:
        D. Shi, R. Liu, L. Tao, C. Yuan, "Heuristic Dropout: An Efficient Regularization Method for
        Medical Image Segmentation Models", ICASSP 2022, doi:10.1109/ICASSP43922.2022.9747409,
        figure 4. It does not say how many draws were made, nor whether they differ by image.
    """
    if bad := [rate for rate in rates if not 0 <= rate < 1]:
        raise MedsegError(f"rate {bad[0]}: expected shares of the maps, from 0 to below 1.")
    if draws < 1:
        raise MedsegError(f"{draws} draws: expected at least 1.")
    subject = _Subject(run, store_path)
    layer = subject.output_layer()
    asked, masks = _masks(layer.width, sorted(set(rates)), draws, seed)
    counts: dict[str, Tensor] = {}
    for case in subject.cases(part):
        counts[case] = subject.counts_of_masks(case, layer, masks)
    rows = []
    for number, (rate, draw) in enumerate(asked):
        scores = subject.group_dice({case: found[number] for case, found in counts.items()})
        rows += [(rate, draw, str(group), float(value)) for group, value in scores.items()]
    return pd.DataFrame(rows, columns=["rate", "draw", "group", "dice"])


def channel_correlation(
    run: RunDirectory, part: Part = "test", store_path: Path | None = None
) -> pd.DataFrame:
    """Return how strongly the maps before the output layer are correlated, patient by patient.

    The mean over pairs of maps i < j of Pearson's |r_ij| over all pixels of a patient, padding of
    the network included; maps that are constant are left out. 1 says that all maps show the same,
    so that each could stand for the others; 0 that none foretells another one.

    Args:
        run: a finished run.
        part: the part of the split.
        store_path: the slice store, where it has moved since the training.

    Returns:
        Columns `group` and `correlation`, from 0 to 1, sorted; NaN with fewer than two maps that
        are not constant.

    Raises:
        MedsegError: as in `coadaptation`.
    """
    subject = _Subject(run, store_path)
    layer = subject.output_layer()
    moments: dict[str, _Moments] = {}
    for case in subject.cases(part):
        of_group = moments.setdefault(subject.group(case), _Moments(layer.width))
        with layer.watched(of_group.add):
            subject.labels(case)
    rows = [(group, moments[group].correlation()) for group in sorted(moments)]
    return pd.DataFrame(rows, columns=["group", "correlation"])


class _Moments:
    """Sums and products of maps over pixels, in float64."""

    def __init__(self, width: int) -> None:
        self.sums = torch.zeros(width, dtype=torch.float64)
        self.products, self.count = torch.zeros(width, width, dtype=torch.float64), 0

    def add(self, maps: Tensor) -> None:
        """Add the pixels of maps (B, C, H, W)."""
        flat = maps.detach().cpu().double().transpose(0, 1).flatten(1)
        self.sums += flat.sum(dim=1)
        self.products += flat @ flat.T
        self.count += flat.shape[1]

    def correlation(self) -> float:
        """Return the mean absolute correlation of pairs of maps that are not constant."""
        mean = self.sums / self.count
        covariance = (self.products / self.count - torch.outer(mean, mean)).numpy()
        spread = np.sqrt(np.clip(np.diag(covariance), 0, None))
        varied = np.flatnonzero(spread > 1e-6 * max(float(spread.max()), 1e-30))
        if len(varied) < 2:
            return float("nan")
        r = covariance[np.ix_(varied, varied)] / np.outer(spread[varied], spread[varied])
        return float(np.clip(np.abs(r[np.triu_indices(len(varied), 1)]), 0, 1).mean())


def generalization_gap(run: RunDirectory, store_path: Path | None = None) -> dict[str, float]:
    """Return the mean DICE on the cases of the training, of the validation, and their difference.

    Both from the finished network in evaluation mode and without augmentation, so that a layer that
    is on in training alone does not look like a gap.

    Args:
        run: a finished run.
        store_path: the slice store, where it has moved since the training.

    Returns:
        `train`, `val` and `gap`, which is train minus val.

    Raises:
        MedsegError: as in `coadaptation`.
    """
    subject = _Subject(run, store_path)
    train, val = (subject.mean_dice(part) for part in ("train", "val"))
    return {"train": train, "val": val, "gap": train - val}


def loss_gap(run: RunDirectory) -> dict[str, float]:
    """Return the losses of the epoch whose weights were kept, from metrics.csv.

    That is the one with the best validation DICE, or the last validated one where
    `regularization.optimization.select` says `last`.

    The loss of the training is with augmentation and with the regularizers on, which is no measure
    of over-fitting between methods: a strong one raises it. It shows the course of one run;
    to compare runs take `generalization_gap`.

    Args:
        run: a run of which an epoch at least is validated.

    Returns:
        `epoch`, `train_loss`, `val_loss`, and `gap`, which is validation minus training.

    Raises:
        MedsegError: metrics.csv is missing or has no validated epoch.
    """
    path = run.path / "metrics.csv"
    if not path.exists():
        raise MedsegError(f"{path}: is missing; the run is incomplete.")
    rows = [row for row in MetricsTable.read(path) if {"train_loss", "val_loss"} <= row.keys()]
    if not rows:
        raise MedsegError(f"{path}: has no validated epoch. Let the training go on.")
    kept = kept_epoch(rows, run.config().regularization.optimization.select)
    found = {name: kept[name] for name in ("epoch", "train_loss", "val_loss")}
    return {**found, "gap": found["val_loss"] - found["train_loss"]}


def gaps(run: RunDirectory, store_path: Path | None = None) -> pd.DataFrame:
    """Return both gaps between training and validation in one row, as a study keeps them.

    DICE is computed anew, because metrics.csv has none of the training; the losses are read there,
    and missing where no epoch was validated.

    Args:
        run: a finished run.
        store_path: the slice store, where it has moved since the training.

    Returns:
        Columns `train_dice`, `val_dice`, `gap`; `epoch`, `train_loss`, `val_loss`, `loss_gap`.

    Raises:
        MedsegError: as in `coadaptation`.
    """
    dice = generalization_gap(run, store_path)
    losses = dict.fromkeys(("epoch", "train_loss", "val_loss", "gap"), float("nan"))
    with suppress(MedsegError):
        losses = loss_gap(run)
    found = {"train_dice": dice["train"], "val_dice": dice["val"], "gap": dice["gap"]}
    names = {"gap": "loss_gap"}
    return pd.DataFrame([found | {names.get(key, key): losses[key] for key in losses}])


def _masks(
    width: int, rates: Sequence[float], draws: int, seed: int
) -> tuple[list[tuple[float, int]], Tensor]:
    """Return rates with draws, and masks (number, width) of 1 for maps that stay."""
    # A network would be a constant without any map.
    taken = {rate: min(width - 1, int(rate * width + 0.5)) for rate in rates}
    asked = [(rate, draw) for rate in rates for draw in range(draws if taken[rate] else 1)]
    masks = torch.ones(len(asked), width)
    for row, (rate, draw) in zip(masks, asked, strict=True):
        order = np.random.default_rng([seed, draw]).permutation(width)
        row[torch.from_numpy(order[: taken[rate]])] = 0
    return asked, masks


class _Subject:
    """A finished run with its network and data; slices are predicted one by one."""

    def __init__(self, run: RunDirectory, store_path: Path | None) -> None:
        self.config, self.facts = run.config(), run.data_facts()
        with torch.random.fork_rng(devices=[]):  # new weights are drawn before they are loaded
            self.network = load_run_network(run)
        self.store, self.splits = run.data(store_path or self.config.data.store)
        self.predictor = run_predictor(run, self.network)
        self.together: bool | None = None

    def cases(self, part: str) -> Sequence[str]:
        """Return the cases of a part."""
        found: Sequence[str] = getattr(self.splits, part)
        return found

    def group(self, case: str) -> str:
        """Return the patient or video of a case."""
        return str(self.store.row(case).group)

    def output_layer(self) -> OutputLayer:
        """Return the layer whose output are the logits."""
        return output_layer(
            self.network, self.facts.channels, self.config.data.image.size, self.predictor.device
        )

    def labels(self, case: str) -> np.ndarray[Any, np.dtype[Any]]:
        """Return the labels of a case."""
        return self.predictor.labels(self.store.image(case), case, self.store.mask(case))

    def mean_dice(self, part: str) -> float:
        """Return the mean over patients of volume DICE."""
        classes, ignored = len(self.store.classes), self.store.ignore_label
        counts = {}
        for case in self.cases(part):
            truth = self.store.mask(case)
            counts[case] = count_slices(self.labels(case), truth, classes, ignored).sum(dim=0)
        return float(self.group_dice(counts).mean())

    def group_dice(self, counts: dict[str, Tensor]) -> Any:
        """Return volume DICE by group: over cases in each class, then over classes."""
        per_slice = {case: one[None] for case, one in counts.items()}
        table = case_table(self.store, per_slice, self.config.evaluation.empty)
        means = table.groupby(["group", "class"], sort=True)["dice"].mean()
        return means.groupby("group", sort=True).mean()

    def counts_of_masks(self, case: str, layer: OutputLayer, masks: Tensor) -> Tensor:
        """Return the counts of a case (masks, classes, 3), summed over slices."""
        images, truth = self.store.image(case), self.store.mask(case)
        require_finite(images, case)
        seen = self.predictor.case(images, case, truth=truth)
        classes = len(self.store.classes)
        total = torch.zeros(len(masks), classes, 3, dtype=torch.int64)
        for number in range(len(images)):

            def run(some: Tensor, number: int = number) -> Tensor:
                with layer.masked(some):
                    return next(seen.members(number, number + 1))

            if self.together is None:
                self.together = _same_together(run, masks)
            found = (
                run(masks)
                if self.together
                else torch.cat([run(one) for one in torch.split(masks, 1)])
            )
            labels = found.argmax(dim=1).to(torch.uint8).cpu().numpy()
            repeated = np.broadcast_to(truth[number], labels.shape)
            total += count_slices(labels, repeated, classes, self.store.ignore_label)
        return total


def _same_together(run: Any, masks: Tensor) -> bool:
    """Whether what follows the layer takes all masks as one batch, and gives the same for it."""
    alone = run(masks[-1:])
    try:
        together = run(masks)
    except (RuntimeError, ValueError):
        return False
    return len(together) == len(masks) and torch.allclose(
        together[-1], alone[0], rtol=0, atol=_TOLERANCE
    )

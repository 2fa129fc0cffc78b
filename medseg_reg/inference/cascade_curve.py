"""The score of a cascade of two runs over its cost, with thresholds from the validation part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from medseg_reg.config import Config
from medseg_reg.data.preprocessing import Fit
from medseg_reg.data.splits import Splits
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.coarse import takes_in
from medseg_reg.engine.network import load_run_network
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.errors import MedsegError
from medseg_reg.files import replacing
from medseg_reg.inference.cascade import coarse_predictor, multiply_adds
from medseg_reg.inference.confidence import band_of, confidence, threshold_for
from medseg_reg.inference.ensemble import Known, check_agree
from medseg_reg.inference.evaluation import (
    Part,
    case_table,
    count_cases,
    count_slices,
    run_predictor,
    slice_table,
    summarise,
)
from medseg_reg.inference.predictor import Predictor

# Where no budgets are asked for: the shares of the slices that the finer network sees.
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Judged:
    """What two networks say of each slice of a part.

    Attributes:
        confidences: of the first network for the slices of each case, (S,) float64.
        first: counts of the first network for the slices of each case, (S, classes, 3).
        fine: those of the finer one.
        costs: multiply-adds for a slice of each case: of the first network, of what comes after it
            where the slice goes on, and of the finer network alone.
    """

    confidences: dict[str, Tensor]
    first: dict[str, Tensor]
    fine: dict[str, Tensor]
    costs: dict[str, tuple[int, int, int]]

    def slices(self) -> tuple[np.ndarray, ...]:
        """Return the confidence and the three costs of every slice."""
        lengths = [len(one) for one in self.confidences.values()]
        costs = np.repeat(np.array(list(self.costs.values()), float), lengths, axis=0)
        return torch.cat(list(self.confidences.values())).numpy(), *costs.T

    def threshold(self, budget: float) -> float:
        """Return the threshold that keeps a budget."""
        confidences, first, after, alone = self.slices()
        return threshold_for(confidences, first, after, budget, alone)

    def counts(self, threshold: float) -> dict[str, Tensor]:
        """Return the counts of the cascade for the slices of each case."""
        return {
            case: torch.where((sure > threshold)[:, None, None], self.first[case], self.fine[case])
            for case, sure in self.confidences.items()
        }

    def budget(self, share: float) -> float:
        """Return the cost where a share of the slices goes on, over that of the finer network."""
        _, first, after, alone = self.slices()
        return float((first.sum() + share * after.sum()) / alone.sum())


def cascade_curve(
    run: RunDirectory,
    first: RunDirectory,
    budgets: Sequence[float] | None = None,
    part: Part = "test",
) -> pd.DataFrame:
    """Score a cascade at thresholds that keep budgets on the validation part; write `cascade.csv`.

    Both networks see every slice once; what a cascade would have computed is counted from that.

    Args:
        run: the finer run; its directory gets the file.
        first: the cheap run, trained on the same split of the same store; or the one whose answer
            the finer run takes in, which then is a part of it and is not counted twice.
        budgets: of the multiply-adds of the finer network on all slices, see `threshold_for`; by
            default five at which none to all of the slices go on.
        part: the part of the split that is scored. On the test part the cost and the share of early
            exits need not be those of the validation part.

    Returns:
        One row a budget: `budget`, `confidence` (the threshold), `early` (the share of slices
        that the first network keeps), `multiply_adds` (over those of the finer network alone),
        volume `dice` and its interval `low` to `high` over patients.

    Raises:
        MedsegError: the runs do not fit together or have another split, or a budget is below what
            the first network costs alone.
    """
    check_agree(Known.of(first), Known.of(run))
    config = run.config()
    store, splits = run.data(config.data.store)
    fine = run_predictor(run, load_run_network(run))
    if inside := takes_in(run, first):
        # That it has not seen what the finer run is tested on was made sure before the training.
        cheap = coarse_predictor(fine)
    else:
        _require_one_split(first, run, first.data(config.data.store)[1], splits)
        cheap = run_predictor(first, load_run_network(first))
    judged = {
        name: _judge(store, getattr(splits, name), (cheap, fine, inside), config, name)
        for name in dict.fromkeys(("val", part))
    }
    if budgets is None:
        budgets = [judged["val"].budget(share) for share in SHARES]
    rows = [
        _row(judged[part], store, config, budget, judged["val"].threshold(budget))
        for budget in sorted(budgets)
    ]
    curve = pd.DataFrame(rows)
    folder = run.path / "evaluation" / ("" if part == "test" else part)
    with replacing(folder / "cascade.csv") as temporary:
        # With all digits: a slice may lie at the threshold.
        curve.to_csv(temporary, index=False)
    return curve


def _require_one_split(first: RunDirectory, run: RunDirectory, other: Splits, own: Splits) -> None:
    if other.hash != own.hash:
        raise MedsegError(
            f"--first {first.path}: has the split {other.hash}, {run.path} has {own.hash}, so one "
            "may have been trained on what the other is tested on. Train both on one split."
        )


def _row(
    judged: Judged, store: SliceStore, config: Config, budget: float, threshold: float
) -> dict[str, float | None]:
    counts = judged.counts(threshold)
    tables = [table(store, counts, config.evaluation.empty) for table in (case_table, slice_table)]
    score = summarise(*tables, config)["dice"]
    confidences, first, after, alone = judged.slices()
    go_on = confidences <= threshold
    return {
        "budget": budget,
        "confidence": threshold,
        "early": float(1 - go_on.mean()),
        "multiply_adds": float((first.sum() + after[go_on].sum()) / alone.sum()),
        "dice": score["mean"],
        "low": score["low"],
        "high": score["high"],
    }


def _judge(
    store: SliceStore,
    cases: Sequence[str],
    networks: tuple[Predictor, Predictor, bool],
    config: Config,
    title: str,
) -> Judged:
    """Predict all slices of some cases by both networks.

    `networks` are the first one and the finer one, and whether this has the first one inside.
    """
    first, fine, inside = networks
    confidences, counts = {}, {}
    for case in cases:
        images, truth = store.image(case), store.mask(case)
        labels, sure = np.empty(truth.shape, np.uint8), []
        band = band_of(Fit.of(first.image, images.shape[1:3]))
        for start, p in first.batches(images, case, truth=truth):
            labels[start : start + len(p)] = p.argmax(dim=1).to(torch.uint8).cpu()
            sure.append(confidence(p, band))
        confidences[case] = torch.cat(sure)
        counts[case] = count_slices(labels, truth, len(store.classes), store.ignore_label)
    finer = count_cases(store, cases, fine, f"cascade {title}", config.training.progress)
    count, costs = _Costs(store), {}
    for case in cases:
        cheap, alone = count(first, case), count(fine, case)
        costs[case] = (cheap, alone - cheap if inside else alone, alone)
    return Judged(confidences, counts, finer, costs)


class _Costs:
    """Multiply-adds for one slice of a case, computed once for each size."""

    def __init__(self, store: SliceStore) -> None:
        self.store = store
        self.known: dict[tuple[int, tuple[int, ...]], int] = {}

    def __call__(self, predictor: Predictor, case: str) -> int:
        rows, columns = self.store.row(case).shape[1:3]
        shape = (predictor.channels, *Fit.of(predictor.image, (rows, columns)).outer)
        key = (id(predictor), shape)
        if key not in self.known:
            self.known[key] = multiply_adds(predictor.network, shape)
        return self.known[key]

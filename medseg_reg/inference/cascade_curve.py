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
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.network import load_run_network
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.errors import MedsegError
from medseg_reg.files import replacing
from medseg_reg.inference.cascade import multiply_adds
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
        costs: multiply-adds of the first and of the finer network for a slice of each case.
    """

    confidences: dict[str, Tensor]
    first: dict[str, Tensor]
    fine: dict[str, Tensor]
    costs: dict[str, tuple[int, int]]

    def slices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return confidence, cost of the first and cost of the finer network of every slice."""
        lengths = [len(one) for one in self.confidences.values()]
        costs = np.repeat(np.array(list(self.costs.values()), float), lengths, axis=0)
        return torch.cat(list(self.confidences.values())).numpy(), costs[:, 0], costs[:, 1]

    def counts(self, threshold: float) -> dict[str, Tensor]:
        """Return the counts of the cascade for the slices of each case."""
        return {
            case: torch.where((sure > threshold)[:, None, None], self.first[case], self.fine[case])
            for case, sure in self.confidences.items()
        }

    def least(self) -> float:
        """Return the cost of the first network alone, over that of the finer one."""
        _, first, fine = self.slices()
        return float(first.sum() / fine.sum())


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
        first: the cheap run, trained on the same split of the same store.
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
    if (other := first.data(config.data.store)[1]).hash != splits.hash:
        raise MedsegError(
            f"--first {first.path}: has the split {other.hash}, {run.path} has {splits.hash}, so "
            "one may have been trained on what the other is tested on. Train both on one split."
        )
    networks = [run_predictor(one, load_run_network(one)) for one in (first, run)]
    judged = {
        name: _judge(store, getattr(splits, name), *networks, config, name)
        for name in dict.fromkeys(("val", part))
    }
    if budgets is None:
        budgets = [judged["val"].least() + share for share in SHARES]
    rows = [
        _row(judged[part], store, config, budget, threshold)
        for budget in sorted(budgets)
        for threshold in [threshold_for(*judged["val"].slices(), budget)]
    ]
    curve = pd.DataFrame(rows)
    folder = run.path / "evaluation" / ("" if part == "test" else part)
    with replacing(folder / "cascade.csv") as temporary:
        # With all digits: a slice may lie at the threshold.
        curve.to_csv(temporary, index=False)
    return curve


def _row(
    judged: Judged, store: SliceStore, config: Config, budget: float, threshold: float
) -> dict[str, float | None]:
    counts = judged.counts(threshold)
    tables = [table(store, counts, config.evaluation.empty) for table in (case_table, slice_table)]
    score = summarise(*tables, config)["dice"]
    confidences, first, fine = judged.slices()
    go_on = confidences <= threshold
    return {
        "budget": budget,
        "confidence": threshold,
        "early": float(1 - go_on.mean()),
        "multiply_adds": float((first.sum() + fine[go_on].sum()) / fine.sum()),
        "dice": score["mean"],
        "low": score["low"],
        "high": score["high"],
    }


def _judge(
    store: SliceStore,
    cases: Sequence[str],
    first: Predictor,
    fine: Predictor,
    config: Config,
    title: str,
) -> Judged:
    """Predict all slices of some cases by both networks."""
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
    costs = _Costs(store)
    return Judged(
        confidences,
        counts,
        finer,
        {case: (costs(first, case), costs(fine, case)) for case in cases},
    )


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
            self.known[key] = multiply_adds(predictor, shape)
        return self.known[key]

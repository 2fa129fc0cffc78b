"""Scores of a finished run: per volume, per slice, per class, with intervals over patients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from medseg_reg.config import Config
from medseg_reg.data.store import CaseRow, SliceStore
from medseg_reg.engine.network import load_run_network
from medseg_reg.engine.precision import choose_accelerator
from medseg_reg.engine.run_directory import RunDirectory, environment
from medseg_reg.errors import MedsegError
from medseg_reg.files import read_json, replacing, sha256_of, write_json
from medseg_reg.inference.pictures import write_curves, write_panels
from medseg_reg.inference.predictor import Predictor
from medseg_reg.metrics import EmptyPolicy, bootstrap_interval, confusion_counts, dice, iou
from medseg_reg.networks.summary import summarize

Part = Literal["test", "val", "train"]


def evaluate(
    run: RunDirectory, part: Part = "test", store_path: Path | None = None
) -> dict[str, Any]:
    """Score a part of a run's split, write tables and pictures, and return the summary.

    The files of the test part lie in the run directory, those of another part below
    `evaluation/<part>/`. Where they are there already, made from the same weights, they are
    left as they are.

    Args:
        run: a finished run.
        part: the part of the split.
        store_path: the slice store, where it has moved since the training.

    Raises:
        MedsegError: the run is not finished, or its data are missing or have changed.
    """
    config = run.config()
    network = load_run_network(run)
    store = SliceStore(store_path or config.data.store)
    run.require_data(store)
    splits = run.splits(store)
    if splits is None:
        raise MedsegError(f"{run.path / 'splits.json'}: is missing; the run is incomplete.")
    cases = getattr(splits, part)
    out = run.path if part == "test" else run.path / "evaluation" / part
    tables = run.path / "evaluation" if part == "test" else out
    stamp = {
        "weights_sha256": sha256_of(run.weights),
        "splits_hash": splits.hash,
        "part": part,
        "empty_policy": config.evaluation.empty,
    }
    done = out / "summary.json"
    if done.exists() and (summary := read_json(done)).items() >= stamp.items():
        return dict(summary)
    facts = run.data_facts()
    shape = (1, facts.channels, *(config.data.image.size or store.row(cases[0]).shape[1:3]))
    predictor = Predictor(
        network,
        config.data.image,
        facts.channels,
        config.evaluation.batch_size,
        choose_accelerator(config.training.accelerator),
    )
    counts = count_cases(store, cases, predictor, f"evaluate {part}", config.training.progress)
    per_case = case_table(store, counts, config.evaluation.empty)
    per_slice = slice_table(store, counts, config.evaluation.empty)
    invalid = predictor.invalid_because
    notes = [*facts.notes, *([invalid] if invalid else [])]
    summary = {
        **stamp,
        "data": facts.name,
        "notes": notes,
        "valid_for_reporting": not invalid,
        "cases": list(cases),
        "network": {"name": config.network.name, **summarize(network, shape).numbers()},
        **summarise(per_case, per_slice, config),
        "environment": environment(),
    }
    _write_csv(per_case, tables / "per_case.csv")
    _write_csv(per_slice, tables / "per_slice.csv")
    write_panels(store, predictor, per_case, out / "panels.png", notes)
    write_curves(run.path / "metrics.csv", run.path / "curves.png", notes)
    # Last, because its presence says that the others are there.
    write_json(done, summary)
    return summary


def count_cases(
    store: SliceStore, cases: Sequence[str], predictor: Predictor, title: str, progress: bool = True
) -> dict[str, torch.Tensor]:
    """Predict cases, and return the counts of their slices; `title` stands at the bar."""
    counts = {}
    for case in tqdm(cases, desc=title, unit="case", disable=not progress):
        predicted = predictor.labels(store.image(case), case, store.mask(case))
        try:
            counts[case] = count_slices(predicted, store.mask(case), len(store.classes))
        except ValueError as error:
            raise MedsegError(
                f"{store.path / 'masks' / case}.npy: {error}. The file was changed; convert the "
                "data again."
            ) from None
    return counts


def count_slices(predicted: np.ndarray, truth: np.ndarray, classes: int) -> torch.Tensor:
    """Return the counts of each slice, int64 (S, classes, 3)."""
    return confusion_counts(torch.from_numpy(predicted), torch.from_numpy(truth.copy()), classes)


def case_table(
    store: SliceStore, counts: dict[str, torch.Tensor], empty: EmptyPolicy
) -> pd.DataFrame:
    """Return one row a case and class: scores of the whole volume, and volumes."""
    rows = []
    for case, slices in counts.items():
        row, total = store.row(case), slices.sum(dim=0)
        scores, overlaps = dice(total, empty), iou(total, empty)
        for index, name in list(enumerate(store.classes))[1:]:
            tp, fp, fn = (int(n) for n in total[index])
            rows.append(
                {
                    "case": case,
                    "group": row.group,
                    "class": name,
                    "slices": row.slices,
                    "dice": float(scores[index]),
                    "iou": float(overlaps[index]),
                    "tp": tp,
                    "fp": fp,
                    "fn": fn,
                    "truth_ml": _millilitres(row, tp + fn),
                    "predicted_ml": _millilitres(row, tp + fp),
                }
            )
    return pd.DataFrame(rows)


def slice_table(
    store: SliceStore, counts: dict[str, torch.Tensor], empty: EmptyPolicy
) -> pd.DataFrame:
    """Return one row a slice and class; `empty` says which sides have no pixel of the class."""
    frames = []
    for case, slices in counts.items():
        scores, overlaps = dice(slices, empty).numpy(), iou(slices, empty).numpy()
        values = slices.numpy()
        for index, name in list(enumerate(store.classes))[1:]:
            tp, fp, fn = values[:, index].T
            states = np.select(
                [(tp + fp + fn) == 0, (tp + fn) == 0, (tp + fp) == 0],
                ["both", "truth", "prediction"],
                "neither",
            )
            frames.append(
                pd.DataFrame(
                    {
                        "case": case,
                        "slice": range(len(values)),
                        "class": name,
                        "dice": scores[:, index],
                        "iou": overlaps[:, index],
                        "tp": tp,
                        "fp": fp,
                        "fn": fn,
                        "empty": states,
                    }
                )
            )
    return pd.concat(frames, ignore_index=True)


def summarise(per_case: pd.DataFrame, per_slice: pd.DataFrame, config: Config) -> dict[str, Any]:
    """Return means and bootstrap intervals over patients, and the account of empty slices."""
    spec = config.evaluation

    def interval(values: pd.Series) -> dict[str, Any]:
        result = bootstrap_interval(values.to_numpy(), spec.confidence, spec.resamples, seed=0)
        return {key: _json_number(value) for key, value in result._asdict().items()}

    classes = {}
    for name, rows in per_case.groupby("class", sort=False):
        slices = per_slice[per_slice["class"] == name]
        filled = slices[slices["empty"].isin(["neither", "prediction"])]
        groups = rows.groupby("group", sort=False)[["dice", "iou"]].mean()
        classes[str(name)] = {
            "volume": {"dice": interval(groups["dice"]), "iou": interval(groups["iou"])},
            "slice": {
                "dice": _json_number(slices["dice"].mean()),
                "iou": _json_number(slices["iou"].mean()),
                "slices": len(slices),
                "empty_in_both": int((slices["empty"] == "both").sum()),
                "empty_in_truth_alone": int((slices["empty"] == "truth").sum()),
                "empty_in_prediction_alone": int((slices["empty"] == "prediction").sum()),
                "dice_where_truth_is_filled": _json_number(filled["dice"].mean()),
            },
        }
    means = per_case.groupby(["group", "class"], sort=False)[["dice", "iou"]].mean()
    over = means.groupby("group", sort=False).mean()
    return {
        "interval": f"{spec.confidence:.0%} bootstrap over patients, {spec.resamples} resamples",
        "dice": interval(over["dice"]),
        "iou": interval(over["iou"]),
        "classes": classes,
    }


def headline(run: RunDirectory, summary: dict[str, Any]) -> str:
    """Return the lines that end a command: interval, pictures, run directory, DICE."""
    score, overlap, part = summary["dice"], summary["iou"], summary["part"]
    lines = [f"note: {note}" for note in summary["notes"]]
    if score["mean"] is None:
        lines.append(f"{part}: no case could be scored; each class is empty in all of them")
    else:
        shown = "no interval below 3 patients"
        if score["low"] is not None:
            shown = f"{score['low']:.3f} to {score['high']:.3f}"
        lines.append(
            f"{part}: {score['n']} patients or videos, mean volume DICE {score['mean']:.4f} "
            f"({shown}), IoU {overlap['mean']:.4f}"
        )
    value = "unknown" if score["mean"] is None else f"{score['mean']:.2f}"
    # Summaries from before there were such layers do not say it.
    if not summary.get("valid_for_reporting", True):
        value += " (INVALID FOR REPORTING)"
    return "\n".join([*lines, f"run {run.path}", f"{part} DICE {value}"])


def _millilitres(row: CaseRow, voxels: int) -> float | None:
    if row.geometry is None:
        return None
    return round(voxels * math.prod(row.geometry.spacing) / 1000, 4)


def _json_number(value: Any) -> Any:
    if isinstance(value, float | np.floating):
        return None if not math.isfinite(value) else float(value)
    return value


def _write_csv(table: pd.DataFrame, path: Path) -> None:
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6f")

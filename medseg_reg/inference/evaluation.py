"""Scores of a finished run: per volume, per slice, per class, with intervals over patients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from medseg_reg.config import Config, EvaluationSpec
from medseg_reg.data.store import CaseRow, SliceStore
from medseg_reg.engine.network import load_run_network
from medseg_reg.engine.precision import choose_accelerator
from medseg_reg.engine.run_directory import RunDirectory, environment
from medseg_reg.errors import MedsegError
from medseg_reg.files import read_json, sha256_of, write_json
from medseg_reg.inference.case_scores import (
    CALIBRATION,
    SURFACE,
    calibration_scores,
    distance_unit,
    predict_and_calibrate,
    score_settings,
    surface_scores,
)
from medseg_reg.inference.pictures import write_curves, write_panels
from medseg_reg.inference.predictor import Predictor
from medseg_reg.inference.tables import json_number, write_csv
from medseg_reg.metrics import (
    EmptyPolicy,
    bootstrap_interval,
    confusion_counts,
    dice,
    iou,
    precision,
    recall,
    volume_difference,
)
from medseg_reg.networks.summary import summarize

Part = Literal["test", "val", "train"]

# Scores of a case that are averaged over patients; those of a table that lacks one are left out.
SCORES = (
    *("dice", "iou", "precision", "recall", "volume_difference", "volume_difference_ml"),
    *SURFACE,
    *CALIBRATION,
)

# What stands in the column `empty` where every pixel is ignored, so that no side is known.
UNKNOWN = "ignored"

# Scores of a case beyond its counts: for each class, the background first, names and values.
More = dict[str, list[dict[str, float]]]


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
    store, splits = run.data(store_path or config.data.store)
    cases = getattr(splits, part)
    out = run.path if part == "test" else run.path / "evaluation" / part
    tables = run.path / "evaluation" if part == "test" else out
    settings = score_settings(config.evaluation, store, cases)
    stamp = {
        **{"weights_sha256": sha256_of(run.weights), "splits_hash": splits.hash, "part": part},
        **{"empty_policy": config.evaluation.empty, **settings},
    }
    done = out / "summary.json"
    if done.exists() and (summary := read_json(done)).items() >= stamp.items():
        return dict(summary)
    facts = run.data_facts()
    shape = (1, facts.channels, *(config.data.image.size or store.row(cases[0]).shape[1:3]))
    predictor = run_predictor(run, network)
    counts, more = score_cases(
        store, cases, predictor, config.evaluation, f"evaluate {part}", config.training.progress
    )
    per_case = case_table(store, counts, config.evaluation.empty, more)
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
        "training": run.chosen(),
        "learned_from": run.learned_from(),
        "environment": environment(),
    }
    write_csv(per_case, tables / "per_case.csv")
    write_csv(per_slice, tables / "per_slice.csv")
    write_panels(store, predictor, per_case, out / "panels.png", notes)
    write_curves(run.path / "metrics.csv", run.path / "curves.png", notes)
    # Last, because its presence says that the others are there.
    write_json(done, summary)
    return summary


def run_predictor(run: RunDirectory, network: nn.Module) -> Predictor:
    """Return what predicts by a network of a run as its evaluation does."""
    config = run.config()
    return Predictor(
        network,
        config.data.image,
        run.data_facts().channels,
        config.evaluation.batch_size,
        choose_accelerator(config.training.accelerator),
    )


def count_cases(
    store: SliceStore, cases: Sequence[str], predictor: Predictor, title: str, progress: bool = True
) -> dict[str, torch.Tensor]:
    """Predict cases, and return the counts of their slices; `title` stands at the bar."""
    return score_cases(store, cases, predictor, EvaluationSpec(metrics=()), title, progress)[0]


def score_cases(
    store: SliceStore,
    cases: Sequence[str],
    predictor: Predictor,
    spec: EvaluationSpec,
    title: str,
    progress: bool = True,
) -> tuple[dict[str, torch.Tensor], More]:
    """Predict cases, and return the counts of their slices and the scores asked for besides.

    Args:
        store: the slice store.
        cases: names of cases.
        predictor: the network.
        spec: says which scores are asked for.
        title: stands at the progress bar.
        progress: whether there is one.

    Raises:
        MedsegError: a mask was changed, or a case cannot be predicted.
    """
    counts: dict[str, torch.Tensor] = {}
    more: More = {}
    classes, unit = len(store.classes), distance_unit(store, cases)
    ignored = store.ignore_label
    for case in tqdm(cases, desc=title, unit="case", disable=not progress):
        images, truth = store.image(case), store.mask(case)
        if "calibration" in spec.metrics:
            predicted, bins = predict_and_calibrate(
                predictor, images, case, truth, spec.bins, ignored
            )
            more[case] = calibration_scores(bins)
        else:
            predicted = predictor.labels(images, case, truth)
        try:
            counts[case] = count_slices(predicted, truth, classes, ignored)
        except ValueError as error:
            raise MedsegError(
                f"{store.path / 'masks' / case}.npy: {error}. The file was changed; convert the "
                "data again."
            ) from None
        if "surface" in spec.metrics:
            row = store.row(case)
            found = surface_scores(predicted, truth, classes, row, spec, unit, ignored)
            known = more.get(case, [{}] * classes)
            more[case] = [{**one, **other} for one, other in zip(found, known, strict=True)]
    return counts, more


def count_slices(
    predicted: np.ndarray, truth: np.ndarray, classes: int, ignored: int | None = None
) -> torch.Tensor:
    """Return the counts of each slice, int64 (S, classes, 3); ignored pixels are in none."""
    labels = torch.from_numpy(truth.copy())
    return confusion_counts(torch.from_numpy(predicted), labels, classes, ignored)


def case_table(
    store: SliceStore,
    counts: dict[str, torch.Tensor],
    empty: EmptyPolicy,
    more: More | None = None,
) -> pd.DataFrame:
    """Return one row a case and class: scores of the whole volume, and volumes.

    A case of which every pixel is ignored has no scores.

    Args:
        store: the slice store.
        counts: of the slices of each case.
        empty: the policy for empty classes.
        more: scores besides, as from `score_cases`.
    """
    rows = []
    for case, slices in counts.items():
        row, total = store.row(case), slices.sum(dim=0)
        known = bool(total.any())
        policy = empty if known else "nan"
        scores, overlaps = dice(total, policy), iou(total, policy)
        precisions, recalls = precision(total, policy), recall(total, policy)
        relative = volume_difference(total, policy)
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
                    "precision": float(precisions[index]),
                    "recall": float(recalls[index]),
                    "volume_difference": float(relative[index]),
                    "volume_difference_ml": _millilitres(row, fp - fn),
                    "empty": str(_empty_sides(*total[index].numpy())) if known else UNKNOWN,
                    **(more[case][index] if more else {}),
                }
            )
    return pd.DataFrame(rows)


def slice_table(
    store: SliceStore, counts: dict[str, torch.Tensor], empty: EmptyPolicy
) -> pd.DataFrame:
    """Return one row a slice and class; `empty` says which sides have no pixel of the class.

    A slice of which every pixel is ignored has no scores.
    """
    frames = []
    for case, slices in counts.items():
        scores, overlaps = dice(slices, empty).numpy(), iou(slices, empty).numpy()
        values = slices.numpy()
        known = values.any(axis=(1, 2))
        scores[~known] = overlaps[~known] = np.nan
        for index, name in list(enumerate(store.classes))[1:]:
            tp, fp, fn = values[:, index].T
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
                        "empty": np.where(known, _empty_sides(tp, fp, fn), UNKNOWN),
                    }
                )
            )
    return pd.concat(frames, ignore_index=True)


def summarise(per_case: pd.DataFrame, per_slice: pd.DataFrame, config: Config) -> dict[str, Any]:
    """Return means and bootstrap intervals over patients, and the account of what is empty."""
    spec = config.evaluation
    # Without a spacing there are no millilitres.
    known = [name for name in SCORES if name in per_case and per_case[name].notna().any()]
    scores = ["dice", "iou", *(name for name in known if name not in ("dice", "iou"))]
    per_case = per_case.astype(dict.fromkeys(scores, float))

    def intervals(values: pd.DataFrame) -> dict[str, Any]:
        found = {}
        for name in scores:
            numbers = values[name].to_numpy()
            result = bootstrap_interval(numbers, spec.confidence, spec.resamples, seed=0)
            found[name] = {key: json_number(value) for key, value in result._asdict().items()}
        return found

    classes = {}
    for name, rows in per_case.groupby("class", sort=False):
        slices = per_slice[per_slice["class"] == name]
        filled = slices[slices["empty"].isin(["neither", "prediction"])]
        classes[str(name)] = {
            "volume": intervals(rows.groupby("group", sort=False)[scores].mean()),
            "cases": {"cases": len(rows), **_empty_account(rows)},
            "slice": {
                "dice": json_number(slices["dice"].mean()),
                "iou": json_number(slices["iou"].mean()),
                "slices": len(slices),
                **_empty_account(slices),
                "dice_where_truth_is_filled": json_number(filled["dice"].mean()),
            },
        }
    means = per_case.groupby(["group", "class"], sort=False)[scores].mean()
    over = intervals(means.groupby("group", sort=False).mean())
    return {
        "interval": f"{spec.confidence:.0%} bootstrap over patients, {spec.resamples} resamples",
        "dice": over.pop("dice"),
        "iou": over.pop("iou"),
        "scores": over,
        "classes": classes,
    }


def _empty_sides(tp: Any, fp: Any, fn: Any) -> Any:
    """Name the sides that have no pixel: both, truth, prediction or neither."""
    return np.select(
        [(tp + fp + fn) == 0, (tp + fn) == 0, (tp + fp) == 0],
        ["both", "truth", "prediction"],
        "neither",
    )


def _empty_account(rows: pd.DataFrame) -> dict[str, int]:
    """Count the rows that are empty in both, in truth alone and in prediction alone."""
    names = {"both": "both", "truth": "truth_alone", "prediction": "prediction_alone"}
    return {f"empty_in_{name}": int((rows["empty"] == side).sum()) for side, name in names.items()}


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
    if line := _surface_line(summary):
        lines.append(f"{part}: {line}")
    value = "unknown" if score["mean"] is None else f"{score['mean']:.2f}"
    # Summaries from before there were such layers do not say it.
    if not summary.get("valid_for_reporting", True):
        value += " (INVALID FOR REPORTING)"
    return "\n".join([*lines, f"run {run.path}", f"{part} DICE {value}"])


def _surface_line(summary: dict[str, Any]) -> str:
    scores, settings = summary.get("scores", {}), summary.get("surface")
    means = [scores.get(name, {}).get("mean") for name in SURFACE]
    if settings is None or any(mean is None for mean in means):
        return ""
    unit = settings["unit"]
    return (
        f"HD95 {means[0]:.2f} {unit}, ASSD {means[1]:.2f} {unit}, surface DICE at "
        f"{settings['tolerance']:g} {unit} {means[2]:.4f}"
    )


def _millilitres(row: CaseRow, voxels: int) -> float | None:
    if row.geometry is None:
        return None
    return round(voxels * math.prod(row.geometry.spacing) / 1000, 4)

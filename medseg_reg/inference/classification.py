"""Scores of a finished classifier of slices: over all slices, and per patient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader

from medseg_reg.config_classification import ClassificationConfig
from medseg_reg.data.dataset import SliceDataset
from medseg_reg.data.splits import Splits
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.classification import (
    ClassificationDirectory,
    load_run_classifier,
    presence_table,
)
from medseg_reg.engine.precision import choose_accelerator
from medseg_reg.engine.run_directory import environment
from medseg_reg.files import read_json, sha256_of, write_json
from medseg_reg.inference.tables import json_number, write_csv
from medseg_reg.metrics import (
    auroc,
    average_precision,
    bootstrap_interval,
    sensitivity_specificity,
    threshold_at,
)

SCORES = ("auroc", "average_precision", "sensitivity", "specificity")


def evaluate_classifier(
    run: ClassificationDirectory, store_path: Path | None = None
) -> dict[str, Any]:
    """Score the test part of a run's split, write tables, and return the summary.

    The threshold of each class comes from the validation part. Without a test part the validation
    part is scored too, and the summary says so. Where the files are there already, made from the
    same weights, they are left as they are.

    Args:
        run: a finished run.
        store_path: the slice store, where it has moved since the training.

    Raises:
        MedsegError: the run is not finished, or its data are missing or have changed.
    """
    config: Any = run.config()
    network = load_run_classifier(run)
    store, splits = run.data(store_path or config.data.store)
    done = run.path / "summary.json"
    stamp = {"weights_sha256": sha256_of(run.weights), "splits_hash": splits.hash}
    if done.exists() and (summary := read_json(done)).items() >= stamp.items():
        return dict(summary)
    table = score_parts(network, store, splits, config)
    summary = {**stamp, **judge(table, config), "data": run.data_facts().name}
    summary |= {"training": run.chosen(), "environment": environment()}
    write_csv(table, run.path / "evaluation" / "per_slice.csv")
    write_csv(
        patient_table(table, thresholds(table, config)), run.path / "evaluation" / "per_patient.csv"
    )
    write_json(done, summary)
    return summary


def score_parts(
    network: nn.Module, store: SliceStore, splits: Splits, config: ClassificationConfig
) -> pd.DataFrame:
    """Return the rows of `score_slices` for validation and test, with the column `part`."""
    frames = []
    for part in ("val", "test"):
        if cases := getattr(splits, part):
            data = SliceDataset(store, cases, config.data.image)
            frames.append(score_slices(network, data, config).assign(part=part))
    return pd.concat(frames, ignore_index=True)


@torch.no_grad()
def score_slices(
    network: nn.Module, data: SliceDataset, config: ClassificationConfig
) -> pd.DataFrame:
    """Return one row a slice and class: case, patient, slice, truth (1, 0 or NaN) and score.

    The score is the sigmoid of the logit. Where classes were balanced in the training it is no
    probability: it only orders slices.
    """
    device = torch.device(choose_accelerator(config.training.accelerator))
    network.to(device).eval()
    loader = DataLoader(data, config.evaluation.batch_size)
    logits = torch.cat([network(batch["image"].to(device)).float().cpu() for batch in loader])
    truth, scores = presence_table(data, config.presence.pixels), logits.sigmoid()
    names = [(data.cases[case], number) for case, number in data.items]
    frames = [
        pd.DataFrame(
            {
                "case": [case for case, _ in names],
                "patient": [data.store.row(case).group for case, _ in names],
                "slice": [number for _, number in names],
                "class": label,
                "truth": truth[:, index].numpy(),
                "score": scores[:, index].double().numpy(),
            }
        )
        for index, label in enumerate(data.store.classes[1:])
    ]
    return pd.concat(frames, ignore_index=True)


def thresholds(table: pd.DataFrame, config: ClassificationConfig) -> dict[str, float]:
    """Return for each class the highest threshold with the sensitivity asked for in validation."""
    wanted = config.presence.sensitivity
    val = table[table["part"] == "val"]
    return {
        str(name): threshold_at(rows["score"].to_numpy(), rows["truth"].to_numpy(), wanted)
        for name, rows in val.groupby("class", sort=False)
    }


def judged_part(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the test part, or of validation where there is none."""
    part = "test" if (table["part"] == "test").any() else "val"
    return table[table["part"] == part]


def patient_table(table: pd.DataFrame, limits: dict[str, float]) -> pd.DataFrame:
    """Return one row a patient and class: slices, those with the class, and scores.

    A score is NaN where a patient has one kind of slices alone.
    """
    rows = []
    for (patient, name), found in judged_part(table).groupby(["patient", "class"], sort=False):
        known = found[found["truth"].notna()]
        rows.append(
            {
                "patient": patient,
                "class": name,
                "slices": len(known),
                "present": int(known["truth"].sum()),
                **_scores(known, limits[str(name)]),
            }
        )
    return pd.DataFrame(rows)


def judge(table: pd.DataFrame, config: ClassificationConfig) -> dict[str, Any]:
    """Return for each class its threshold, the scores over all slices, and over patients."""
    spec, limits = config.evaluation, thresholds(table, config)
    part = judged_part(table)
    patients = patient_table(table, limits)
    classes = {}
    for name, rows in part.groupby("class", sort=False):
        known, own = rows[rows["truth"].notna()], patients[patients["class"] == name]
        over = {}
        for score in SCORES:
            found = bootstrap_interval(own[score].to_numpy(), spec.confidence, spec.resamples)
            over[score] = {key: json_number(value) for key, value in found._asdict().items()}
        classes[str(name)] = {
            "threshold": json_number(limits[str(name)]),
            "slices": len(known),
            "present": int(known["truth"].sum()),
            "unknown": len(rows) - len(known),
            "all_slices": {
                key: json_number(value) for key, value in _scores(known, limits[str(name)]).items()
            },
            "patients": over,
        }
    chosen = str(part["part"].iloc[0])
    note = "" if chosen == "test" else "there is no test part: thresholds are of the same slices"
    return {
        "part": chosen,
        "note": note,
        "interval": f"{spec.confidence:.0%} bootstrap over patients, {spec.resamples} resamples",
        "sensitivity_wanted": config.presence.sensitivity,
        "classes": classes,
    }


def _scores(rows: pd.DataFrame, threshold: float) -> dict[str, float]:
    scores, truth = rows["score"].to_numpy(), rows["truth"].to_numpy()
    rates = sensitivity_specificity(scores, truth, threshold)
    return dict(
        zip(SCORES, (auroc(scores, truth), average_precision(scores, truth), *rates), strict=True)
    )


def headline(run: ClassificationDirectory, summary: dict[str, Any]) -> str:
    """Return the lines that end the command: for each class what was found."""
    part, lines = summary["part"], []
    if summary["note"]:
        lines.append(f"note: {summary['note']}")
    for name, one in summary["classes"].items():
        found = {
            key: "unknown" if v is None else f"{v:.3f}" for key, v in one["all_slices"].items()
        }
        lines.append(
            f"{part}: {name} in {one['present']} of {one['slices']} slices: AUROC "
            f"{found['auroc']}, average precision {found['average_precision']}; at the threshold "
            f"for {summary['sensitivity_wanted']:.0%} in validation: sensitivity "
            f"{found['sensitivity']}, specificity {found['specificity']}"
        )
    return "\n".join([*lines, f"run {run.path}"])

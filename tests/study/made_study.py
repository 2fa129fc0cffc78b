"""A study directory with simulated scores, for tests of what comes after the runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from medseg_reg.config_file import write_yaml
from medseg_reg.study.results import COADAPTATION_COLUMNS
from tests.inference.made_runs import make_run
from tests.stores import make_store

METHODS = {
    "none": [],
    "dropout": [{"name": "dropout", "p": 0.1}],
    "corrdrop": [{"name": "corrdrop_spatial", "p": 0.1}],
    **{f"heuristic_k{k}": [{"name": "heuristic_dropout", "p": 0.1, "k": k}] for k in (1, 2, 4)},
}
EFFECTS = dict(zip(METHODS, (0.0, 0.004, -0.03, 0.02, 0.045, 0.015), strict=True))
SEEDS = 8
GROUPS = 12
DATASETS = ("phantom", "gone")


def make_study(
    path: Path, seeds: int = SEEDS, trained: bool = True, datasets: tuple[str, ...] = DATASETS
) -> Path:
    """Write a study of six methods on two data sets.

    `heuristic_k2` is planted as better by 0.045 DICE, `corrdrop` as worse by 0.03.

    Args:
        path: where.
        seeds: how many.
        trained: whether the first seed's runs on `phantom` have weights and data to predict with.
        datasets: their names.
    """
    rng = np.random.default_rng(0)
    rows, tests = [], {name: [] for name in COADAPTATION_COLUMNS}
    store = make_store(path / "store", GROUPS, size=(40, 64)) if trained else None
    for dataset in datasets:
        patients = rng.normal(0.75, 0.06, GROUPS)
        for method, layers in METHODS.items():
            for seed in range(seeds):
                run = f"runs/{dataset}/unet/{method}/seed{seed}"
                folder = path / run
                if store is not None and dataset == "phantom" and seed == 0:
                    make_run(folder, store, regularization__architecture=layers)
                write_run(folder, dataset, layers, seed)
                scores = patients + EFFECTS[method] + rng.normal(0, 0.015, GROUPS)
                for group, value in enumerate(np.clip(scores, 0, 1)):
                    values = {"dice": value, "iou": value / (2 - value), "hd95": 40 * (1 - value)}
                    names = (dataset, "unet", method, seed, f"split-{dataset}", run)
                    case = f"case_{group:02d}"
                    rows += [(*names, case, case, "blob", m, v) for m, v in values.items()]
                where = (dataset, "unet", method, seed, f"split-{dataset}")
                for name, found in made_measures(method, seed).items():
                    tests[name] += [(*where, *row) for row in found]
    columns = ["dataset", "network", "method", "seed", "split", "run", "case", "group", "class"]
    table = pd.DataFrame(rows, columns=[*columns, "metric", "value"])
    table.to_csv(path / "results.csv", index=False)
    for name, columns in COADAPTATION_COLUMNS.items():
        pd.DataFrame(tests[name], columns=list(columns)).to_csv(path / f"{name}.csv", index=False)
    write_study(path, seeds=seeds)
    return path


def made_measures(method: str, seed: int) -> dict[str, list[tuple[object, ...]]]:
    """Return rows of the tests of co-adaptation of a run.

    The baseline loses 0.15 of DICE without half of its maps, the others 0.075. Maps of the baseline
    are correlated by 0.5, of the others by 0.3; its gap is 0.1, theirs 0.04.
    """
    rng = np.random.default_rng([seed, len(method)])
    plain = method == "none"
    taken = [(rate, draw) for rate in (0.0, 0.25, 0.5) for draw in range(2)]
    fall = 0.3 if plain else 0.15
    train, val = 0.85, (0.75 if plain else 0.81) + 0.004 * rng.standard_normal()
    losses = (2, 0.3, 0.4, 0.1)
    return {
        "coadaptation": [
            ("test", rate, draw, f"case_{group:02d}", 0.8 - rate * fall + 0.01 * rng.random())
            for rate, draw in taken
            for group in range(GROUPS)
        ],
        "channel_correlation": [
            ("test", f"case_{group:02d}", (0.5 if plain else 0.3) + 0.02 * rng.standard_normal())
            for group in range(GROUPS)
        ],
        "train_val_gap": [(train, val, train - val, *losses)],
    }


def write_study(path: Path, **changes: object) -> None:
    content = {
        "name": "made",
        "datasets": {"phantom": {"config": "a.yaml"}, "gone": {"config": "b.yaml"}},
        "networks": {"unet": {}},
        "methods": METHODS,
        "baseline": "none",
        "seeds": SEEDS,
        **changes,
    }
    (path / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def write_run(folder: Path, dataset: str, layers: list[dict[str, object]], seed: int) -> None:
    """Write what a report reads of a run besides its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.yaml").exists():
        content = {"regularization": {"architecture": layers}, "training": {"epochs": 3}}
        (folder / "config.yaml").write_text(write_yaml(content), encoding="utf-8")
    epochs = np.arange(1, 21)
    fall = np.exp(-epochs / (6 + len(str(layers)) / 20)) + 0.01 * np.random.default_rng(
        seed
    ).random(len(epochs))
    table = {"epoch": epochs, "train_loss": 2 * fall, "val_loss": 2.1 * fall}
    pd.DataFrame({**table, "val_dice": 0.8 - 0.7 * fall}).to_csv(
        folder / "metrics.csv", index=False
    )
    placed = [
        {"place": "encoder.0.between_convs", "path": "encoder.0", "regularizer": one["name"]}
        | {"p": 0.1, "map_size": [4, 32, 32], "measured_rate": 0.098}
        for one in layers
    ]
    versions = {"packages": {"torch": "2.15.0", "monai": "1.6.1"}, "python": "3.11.7", "gpu": None}
    summary = {"notes": [f"{dataset} is made up"], "valid_for_reporting": True}
    summary["network"] = {"parameters": 1234}
    summary["surface"] = {"unit": "px", "tolerance": 2.0, "missing_policy": "diagonal"}
    summary["empty_policy"] = "one"
    for name, content in (
        ("placement.json", placed),
        ("environment.json", versions),
        ("summary.json", summary),
    ):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")

"""Where the numbers of a report come from: runs, placed layers, splits, versions, commands."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pandas as pd

from medseg_reg.study.report.budgets import at, epochs_trained, slices_drawn
from medseg_reg.study.report.drawing import slug
from medseg_reg.study.report.source import Source
from medseg_reg.study.report.tables import (
    NOTHING,
    WHERE,
    Table,
    count,
    from_frame,
    score,
    words,
)
from medseg_reg.study.statistics import group_scores


def runs(source: Source) -> Table:
    """Return one row a run, with its split and its cost."""
    dice = source.results[source.results["metric"] == "dice"]
    means = group_scores(dice, ["run"]).groupby("run", sort=False).mean()
    rows = []
    for one in source.runs.to_dict("records"):
        environment = source.file(one["run"], "environment.json") or {}
        summary = source.file(one["run"], "summary.json") or {}
        network = summary.get("network") or {}
        rows.append(
            {
                **one,
                "dice": means.get(one["run"]),
                "parameters": network.get("parameters", environment.get("parameters")),
                "epochs": at(source.file(one["run"], "config.yaml"), "training.epochs"),
                "trained": epochs_trained(source, one["run"]),
                "drawn": slices_drawn(source, one["run"]),
                "precision": environment.get("precision"),
                "device": environment.get("gpu") or environment.get("processor"),
                "valid": "" if not summary else str(summary.get("valid_for_reporting", True)),
            }
        )
    columns = {
        **WHERE,
        "seed": ("seed", count),
        "dice": ("DICE", score),
        "split": ("split", words),
        "epochs": ("epochs", count),
        "trained": ("epochs trained", count),
        "drawn": ("slices drawn", count),
        "parameters": ("parameters", count),
        "precision": ("precision", words),
        "device": ("device", words),
        "valid": ("valid for reporting", lambda v: {"True": "yes", "False": "NO"}.get(v, NOTHING)),
        "run": ("directory", words),
    }
    frame = source.ordered(pd.DataFrame(rows))
    return from_frame("runs", "All finished runs", frame, columns, "", "method")


def placements(source: Source) -> Table | None:
    """Return what was placed where, and the rates that were measured, of each first run."""
    rows: list[dict[str, Any]] = []
    firsts = source.runs.groupby(["dataset", "network", "method"], sort=False)["run"].first()
    for (dataset, network, method), run in firsts.items():
        for one in source.file(run, "placement.json") or []:
            size = "x".join(str(n) for n in one.get("map_size") or ())
            rows.append(
                {"dataset": dataset, "network": network, "method": method, **one, "map_size": size}
            )
    if not rows:
        return None
    guided = any("attention_dropped" in row for row in rows)
    columns = {
        **WHERE,
        "place": ("place", words),
        "regularizer": ("layer", words),
        "p": ("rate asked for", score),
        "measured_rate": ("rate measured", score),
        **({"attention_dropped": ("attention dropped", score)} if guided else {}),
        "map_size": ("map", words),
        "path": ("module", words),
    }
    note = "Of the first seed. Measured on a few maps before the training."
    return from_frame(
        "placement", "Placed layers", source.ordered(pd.DataFrame(rows)), columns, note, "method"
    )


def splits(source: Source) -> Table:
    """Return the splits of each data set, and how many patients were tested in each."""
    frame = (
        source.results.groupby(["dataset", "split"], sort=False)
        .agg(runs=("run", "nunique"), groups=("group", "nunique"), cases=("case", "nunique"))
        .reset_index()
    )
    columns = {
        "dataset": ("data set", words),
        "split": ("hash of the split", words),
        "runs": ("runs", count),
        "groups": ("patients tested", count),
        "cases": ("cases tested", count),
    }
    note = "Runs with the same hash were trained, validated and tested on the same cases."
    return from_frame("splits", "Splits", frame, columns, note)


def versions(source: Source) -> Table | None:
    """Return the versions that the runs ran with; several where they differ."""
    found: dict[str, dict[str, None]] = {}
    for run in source.runs["run"]:
        environment = source.file(run, "environment.json")
        if not isinstance(environment, dict):
            continue
        packages = environment.get("packages") or {}
        facts = {key: environment.get(key) for key in ("python", "platform", "gpu")}
        for name, value in {**packages, **facts}.items():
            found.setdefault(name, {})[str(value or NOTHING)] = None
    if not found:
        return None
    frame = pd.DataFrame(
        [
            {
                "what": name,
                "version": "; ".join(values),
                "same": "yes" if len(values) == 1 else "NO",
            }
            for name, values in found.items()
        ]
    )
    columns = {
        "what": ("package", words),
        "version": ("version", words),
        "same": ("same in all runs", words),
    }
    return from_frame("versions", "Versions", frame, columns)


def failures(source: Source) -> Table | None:
    """Return the runs that failed, as failures.csv has them."""
    frame = source.failures
    if frame is None or frame.empty:
        return None
    titles = {"dataset": "data set", "error": "what it said", "exit_code": "exit code"}
    columns = {str(key): (titles.get(str(key), str(key)), words) for key in frame}
    caption = "Runs that failed; their scores are in no number of this report"
    return from_frame("failures", caption, frame, columns, "", "method")


def commands(source: Source) -> list[str]:
    """Return the commands that make this study again, beside itself: what is finished stays."""
    file = source.path / "study.yaml"
    again = source.path.parent / f"{source.path.name}_again"
    if not source.path.name:  # the present folder
        again = source.path.resolve().with_name(f"{source.path.resolve().name}_again")
    lines = [
        ("study", "--config", file, f"run={again}"),
        ("study", "--config", file, "--only", "report"),
    ]
    if len(source.runs):
        run = str(source.runs["run"].iloc[0])
        repeated = again.with_name(f"{again.name}_{slug(*Path(run).parts[1:])}")
        config = source.path / run / "config.yaml"
        lines.append(("train", "--config", config, f"run={repeated}"))
        lines.append(("evaluate", "--run", source.path / run))
    return [shlex.join(["python", "-m", f"medseg_reg.{n}", *map(str, r)]) for n, *r in lines]

"""metrics.csv: one row an epoch, numbered from 1."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medseg_reg.files import write_text

# Those of every training with labels; what a run logs besides stands behind them.
SCORES = ("val_loss", "val_dice", "val_iou")


class MetricsTable:
    """The table of a run. Its rows are kept in the checkpoints, the file is a view of them.

    So a run that was killed and resumed has each epoch once.

    Args:
        path: the file.
        scores: of the validation, which have a column in any case.
    """

    def __init__(self, path: Path, scores: Sequence[str] = SCORES) -> None:
        self.path = path
        self.columns = ("epoch", "train_loss", *scores, "lr", "seconds")
        self.rows: list[dict[str, Any]] = []

    def add(self, epoch: int, scores: dict[str, float], seconds: float) -> None:
        """Add an epoch and write the file anew."""
        self.rows = [row for row in self.rows if row["epoch"] < epoch]
        self.rows.append({"epoch": epoch, **scores, "seconds": round(seconds, 3)})
        text = io.StringIO()
        columns = dict.fromkeys([*self.columns, *(key for row in self.rows for key in row)])
        writer = csv.DictWriter(text, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.path, text.getvalue())

    @staticmethod
    def read(path: Path) -> list[dict[str, float]]:
        """Read a table; scores of epochs that were not validated are absent."""
        with path.open(encoding="utf-8", newline="") as file:
            return [
                {key: float(value) for key, value in row.items() if value}
                for row in csv.DictReader(file)
            ]


def kept_epoch(rows: Sequence[dict[str, float]], select: str) -> dict[str, float]:
    """Return the row of the epoch whose weights a finished run keeps.

    Args:
        rows: of the table, one an epoch.
        select: `last`, or `best`: the first epoch with the highest `val_dice`, where one that is
            not a number is below all.

    >>> rows = [{"epoch": 1, "val_dice": 0.5}, {"epoch": 2, "val_dice": 0.7}, {"epoch": 3}]
    >>> kept_epoch(rows, "best")["epoch"], kept_epoch(rows, "last")["epoch"]
    (2, 3)
    """
    validated = [row for row in rows if "val_dice" in row]
    if select == "last" or not validated:
        return rows[-1]
    return max(
        validated, key=lambda row: -math.inf if math.isnan(row["val_dice"]) else row["val_dice"]
    )

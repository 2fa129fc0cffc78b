"""The table of a run says which epoch's weights the run keeps."""

from __future__ import annotations

import math
import random

from medseg_reg.engine.metrics_table import MetricsTable, kept_epoch


def best_by_hand(scores: list[float | None]) -> int:
    """Return the index of the first highest score, as a training that goes on finds it."""
    best, found = -math.inf, -1
    for index, score in enumerate(scores):
        if score is None:
            continue
        score = -math.inf if math.isnan(score) else score
        if score > best or found < 0:
            best, found = score, index
    return found


def test_the_best_epoch_is_the_first_of_the_highest_score(tmp_path):
    rng = random.Random(0)
    for _ in range(300):
        scores = [
            rng.choice([0.1, 0.5, 0.5, 0.9, math.nan, None]) for _ in range(rng.randint(1, 6))
        ]
        rows = [
            {"epoch": n, **({} if score is None else {"val_dice": score})}
            for n, score in enumerate(scores)
        ]
        assert kept_epoch(rows, "last") is rows[-1]
        if any(score is not None for score in scores):
            assert kept_epoch(rows, "best")["epoch"] == best_by_hand(scores)


def test_a_table_that_is_read_back_has_the_scores_as_they_were(tmp_path):
    table = MetricsTable(tmp_path / "metrics.csv")
    scores = [1 / 3, math.nan, 0.1 + 0.2]
    for epoch, score in enumerate(scores, 1):
        table.add(epoch, {"val_dice": score}, 1.0)
    table.add(4, {"train_loss": 0.5}, 1.0)
    rows = MetricsTable.read(table.path)
    assert [repr(row["val_dice"]) for row in rows[:3]] == [repr(score) for score in scores]
    assert "val_dice" not in rows[3]
    assert kept_epoch(rows, "best")["epoch"] == 1

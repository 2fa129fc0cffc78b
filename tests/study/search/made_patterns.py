"""A search for a pattern of AutoDropout, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.training import tiny_config, write_config

LAYER = "regularization.architecture.0"
PATTERNS = {f"{LAYER}.size": [1, 2, [4, 3]], f"{LAYER}.p": [0.1, 0.2, 0.3, 0.4],
            f"{LAYER}.repeat": [None, 2]}  # fmt: skip


def content_of(store: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Return the content of a search for a pattern."""
    folder.mkdir(exist_ok=True)
    base = tiny_config(store, folder / "run")
    base["regularization"]["architecture"] = [{"name": "auto_dropout", "places": "after_norm"}]
    return {
        "name": "patterns",
        "run": str(folder / "search"),
        "config": str(write_config(folder / "base.yaml", base)),
        "parameters": PATTERNS,
        "method": "controller",
        "trials": 6,
        "together": 2,
        "evolution": {"population": 4, "sample": 3},
        **changes,
    }

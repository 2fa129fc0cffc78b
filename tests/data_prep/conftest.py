"""Phantom scans, and what every command promises of its errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.phantom import make_phantom


@pytest.fixture
def phantom(tmp_path: Path) -> Callable[..., Path]:
    """Write a small phantom data set and return its folder."""

    def make(name: str = "phantom", **options) -> Path:
        folder = tmp_path / name
        make_phantom(folder, **{"cases": 2, "size": 48, "slices": 12, "seed": 3, **options})
        return folder

    return make

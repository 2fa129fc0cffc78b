"""How scores are written down: tables as CSV, numbers in JSON."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medseg_reg.files import replacing


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a table with six digits behind the point, whole or not at all."""
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6f")


def json_number(value: Any) -> Any:
    """Return what JSON can hold: a float of Python, None for what is no finite number.

    >>> json_number(np.float32(0.5)), json_number(math.nan), json_number(3)
    (0.5, None, 3)
    """
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value

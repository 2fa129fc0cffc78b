"""What the tests of studies share."""

from __future__ import annotations

from pathlib import Path

import pytest

from medseg_reg.study.report import write_report
from tests.study.made_study import make_study


@pytest.fixture(scope="session")
def made_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study directory with its report; not to be changed."""
    path = make_study(tmp_path_factory.mktemp("study") / "made")
    write_report(path)
    return path

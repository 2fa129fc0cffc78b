"""What the tests of several folders share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# A failed check of the shared contracts shows its values too.
pytest.register_assert_rewrite(
    "tests.networks.contract",
    "tests.networks.foreign_contract",
    "tests.networks.own_contract",
    "tests.regularizers.contract",
)

# Where numba is installed, tests ask for its loops by name; all others test what is always there.
os.environ.setdefault("MEDSEG_REG_NUMBA", "0")

# The tests' networks are tiny: a second thread only waits for the first.
torch.set_num_threads(1)

SHARED_DATA = Path(
    os.environ.get("MEDSEG_REG_DATA")
    or Path(__file__).resolve().parents[1].parent / "shared" / "data"
)


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Give the folder of a real data set by its name, or skip the test where it is absent.

    The folder of all data sets is named by the environment variable MEDSEG_REG_DATA; without
    it, `shared/data` beside the repository is looked at.
    """

    def folder(name: str) -> Path:
        path = SHARED_DATA / name
        if not path.is_dir():
            pytest.skip(f"real data: {path} is absent (set MEDSEG_REG_DATA to its parent)")
        return path

    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run first what forks: after other tests a process may hold threads that a fork harms."""
    items.sort(
        key=lambda item: (
            not item.nodeid.startswith(
                (
                    "tests/test_resume",
                    "tests/networks/test_parallel",
                    "tests/insertion/test_deployment.py::test_two_processes",
                    "tests/networks/test_exchange",
                    "tests/regularizers/test_import",
                    "tests/study/test_running",
                    "tests/study/test_search",
                    "tests/engine/test_run_mixture.py::test_a_killed_run",
                )
            )
        )
    )

"""The guide to new methods works as it stands: its files make a package that keeps the contract."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "new_method.md").read_text("utf-8")


def file_of_the_page(name: str) -> str:
    """Return the block that follows the name of a file."""
    found = re.search(rf"^`{name}`:\n\n```\w+\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None, name
    return found[1]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the files of the page, as pip would, and the copied contract beside the tests."""
    folder = tmp_path_factory.mktemp("line_dropout")
    (folder / "line_dropout.py").write_text(file_of_the_page("line_dropout.py"))
    project = re.search(r"^```toml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert project is not None
    (entry_point,) = re.findall(
        r'^\[project\.entry-points\."medseg_reg\.regularizers"\]\n(\w+) = "([\w.:]+)"$',
        project[1],
        re.MULTILINE,
    )
    info = folder / "line_dropout-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: line-dropout\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(
        "[medseg_reg.regularizers]\n{} = {}\n".format(*entry_point)
    )
    contract = (ROOT / "tests" / "regularizers" / "contract.py").read_text("utf-8")
    (folder / "contract.py").write_text(contract)
    tests = file_of_the_page("test_line_dropout.py")
    theirs = tests.replace("from tests.regularizers.contract import", "from contract import")
    assert theirs != tests
    (folder / "test_line_dropout.py").write_text(theirs)
    return folder


def run(folder: Path, *arguments: str) -> str:
    path = os.pathsep.join([str(folder), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_example_keeps_the_contract(package: Path) -> None:
    out = run(
        package, "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", ".",
        "--doctest-modules", "line_dropout.py", "test_line_dropout.py",
    )  # fmt: skip
    passed = re.search(r"(\d+) passed", out)
    assert passed is not None
    assert int(passed[1]) >= 140, out


def test_the_command_of_the_page_shows_the_installed_layer(package: Path) -> None:
    out = run(package, "medseg_reg.regularizers", "line_dropout")
    assert out.startswith("LineDropout(\n    p: float = 0.1,\n)")
    assert "plugin  line-dropout 0.1" in out
    assert "from line_dropout import LineDropout" in out


def test_the_base_class_names_the_attributes_of_the_page() -> None:
    table = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    from medseg_reg.regularizers import Regularizer

    assert set(table) == {
        "unit", "paper", "needs", "spatial_dims", "stochastic", "default_places", "place_kinds",
        "hides_keys",
    }  # fmt: skip
    assert all(hasattr(Regularizer, name) for name in table)

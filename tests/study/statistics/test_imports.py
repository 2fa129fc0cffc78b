"""The statistics can be used without torch: they import little."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import medseg_reg.study.statistics as statistics


def imported(path: Path) -> set[str]:
    """Return the modules that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {one.name for one in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def test_they_import_what_their_docstring_says():
    names = {name for path in Path(statistics.__file__).parent.glob("*.py")
             for name in imported(path)}  # fmt: skip
    others = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"medseg_reg"}
    assert others == {"numpy", "pandas", "scipy"}
    own = {name for name in names if name.startswith("medseg_reg")}
    inside = {name for name in own if name.startswith(statistics.__name__)}
    assert own - inside == {"medseg_reg.errors"}
    text = " ".join((statistics.__doc__ or "").split())
    assert "imports numpy, pandas and scipy alone, and of this one `medseg_reg.errors`" in text

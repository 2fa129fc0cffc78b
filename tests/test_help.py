"""`--help` answers at once: no command loads what it does not need to parse its arguments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = (
    "benchmarks",
    "medseg_reg.train",
    "medseg_reg.pretrain",
    "medseg_reg.classify",
    "medseg_reg.slim",
    "medseg_reg.evaluate",
    "medseg_reg.predict",
    "medseg_reg.export",
    "medseg_reg.summary",
    "medseg_reg.width",
    "medseg_reg.cascade",
    "medseg_reg.data.verify",
    "data_prep.bagls",
    "data_prep.image_folder",
    "data_prep.nifti",
    "data_prep.pancreas_ct",
    "data_prep.phantom",
)
HEAVY = {
    "albumentations",
    "lightning",
    "monai",
    "onnx",
    "pandas",
    "pytorch_lightning",
    "seaborn",
    "segmentation_models_pytorch",
    "tensorboard",
    "timm",
    "torch",
    "torchvision",
}
PROGRAM = """
import runpy, sys
sys.argv = [{module!r}, "--help"]
try:
    runpy.run_module({module!r}, run_name="__main__")
except SystemExit as end:
    assert not end.code
print("MODULES", *sys.modules)
"""


def loaded_by(program: str) -> tuple[str, set[str]]:
    """Return what a program printed, and the modules it had at its end."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    said, modules = done.stdout.rsplit("MODULES", 1)
    return said, set(modules.split())


@pytest.mark.parametrize("module", COMMANDS)
def test_help_loads_no_framework(module):
    said, modules = loaded_by(PROGRAM.format(module=module))
    assert said.startswith("usage: python -m " + module)
    assert not HEAVY & modules


def test_the_package_itself_loads_nothing():
    _, modules = loaded_by("import sys, medseg_reg; print('MODULES', *sys.modules)")
    assert not {name for name in modules if name.startswith("medseg_reg.")}
    assert not (HEAVY | {"numpy", "pydantic", "matplotlib"}) & modules


def test_the_configuration_command_says_how_it_is_used(capsys):
    from medseg_reg.config import main

    main(["--help"])
    assert capsys.readouterr().out.startswith("usage: python -m medseg_reg.config")

"""Importing the regularizers is as cheap as importing torch."""

import statistics
import subprocess
import sys
import time

import pytest


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_no_framework_is_loaded() -> None:
    loaded = run("import sys, medseg_reg.regularizers; print(*sys.modules)").split()
    torchs_own = run("import sys, torch; print(*sys.modules)").split()
    assert "torch" in loaded
    heavy = (
        "monai",
        "lightning",
        "pytorch_lightning",
        "torchvision",
        "torch._dynamo",
        "torch._inductor",
        "scipy",
        "pandas",
        "pydantic",
        "segmentation_models_pytorch",
    )
    assert not set(heavy) & (set(loaded) - set(torchs_own))
    own = {name for name in loaded if name.startswith("medseg_reg.")}
    assert all(name.startswith("medseg_reg.regularizers") for name in own)


@pytest.mark.slow
def test_the_import_takes_at_most_a_tenth_longer_than_torchs() -> None:
    times: dict[str, list[float]] = {"torch": [], "medseg_reg.regularizers": []}
    for _ in range(4):  # alternating, so that other load falls on both
        for module, seconds in times.items():
            start = time.perf_counter()
            run(f"import {module}")
            seconds.append(time.perf_counter() - start)
    torch, ours = times.values()
    # either statistic alone may be spoilt by other load; both are not
    assert min(ours) <= 1.1 * min(torch) or statistics.median(ours) <= 1.1 * statistics.median(
        torch
    ), times

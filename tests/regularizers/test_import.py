"""Importing the regularizers is as cheap as importing torch."""

import subprocess
import sys
import textwrap

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
        "triton",
        "numba",
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
    # Processor time in one process, after torch: what torch itself takes, and how busy the
    # machine is, then cannot hide the difference.
    code = """
        from time import process_time
        start = process_time()
        import torch
        middle = process_time()
        import medseg_reg.regularizers
        print((process_time() - middle) / (middle - start))
    """
    shares = [float(run(textwrap.dedent(code))) for _ in range(4)]
    assert min(shares) <= 0.1, shares

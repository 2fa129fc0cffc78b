"""What a run computes on, and in which number format."""

from __future__ import annotations

from typing import Literal

import torch

from medseg_reg.errors import MedsegError

LightningPrecision = Literal["32-true", "bf16-mixed", "16-mixed"]


def choose_precision(wanted: str, accelerator: str) -> LightningPrecision:
    """Return Lightning's name of a precision; `auto` takes bfloat16 where it is fast.

    A processor with AMX or AVX512-BF16 trains in bfloat16 at about twice the speed of float32;
    one without them emulates it and is slower. Losses, scores and weights stay float32.

    Args:
        wanted: `auto`, `32`, `bf16` or `16`.
        accelerator: `cpu`, `cuda` or `mps`.

    Raises:
        MedsegError: float16 on a CPU, where it has no kernels.
    """
    if wanted == "16" and accelerator == "cpu":
        raise MedsegError(
            "training.precision '16': float16 does not work on a CPU. Use 'auto', 'bf16' or '32'."
        )
    if wanted == "auto":
        fast = accelerator == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        if accelerator == "cpu":
            fast = fast_bfloat16_cpu()
        wanted = "bf16" if fast else ("16" if accelerator == "cuda" else "32")
    names: dict[str, LightningPrecision] = {
        "32": "32-true",
        "bf16": "bf16-mixed",
        "16": "16-mixed",
    }
    return names[wanted]


def choose_accelerator(wanted: str) -> str:
    """Return `cuda`, `mps` or `cpu`; `auto` takes the first of them that there is.

    Raises:
        MedsegError: what is wanted is not there.
    """
    if wanted == "gpu":
        wanted = "cuda"
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if wanted == "auto":
        return next(name for name, there in available.items() if there)
    if not available[wanted]:
        raise MedsegError(
            f"training.accelerator '{wanted}': this machine has none that torch can use. "
            "Use 'auto' or 'cpu'."
        )
    return wanted


def fast_bfloat16_cpu() -> bool:
    """Whether this processor has instructions for bfloat16."""
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, probe, bool)()) for probe in probes)

"""Gating Dropout in plain NumPy, sample by sample, for a given coin."""

import numpy as np


def closed(
    gates: np.ndarray, mode: str, machines: int, rank: int | None = None, acts: bool = True
) -> np.ndarray:
    """The gates (B, E, ...) after a step; `rank` is the machine of all samples, if it is one."""
    batch, experts = gates.shape[:2]
    machines = min(machines, experts)
    out = gates.copy()
    if not acts:
        return out
    for sample in range(batch):
        home = sample * machines // batch if rank is None else rank
        for expert in range(experts):
            if mode == "gate_expert_drop" or expert * machines // experts != home:
                out[sample, expert] = 0
    return out

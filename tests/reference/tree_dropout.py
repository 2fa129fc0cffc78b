"""A hierarchical mixture of experts in plain float64 NumPy, node by node."""

from itertools import product

import numpy as np


def answer(leaves: np.ndarray, gates: np.ndarray, node: int = 0) -> np.ndarray:
    """What node says for one sample: leaves (L, K, ...), gates (L - 1, ...), by recursion."""
    inner = len(gates)
    if node >= inner:
        return leaves[node - inner]
    left, right = (answer(leaves, gates, child) for child in (2 * node + 1, 2 * node + 2))
    return gates[node] * left + (1 - gates[node]) * right


def dropped(gates: np.ndarray, coins: np.ndarray, p: float) -> np.ndarray:
    """The gates (B, nodes, ...) after the coins (B, nodes): 0 where a coin is below p."""
    out = gates.astype(np.float64).copy()
    for sample, row in enumerate(coins):
        for node, coin in enumerate(row):
            if coin < p:
                out[sample, node] = 0
    return out


def mean_answer(leaves: np.ndarray, gates: np.ndarray, p: float) -> np.ndarray:
    """The mean answer over every outcome of the coins of all nodes, by its probability."""
    total = np.zeros(leaves.shape[1:])
    for lost in product([False, True], repeat=len(gates)):
        probability = np.prod([p if one else 1 - p for one in lost])
        kept = np.array([0.0 if one else 1.0 for one in lost])
        shaped = kept.reshape(-1, *[1] * (gates.ndim - 1))
        total += probability * answer(leaves, gates * shaped)
    return total

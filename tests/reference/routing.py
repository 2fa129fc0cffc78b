"""Routing of tokens to experts in plain float64 NumPy, one token after the other."""

import numpy as np


def routed(gates: np.ndarray, top: int, capacity: int | None) -> np.ndarray:
    """The weight (T, E) of each expert for each token: 0 where it is not asked."""
    count, experts = gates.shape
    weights = np.zeros((count, experts))
    filled = np.zeros(experts, dtype=int)
    for choice in range(top):
        wanted = []
        for token in range(count):
            ranked = sorted(range(experts), key=lambda e: -gates[token, e])
            total = sum(gates[token, e] for e in ranked[:top]) if top > 1 else 1.0
            expert = ranked[choice]
            if gates[token, expert] > 0:
                wanted.append((-gates[token, expert], token, expert, total))
        for negative, token, expert, total in sorted(wanted):
            if capacity is None or filled[expert] < capacity:
                filled[expert] += 1
                weights[token, expert] = -negative / total
    return weights


def balance(gates: np.ndarray) -> float:
    """E times the sum over experts of (share of first choices) * (mean gate)."""
    experts = gates.shape[1]
    first = gates.argmax(1)
    return experts * sum(float(np.mean(first == e)) * gates[:, e].mean() for e in range(experts))

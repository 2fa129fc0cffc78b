"""AutoDropout's controller in plain float64 NumPy, one token of one sequence at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

Weights = Mapping[str, np.ndarray]


def _normed(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    centred = x - x.mean()
    scaled = centred / np.sqrt((centred**2).mean() + 1e-5)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _linear(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]


def _attended(states: list[np.ndarray], weights: Weights, block: str, heads: int) -> np.ndarray:
    """What the attention adds to the last of the states."""
    normed = [_normed(x, weights, f"{block}.norm1") for x in states]
    matrix, bias = (weights[f"{block}.self_attn.in_proj_{part}"] for part in ("weight", "bias"))
    query, key, value = (np.split(matrix, 3)[i] for i in range(3))
    found, width = [], len(states[0]) // heads
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        b = [part[own] for part in np.split(bias, 3)]
        q = query[own] @ normed[-1] + b[0]
        scores = np.array([q @ (key[own] @ x + b[1]) for x in normed]) / np.sqrt(width)
        shares = np.exp(scores - scores.max())
        shares /= shares.sum()
        found.append(sum(s * (value[own] @ x + b[2]) for s, x in zip(shares, normed, strict=True)))
    return _linear(np.concatenate(found), weights, f"{block}.self_attn.out_proj")


def log_probability(
    tokens: Sequence[int], choices: Sequence[int], weights: Weights, layers: int, heads: int
) -> tuple[float, float]:
    """Return log P of a sequence, and the sum of the entropies of its conditionals."""
    log_p = entropy = 0.0
    levels: list[list[np.ndarray]] = [[] for _ in range(layers + 1)]
    row = 0
    for place, token in enumerate(tokens):
        levels[0].append(weights["embedding.weight"][row] + weights["places"][place])
        for layer in range(layers):
            block = f"blocks.{layer}"
            x = levels[layer][-1] + _attended(levels[layer], weights, block, heads)
            inner = np.maximum(
                _linear(_normed(x, weights, f"{block}.norm2"), weights, f"{block}.linear1"), 0.0
            )
            levels[layer + 1].append(x + _linear(inner, weights, f"{block}.linear2"))
        logits = _linear(_normed(levels[-1][-1], weights, "norm"), weights, f"heads.{place}")
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        log_p += float(np.log(shares[token]))
        entropy -= float((shares * np.log(shares)).sum())
        row = 1 + sum(choices[:place]) + token
    return log_p, entropy

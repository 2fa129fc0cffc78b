"""Bipartite soft matching as the paper tells it, one token after the other, in float64."""

from __future__ import annotations

import numpy as np


def merged(tokens: np.ndarray, count: int, prefix: int = 0) -> list[set[int]]:
    """Return the groups of the tokens (N, C) of one sample; every second patch is in set A."""
    groups = [{i} for i in range(len(tokens))]
    while count > 0:
        means = [np.mean([tokens[i] for i in sorted(group)], 0) for group in groups]
        first, second = range(prefix, len(groups), 2), range(prefix + 1, len(groups), 2)
        best = []
        for a in first:
            found = [
                (means[a] @ means[b] / np.linalg.norm(means[a]) / np.linalg.norm(means[b]), b)
                for b in second
            ]
            best.append((*max(found), a))
        now = min(count, (len(groups) - prefix) // 2)
        for _, b, a in sorted(best, reverse=True)[:now]:
            groups[b] = groups[b] | groups[a]
            groups[a] = set()
        groups = [group for group in groups if group]
        count -= now
    return groups


def attention(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Return softmax(q k^T / sqrt(d)) v of one head."""
    weights = np.exp(query @ key.T / np.sqrt(query.shape[1]))
    return weights / weights.sum(1, keepdims=True) @ value

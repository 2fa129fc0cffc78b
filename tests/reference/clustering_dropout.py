"""The rates of the clustering-based dropout in plain float64 NumPy, one sample at a time."""

import numpy as np


def cluster_means(response: np.ndarray, clusters: int, iterations: int = 10) -> np.ndarray:
    """1-D k-means; starts in the middle of equal parts of the distinct responses."""
    distinct = np.unique(response)
    middle = [(2 * k + 1) * len(distinct) // (2 * clusters) for k in range(clusters)]
    centres = [float(distinct[m]) for m in middle]
    for _ in range(iterations):
        nearest = [min(range(clusters), key=lambda k: abs(r - centres[k])) for r in response]
        for k in range(clusters):
            members = [r for r, n in zip(response, nearest, strict=True) if n == k]
            if members:
                centres[k] = float(np.mean(members))
    return np.array([centres[n] for n in nearest])


def rates(response: np.ndarray, p: float, clusters: int, max_rate: float) -> np.ndarray:
    """q = p w / mean w, w = 1 - min-max of the cluster means, moved towards p under the cap.

    Units without a response have q = 0 and are left out of everything else.
    """
    live = response != 0
    if live.any() and not live.all():
        q = np.zeros(len(response))
        q[live] = rates(response[live], p, clusters, max_rate)
        return q
    mean = cluster_means(response.astype(np.float64), clusters)
    if mean.max() - mean.min() <= 1e-6 * mean.max():
        return np.full(len(mean), p)
    weight = 1 - (mean - mean.min()) / (mean.max() - mean.min())
    q = p * weight / weight.mean()
    cap = max(max_rate, p)
    if q.max() > cap:
        t = (q.max() - cap) / (q.max() - p)
        q = (1 - t) * q + t * p
    return q

"""Scores by sets of pixels and pairs of surface voxels: no counting trick, no torch."""

from __future__ import annotations

import math

import numpy as np


def pixels(labels, label):
    """Return the set of index tuples that carry `label`."""
    return {tuple(int(i) for i in index) for index in np.argwhere(labels == label)}


def counts(prediction, target, label):
    """Return (true positives, false positives, false negatives) of one sample."""
    found, true = pixels(prediction, label), pixels(target, label)
    return len(found & true), len(found - true), len(true - found)


def dice(prediction, target, label, empty=math.nan):
    """Return 2 |P and T| / (|P| + |T|), or `empty` where both sets are."""
    found, true = pixels(prediction, label), pixels(target, label)
    return 2 * len(found & true) / (len(found) + len(true)) if found or true else empty


def iou(prediction, target, label, empty=math.nan):
    """Return |P and T| / |P or T|, or `empty` where both sets are."""
    found, true = pixels(prediction, label), pixels(target, label)
    return len(found & true) / len(found | true) if found or true else empty


def precision(prediction, target, label, empty=math.nan):
    """Return |P and T| / |P|, 0 for an empty P alone, or `empty` where both sets are."""
    found, true = pixels(prediction, label), pixels(target, label)
    return len(found & true) / max(1, len(found)) if found or true else empty


def recall(prediction, target, label, empty=math.nan):
    """Return |P and T| / |T|, 0 for an empty T alone, or `empty` where both sets are."""
    return precision(target, prediction, label, empty)


def volume_difference(prediction, target, label):
    """Return (|P| - |T|) / |T|, NaN for an empty T."""
    found, true = pixels(prediction, label), pixels(target, label)
    return (len(found) - len(true)) / len(true) if true else math.nan


def surface(mask):
    """Return the index tuples of a mask with a face neighbour outside of it."""
    inside = {tuple(int(i) for i in index) for index in np.argwhere(mask)}
    result = []
    for place in sorted(inside):
        for axis, length in enumerate(mask.shape):
            steps = [] if length == 1 else [-1, 1]
            around = [(*place[:axis], place[axis] + s, *place[axis + 1 :]) for s in steps]
            if any(one not in inside for one in around):
                result.append(place)
                break
    return result


def distances(prediction, target, spacing):
    """Return the distances from each surface voxel to the other surface, for both sides."""
    mine, other = surface(prediction), surface(target)

    def nearest(start, goal):
        return [
            min(
                (math.hypot(*((a - b) * s for a, b, s in zip(p, q, spacing, strict=True)))
                 for q in goal),
                default=math.inf,
            )
            for p in start
        ]  # fmt: skip

    return nearest(mine, other), nearest(other, mine)


def percentile(values, q):
    """Return the percentile of values, interpolated linearly between ranks."""
    ordered = sorted(values)
    rank = (len(ordered) - 1) * q / 100
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def calibration(probabilities, target, label, bins):
    """Return the bins (pixels, hits, sum of p) of a class, and its expected calibration error."""
    table = [[0, 0, 0.0] for _ in range(bins)]
    for p, t in zip(np.ravel(probabilities), np.ravel(target), strict=True):
        p = float(p)
        row = table[max(b for b in range(bins) if p * bins >= b)]
        row[0] += 1
        row[1] += int(t == label)
        row[2] += p
    n = sum(row[0] for row in table)
    return table, sum(
        row[0] / n * abs(row[1] / row[0] - row[2] / row[0]) for row in table if row[0]
    )

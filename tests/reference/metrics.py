"""Overlap scores by sets of pixels: no counting trick, no torch."""

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

"""The losses by their formulas, in float64 NumPy: slow, plain, and independent of torch."""

from __future__ import annotations

import itertools

import numpy as np


def one_hot(target, n_classes):
    """Return (B, K, *spatial) float64 masks."""
    return np.stack([target == c for c in range(n_classes)], axis=1).astype(np.float64)


def softmax(logits):
    """Return the softmax over axis 1."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def sigmoid(logits):
    """Return the logistic function."""
    return 1 / (1 + np.exp(-logits))


def cross_entropy(logits, target, weights=None, smoothing=0.0):
    """Return the mean over pixels, divided by the weights of the true labels."""
    n_classes = logits.shape[1]
    weights = np.ones(n_classes) if weights is None else np.asarray(weights, dtype=np.float64)
    probabilities = softmax(logits)
    total, norm = 0.0, 0.0
    for index in np.ndindex(target.shape):
        sample, place = index[0], index[1:]
        true = int(target[index])
        for c in range(n_classes):
            wanted = (1 - smoothing) * (c == true) + smoothing / n_classes
            total -= wanted * weights[c] * np.log(probabilities[(sample, c, *place)])
        norm += weights[true]
    return total / norm


def binary_cross_entropy(logits, target, weights=(1.0, 1.0), smoothing=0.0):
    """Return the mean over pixels for logits (B, 1, *spatial) and targets s/2 and 1 - s/2."""
    p = sigmoid(logits[:, 0])
    wanted = np.where(target == 1, 1 - smoothing / 2, smoothing / 2)
    losses = -weights[1] * wanted * np.log(p) - weights[0] * (1 - wanted) * np.log(1 - p)
    return losses.sum() / np.where(target == 1, weights[1], weights[0]).sum()


def soft_dice(maps, masks, smooth=1e-5):
    """Return the mean over channels of 1 - Dice, sums over the batch and all pixels."""
    losses = []
    for c in range(maps.shape[1]):
        p, t = maps[:, c], masks[:, c]
        losses.append(1 - (2 * (p * t).sum() + smooth) / (p.sum() + t.sum() + smooth))
    return float(np.mean(losses))


def ssim(a, b, window, sigma=1.5, k1=0.01, k2=0.03):
    """Return the SSIM of two images of data range 1, the mean over windows that fit inside."""
    gaussians = [np.exp(-((np.arange(n) - (n - 1) / 2) ** 2) / (2 * sigma**2)) for n in window]
    weight = gaussians[0]
    for gaussian in gaussians[1:]:
        weight = np.multiply.outer(weight, gaussian)
    weight = weight / weight.sum()
    scores = []
    for corner in itertools.product(
        *[range(s - n + 1) for s, n in zip(a.shape, window, strict=True)]
    ):
        place = tuple(slice(c, c + n) for c, n in zip(corner, window, strict=True))
        x, y = a[place], b[place]
        mx, my = (weight * x).sum(), (weight * y).sum()
        vx, vy = (weight * (x - mx) ** 2).sum(), (weight * (y - my) ** 2).sum()
        cov = (weight * (x - mx) * (y - my)).sum()
        luminance = (2 * mx * my + k1**2) / (mx**2 + my**2 + k1**2)
        scores.append(luminance * (2 * cov + k2**2) / (vx + vy + k2**2))
    return float(np.mean(scores))


def ssim_loss(maps, masks, window):
    """Return 1 - SSIM, the mean over samples and channels of (B, C, *spatial)."""
    scores = [
        ssim(a, b, window)
        for p, t in zip(maps, masks, strict=True)
        for a, b in zip(p, t, strict=True)
    ]
    return 1 - float(np.mean(scores))

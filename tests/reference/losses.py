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


def cross_entropy(logits, target, weights=None, smoothing=0.0, ignore=None):
    """Return the mean over pixels, divided by the weights of the true labels."""
    n_classes = logits.shape[1]
    weights = np.ones(n_classes) if weights is None else np.asarray(weights, dtype=np.float64)
    probabilities = softmax(logits)
    total, norm = 0.0, 0.0
    for index in np.ndindex(target.shape):
        sample, place = index[0], index[1:]
        true = int(target[index])
        if true == ignore:
            continue
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


def focal(logits, target, weights=None, gamma=2.0, ignore=None):
    """Return the mean of -(1 - p)^gamma log p, divided by the weights of the true labels."""
    n_classes = logits.shape[1]
    weights = np.ones(n_classes) if weights is None else np.asarray(weights, dtype=np.float64)
    probabilities = softmax(logits)
    total, norm = 0.0, 0.0
    for index in np.ndindex(target.shape):
        true = int(target[index])
        if true == ignore:
            continue
        p = probabilities[(index[0], true, *index[1:])]
        total -= weights[true] * (1 - p) ** gamma * np.log(p)
        norm += weights[true]
    return total / norm


def tversky(maps, masks, alpha, beta, gamma=1.0, counted=None, smooth=1e-5):
    """Return the loss of each channel, sums over the batch and the pixels that count."""
    losses = []
    for c in range(maps.shape[1]):
        p, t = maps[:, c], masks[:, c]
        if counted is not None:
            p, t = p[counted], t[counted]
        hits, false, missed = (p * t).sum(), (p * (1 - t)).sum(), ((1 - p) * t).sum()
        index = (hits + smooth) / (hits + alpha * false + beta * missed + smooth)
        losses.append((1 - index) ** (1 / gamma))
    return np.array(losses)


def signed_distance(mask, counted=None):
    """Return distances to the outline of one mask, from all pairs of pixels."""
    counted = np.ones(mask.shape, bool) if counted is None else counted
    inside = [p for p in np.ndindex(mask.shape) if mask[p] and counted[p]]
    outside = [p for p in np.ndindex(mask.shape) if not mask[p] and counted[p]]
    distances = np.zeros(mask.shape)
    if inside and outside:
        pairs = np.linalg.norm(np.array(inside)[:, None] - np.array(outside)[None], axis=-1)
        distances[tuple(np.array(inside).T)] = 1 - pairs.min(axis=1)
        distances[tuple(np.array(outside).T)] = pairs.min(axis=0)
    return distances


def boundary(maps, masks, counted=None):
    """Return, for each channel, the mean of probability times distance over what counts."""
    counted = np.ones(masks[:, 0].shape, bool) if counted is None else counted
    losses = []
    for c in range(maps.shape[1]):
        products = [
            (p[c] * signed_distance(t[c], v))[v]
            for p, t, v in zip(maps, masks, counted, strict=True)
        ]
        losses.append(np.concatenate(products).mean())
    return np.array(losses)


def soft_dice(maps, masks, smooth=1e-5):
    """Return the mean over channels of 1 - Dice, sums over the batch and all pixels."""
    losses = []
    for c in range(maps.shape[1]):
        p, t = maps[:, c], masks[:, c]
        losses.append(1 - (2 * (p * t).sum() + smooth) / (p.sum() + t.sum() + smooth))
    return float(np.mean(losses))


def windows(a, b, window, counted=None, sigma=1.5, k1=0.01, k2=0.03):
    """Return SSIM and its part without luminance for each window that fits and counts."""
    gaussians = [np.exp(-((np.arange(n) - (n - 1) / 2) ** 2) / (2 * sigma**2)) for n in window]
    weight = gaussians[0]
    for gaussian in gaussians[1:]:
        weight = np.multiply.outer(weight, gaussian)
    weight = weight / weight.sum()
    scores, structures = [], []
    for corner in itertools.product(
        *[range(s - n + 1) for s, n in zip(a.shape, window, strict=True)]
    ):
        place = tuple(slice(c, c + n) for c, n in zip(corner, window, strict=True))
        if counted is not None and not counted[place].all():
            continue
        x, y = a[place], b[place]
        mx, my = (weight * x).sum(), (weight * y).sum()
        vx, vy = (weight * (x - mx) ** 2).sum(), (weight * (y - my) ** 2).sum()
        cov = (weight * (x - mx) * (y - my)).sum()
        luminance = (2 * mx * my + k1**2) / (mx**2 + my**2 + k1**2)
        structures.append((2 * cov + k2**2) / (vx + vy + k2**2))
        scores.append(luminance * structures[-1])
    return scores, structures


def ssim_losses(maps, masks, window, counted=None):
    """Return 1 - SSIM of each channel, the mean over the windows of all samples."""
    losses = []
    for c in range(maps.shape[1]):
        scores = []
        for b in range(len(maps)):
            valid = None if counted is None else counted[b]
            scores += windows(maps[b, c], masks[b, c], window, valid)[0]
        losses.append(1 - np.mean(scores) if scores else 0.0)
    return np.array(losses)


def ssim_loss(maps, masks, window):
    """Return 1 - SSIM, the mean over samples and channels of (B, C, *spatial)."""
    return float(np.mean(ssim_losses(maps, masks, window)))


def halved(image):
    """Return the means of blocks of 2 pixels per axis; an odd last pixel is left out."""
    result = np.zeros([n // 2 for n in image.shape])
    for index in np.ndindex(result.shape):
        result[index] = image[tuple(slice(2 * i, 2 * i + 2) for i in index)].mean()
    return result


def ms_ssim(a, b, exponents, window, counted=None):
    """Return the product over scales of one image, or NaN where no window counts."""
    product = 1.0
    for scale, exponent in enumerate(exponents):
        if scale:
            a, b = halved(a), halved(b)
            counted = None if counted is None else halved(counted.astype(float)) == 1
        scores, structures = windows(a, b, window, counted)
        if scale == 0 and not scores:
            return np.nan
        if scores:
            last = scale == len(exponents) - 1
            similarity = np.mean(scores if last else structures)
            if len(exponents) == 1:
                return similarity
            if similarity < 0.01:
                product *= np.exp(exponent * (np.log(0.01) + (similarity - 0.01) / 0.01))
            else:
                product *= similarity**exponent
    return product


def ms_ssim_losses(maps, masks, exponents, window, counted=None):
    """Return 1 - MS-SSIM of each channel, the mean over samples in which a window counts."""
    losses = []
    for c in range(maps.shape[1]):
        values = [
            ms_ssim(maps[b, c], masks[b, c], exponents, window, None if counted is None else v)
            for b, v in enumerate(maps[:, 0] if counted is None else counted)
        ]
        values = [value for value in values if not np.isnan(value)]
        losses.append(1 - np.mean(values) if values else 0.0)
    return np.array(losses)


def all_terms(logits, target, *, weights=None, region_weights=None, smoothing=0.0, gamma=2.0,
              tversky_parameters=(0.3, 0.7, 1.0), background=False, ignore=None,
              window, exponents):  # fmt: skip
    """Return every term of a mixed loss by its name, for one or several channels."""
    if logits.shape[1] == 1:
        logits, background = np.concatenate([np.zeros_like(logits), logits], axis=1), False
    n_classes = logits.shape[1]
    counted = None if ignore is None else target != ignore
    kept = [c for c in range(n_classes) if c != ignore and (c or background)]
    maps, masks = softmax(logits)[:, kept], one_hot(target, n_classes)[:, kept]
    share = np.ones(n_classes) if region_weights is None else np.asarray(region_weights, float)

    def mean(losses):
        return float(np.average(losses, weights=share[kept]))

    return {
        "ce": cross_entropy(logits, target, weights, smoothing, ignore),
        "focal": focal(logits, target, weights, gamma, ignore),
        "dice": mean(tversky(maps, masks, 0.5, 0.5, counted=counted, smooth=0.5e-5)),
        "iou": mean(tversky(maps, masks, 1, 1, counted=counted)),
        "tversky": mean(tversky(maps, masks, *tversky_parameters, counted=counted)),
        "ssim": mean(ssim_losses(maps, masks, window, counted)),
        "ms_ssim": mean(ms_ssim_losses(maps, masks, exponents, window, counted)),
        "boundary": mean(boundary(maps, masks, counted)),
    }

"""Erosion and Canny edges before the network, as in a method for dental X-ray images.

Majanga and Viriri, Dropout Regularization for Automatic Segmented Dental Images, ACIIDS 2021,
doi 10.1007/978-981-16-1685-3_21: the images are eroded, then their Canny edges are found, then a
network with dropout on its input is trained. The paper publishes neither the kernel nor the
thresholds nor how edges and image are combined, and there is no code. Chosen here: a square
kernel, thresholds given by the user, and edges burnt in at full brightness, so that the image
keeps its shape and type and every network and store takes it as before.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from medseg_reg.errors import MedsegError
from medseg_reg.io.images import luma
from medseg_reg.io.percentiles import percentiles
from medseg_reg.io.pixels import narrowed

Array = np.ndarray[Any, np.dtype[Any]]

EDGE = 255
HU_WINDOW = (-160.0, 240.0)
PERCENTILES = (1, 99)


def preprocess(image: Array, erosion: int | None, canny: tuple[float, float] | None) -> Array:
    """Return the image eroded, with its Canny edges burnt in; the input is left as it is.

    Erosion takes the darkest value in a square of `erosion` x `erosion` pixels (for colour, in
    each channel); what lies beyond the border does not count. Edges are those of the eroded
    image (for colour, of its luma), by Sobel gradients of aperture 3 and |dx| + |dy|; where they
    run, all channels become 255.

    Args:
        image: (H, W) or (H, W, 3), uint8.
        erosion: side of the square in pixels; None or 1 changes nothing.
        canny: the lower and the upper threshold of the hysteresis; None adds no edges.

    Returns:
        The same shape and type.

    Raises:
        MedsegError: `erosion` or `canny` out of range.

    Example:
        >>> square = np.zeros((9, 9), np.uint8)
        >>> square[2:7, 2:7] = 200
        >>> int((preprocess(square, 3, None) > 0).sum())
        9
    """
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise TypeError(f"expected an 8-bit image (H, W) or (H, W, 3), got {image.shape}")
    check_settings(erosion, canny)
    result = image.copy()
    if erosion is not None and erosion > 1:
        result = cv2.erode(result, np.ones((erosion, erosion), np.uint8))
    if canny is not None:
        gray = luma(result) if result.ndim == 3 else result
        result[cv2.Canny(np.ascontiguousarray(gray), *canny) > 0] = EDGE
    return result


def check_settings(erosion: int | None, canny: tuple[float, float] | None) -> None:
    """Refuse settings that make no sense, before any file is read."""
    if erosion is not None and not 1 <= erosion <= 99:
        raise MedsegError(f"--erosion {erosion}: expected the side of a square, 1 to 99 pixels.")
    # Upper bound: the largest |dx| + |dy| of an 8-bit image.
    if canny is not None and not 0 <= canny[0] < canny[1] <= 2040:
        raise MedsegError(
            f"--canny {canny[0]:g} {canny[1]:g}: expected a lower and a higher threshold from 0 to "
            "2040, such as 50 150."
        )


def prepared(
    image: Array, erosion: int | None, canny: tuple[float, float] | None, is_hu: bool
) -> Array:
    """Return pixels in their stored type; with erosion or edges asked for, in 8 bits with these.

    Three channels of 8 bits are a colour picture, whose edges are those of its luma. All other
    channels, such as sequences of MR, are filtered each for itself.

    Args:
        image: (S, H, W) or (S, H, W, C).
        erosion: as of `preprocess`.
        canny: as of `preprocess`.
        is_hu: whether the pixels are HU.
    """
    image = narrowed(image)
    if erosion is None and canny is None:
        return image
    gray = to_8_bits(image, is_hu)
    is_color = image.dtype == np.uint8 and image.ndim == 4 and image.shape[3] == 3
    if gray.ndim == 4 and not is_color:
        parts = [prepared(gray[..., c], erosion, canny, is_hu) for c in range(gray.shape[3])]
        return np.stack(parts, axis=-1)
    return np.stack([preprocess(one, erosion, canny) for one in gray])


def to_8_bits(image: Array, is_hu: bool) -> Array:
    """Scale pixels to 0..255: HU by a window on soft tissue, other data by percentiles."""
    if image.dtype == np.uint8:
        return image
    low, high = HU_WINDOW if is_hu else percentiles(image, PERCENTILES)
    scaled: Array = (image.astype(np.float32) - low) / max(float(high - low), 1e-6)
    return (np.clip(scaled, 0, 1) * 255).round().astype(np.uint8)

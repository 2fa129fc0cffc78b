"""From a stored slice to the network's input, and from its output back to the stored slice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch.nn import functional

from medseg_reg.data.store import SliceStore
from medseg_reg.errors import MedsegError
from medseg_reg.io.percentiles import percentiles

Array = np.ndarray[Any, np.dtype[Any]]
Limits = tuple[float, float]
Side = Annotated[int, Field(ge=8, le=4096)]


class ImageSpec(BaseModel):
    """How a slice becomes the network's input.

    Attributes:
        window: values that become 0 and 1, in the store's unit (HU for CT); values beyond
            are clipped. 8-bit images need none: 0 to 255.
        percentiles: the same by percentiles of each case, for MR and other free units.
        size: rows and columns of the network's input; null keeps the stored size.
        fit: how a slice gets that size. `resize` stretches it, `letterbox` scales it evenly
            and pads, `crop` keeps its resolution and cuts or pads around the middle.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    window: Limits | None = None
    percentiles: Limits | None = None
    size: tuple[Side, Side] | None = None
    fit: Literal["resize", "letterbox", "crop"] = "resize"

    @model_validator(mode="after")
    def _sound(self) -> ImageSpec:
        if self.window is not None and self.percentiles is not None:
            raise ValueError("give window or percentiles, not both")
        for limits in (self.window, self.percentiles):
            if limits is not None and not limits[0] < limits[1]:
                raise ValueError(f"the lower limit {limits[0]} is not below the upper {limits[1]}")
        if self.percentiles and not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ValueError("percentiles lie between 0 and 100")
        return self


def intensity_limits(spec: ImageSpec, store: SliceStore, case: str) -> Limits:
    """Return the values of a case that become 0 and 1.

    Raises:
        MedsegError: neither window nor percentiles are given for data that are not 8-bit.
    """
    return limits_of(spec, store.image(case), f"{store.path}, case {case}")


def limits_of(spec: ImageSpec, image: Any, name: str) -> Limits:
    """Return the values of an image that become 0 and 1.

    Args:
        spec: how slices become the network's input.
        image: (S, H, W) or (S, H, W, C), an array or slices that are made when they are asked for.
        name: stands in errors.
    """
    if spec.window is not None:
        return spec.window
    if spec.percentiles is not None:
        low, high = percentiles(image, spec.percentiles)
        return low, high if high > low else low + 1.0
    if image.dtype == np.uint8:
        return 0.0, 255.0
    raise MedsegError(
        f"{name}: holds {image.dtype} values, so data.image needs a `window` (for CT, such as "
        "[-100, 240]) or `percentiles` (for MR, such as [0.5, 99.5])."
    )


@dataclass(frozen=True)
class Fit:
    """How slices of one size get another: scaled to `inner`, then cut or padded to `outer`."""

    source: tuple[int, int]
    inner: tuple[int, int]
    outer: tuple[int, int]

    @classmethod
    def of(cls, spec: ImageSpec, source: tuple[int, int]) -> Fit:
        """Plan the way of a slice of (rows, columns) `source`."""
        if spec.size is None:
            return cls(source, source, source)
        if spec.fit == "resize":
            return cls(source, spec.size, spec.size)
        if spec.fit == "crop":
            return cls(source, source, spec.size)
        scale = min(spec.size[0] / source[0], spec.size[1] / source[1])
        inner = (max(1, round(source[0] * scale)), max(1, round(source[1] * scale)))
        return cls(source, inner, spec.size)

    def image(self, image: Array) -> Array:
        """Fit a float image (H, W, C) with values from 0; what is padded is 0."""
        # First what shrinks, then what grows: neither method is good at both, and a slice may
        # shrink along one axis and grow along the other.
        shrunk = (min(self.inner[0], self.source[0]), min(self.inner[1], self.source[1]))
        for size, method in ((shrunk, cv2.INTER_AREA), (self.inner, cv2.INTER_LINEAR)):
            if image.shape[:2] != size:
                channels = image.shape[2]
                image = cv2.resize(image, size[::-1], interpolation=method)
                image = image.reshape(*size, channels)
        return self._cut_or_pad(image)

    def mask(self, mask: Array) -> Array:
        """Fit a mask (H, W); labels are never mixed, what is padded is background."""
        if self.inner != self.source:
            # The exact variant: cv2.INTER_NEAREST shifts the mask by half a pixel.
            mask = cv2.resize(mask, self.inner[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
        return self._cut_or_pad(mask)

    def undo(self, scores: torch.Tensor) -> torch.Tensor:
        """Bring scores (B, K, *outer) back to (B, K, *source); zero where input was cut off."""
        pads = []
        for have, want in zip(reversed(self.outer), reversed(self.inner), strict=True):
            before = _before(have, want)
            pads += [before, want - have - before]
        scores = functional.pad(scores, pads)
        if self.inner != self.source:
            scores = functional.interpolate(scores, self.source, mode="bilinear")
        return scores

    def _cut_or_pad(self, array: Array) -> Array:
        for axis, (have, want) in enumerate(zip(self.inner, self.outer, strict=True)):
            before = _before(have, want)
            if want < have:
                array = array.take(range(-before, -before + want), axis=axis)
            elif want > have:
                widths = [(0, 0)] * array.ndim
                widths[axis] = (before, want - have - before)
                array = np.pad(array, widths)
        return np.ascontiguousarray(array)


def _before(have: int, want: int) -> int:
    """Pixels to pad before (or, negative, to cut) so that `have` lies in the middle of `want`."""
    return (want - have) // 2 if want >= have else -((have - want) // 2)


def scale_intensity(image: Array, limits: Limits) -> Array:
    """Map `limits` to 0 and 1, clip, and give a float32 image (H, W, C)."""
    low, high = limits
    scaled = image.astype(np.float32)
    scaled -= low
    scaled *= 1.0 / (high - low)
    np.clip(scaled, 0.0, 1.0, out=scaled)
    return scaled if scaled.ndim == 3 else scaled[..., np.newaxis]

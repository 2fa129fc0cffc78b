"""Augmentation from the configuration: albumentations transforms by name, seeded per sample."""

from __future__ import annotations

import inspect
import os
import random
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from medseg_reg.errors import MedsegError, nearest

Array = np.ndarray[Any, np.dtype[Any]]

# What keeps a label map a label map and takes float32 images of one or three channels in [0, 1].
TRANSFORMS = (
    "Affine",
    "CoarseDropout",
    "ElasticTransform",
    "GaussNoise",
    "GaussianBlur",
    "GridDistortion",
    "HorizontalFlip",
    "OpticalDistortion",
    "RandomBrightnessContrast",
    "RandomGamma",
    "RandomRotate90",
    "Rotate",
    "SquareSymmetry",
    "Transpose",
    "VerticalFlip",
)

# Arguments that would give a mask other values than its classes, or a slice another size: what
# may be written for them, and why nothing else.
HARMLESS = {
    "mask_interpolation": ((0, 6), "labels must not be mixed: 0 or 6, the nearest neighbour"),
    "fill_mask": ((0, None), "what is filled in is background: 0"),
    "fit_output": ((False,), "slices keep their size"),
    "crop_border": ((False,), "slices keep their size"),
}


TURNING = ("RandomRotate90", "SquareSymmetry", "Transpose")


def _library() -> Any:
    # Imported on use: it takes a second, and asks the network for updates unless told not to.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations

    return albumentations


def check_augmentation(name: str, arguments: dict[str, Any]) -> None:
    """Refuse an unknown transform or argument; the library itself only warns.

    Raises:
        ValueError: names what was found and the nearest right name.
    """
    if name not in TRANSFORMS:
        raise ValueError(
            f"unknown augmentation '{name}'.{nearest(name, TRANSFORMS)} "
            f"Known: {', '.join(TRANSFORMS)}"
        )
    transform = getattr(_library(), name)
    known = [n for n in inspect.signature(transform.__init__).parameters if n != "self"]
    for argument in arguments:
        if argument not in known:
            raise ValueError(
                f"{name} has no argument '{argument}'.{nearest(argument, known)} "
                f"Known: {', '.join(known)}"
            )
        if argument in HARMLESS and arguments[argument] not in HARMLESS[argument][0]:
            raise ValueError(
                f"{name} with {argument} {arguments[argument]}: {HARMLESS[argument][1]}. Leave "
                "it out"
            )
    _build(name, arguments)


def check_shape(transforms: Sequence[tuple[str, dict[str, Any]]], shape: Sequence[int]) -> None:
    """Refuse transforms that turn a slice by 90 degrees where slices are not square."""
    turning = [name for name, _ in transforms if name in TURNING]
    if turning and shape[0] != shape[1]:
        raise MedsegError(
            f"regularization.data: {', '.join(turning)} need square slices; these are "
            f"{shape[0]}x{shape[1]}. Set data.image.size to a square, or leave them out."
        )


def _build(name: str, arguments: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return getattr(_library(), name)(**arguments)
        except (ValueError, TypeError, UserWarning) as error:
            first = " ".join(str(error).split())[:200]
            raise ValueError(f"{name}: {first}") from None


class Augmentation:
    """A chain of transforms that gives the same result for the same seed in any process.

    Args:
        transforms: pairs of a transform's name and its arguments.
    """

    def __init__(self, transforms: Sequence[tuple[str, dict[str, Any]]]) -> None:
        self.transforms = list(transforms)
        self._chain: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"transforms": self.transforms, "_chain": None}

    def __call__(self, image: Array, mask: Array, seed: int) -> tuple[Array, Array]:
        """Transform an image (H, W, C) float32 in [0, 1] and its mask (H, W) alike."""
        if not self.transforms:
            return image, mask
        result = self.seeded(seed)(image=image, mask=mask)
        changed, labels = result["image"], result["mask"]
        if changed.shape != image.shape:
            raise MedsegError(
                f"augmentation changed the size of a slice from {image.shape[:2]} to "
                f"{changed.shape[:2]}; RandomRotate90, SquareSymmetry and Transpose need square "
                "slices (data.image.size)."
            )
        return np.clip(changed, 0.0, 1.0, dtype=np.float32), labels

    @property
    def chain(self) -> Any:
        """The chain, an albumentations `Compose`."""
        if self._chain is None:
            chain = [_build(name, arguments) for name, arguments in self.transforms]
            self._chain = _library().Compose(chain)
        return self._chain

    def seeded(self, seed: int) -> Any:
        """Return the chain with its generators at a seed."""
        # One stream for all: `set_random_seed` would give each transform the same numbers, so that
        # those of equal p would be applied together or not at all.
        self.chain.set_random_state(np.random.default_rng(seed), random.Random(seed))  # noqa: S311
        return self.chain

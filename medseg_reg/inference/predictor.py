"""Labels for whole volumes, slice by slice, at the resolution of the source."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medseg_reg.data.preprocessing import Fit, ImageSpec, Limits, limits_of, scale_intensity
from medseg_reg.errors import MedsegError
from medseg_reg.networks.build import probabilities
from medseg_reg.regularizers.protocols import LabelReader

Array = np.ndarray[Any, np.dtype[Any]]


class Predictor:
    """Applies a network to images as they are stored, and gives labels on their own grid.

    It computes in float32, so that scores do not depend on the processor's number formats, and
    one batch of slices at a time, so that memory does not grow with the volume.

    Args:
        network: maps images (B, C, H, W) to logits (B, K, H, W); set to evaluation mode.
        image: window, size and fit of the training.
        channels: image channels that the network takes.
        batch_size: slices in a batch.
        device: where to compute; by default a GPU where there is one.
    """

    def __init__(
        self,
        network: nn.Module,
        image: ImageSpec,
        channels: int,
        batch_size: int = 8,
        device: torch.device | str | None = None,
    ) -> None:
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.network = network.to(self.device).eval()
        self.image, self.channels, self.batch_size = image, channels, batch_size
        # Layers that read the true labels of what they are tested on, as some papers did.
        self.cheating = [
            layer
            for layer in self.network.modules()
            if isinstance(layer, LabelReader) and not layer.valid_for_reporting
        ]

    @property
    def invalid_because(self) -> str:
        """Why scores of this network are no scores; empty where they are."""
        names = sorted({type(layer).__name__ for layer in self.cheating})
        if not names:
            return ""
        return f"INVALID FOR REPORTING: {', '.join(names)} read the true labels at test time"

    def labels(self, images: Array, name: str, truth: Array | None = None) -> Array:
        """Return the labels (S, H, W) uint8 of images (S, H, W) or (S, H, W, C).

        Args:
            images: int16 in HU, uint8, or float32, as in a slice store; may be memory-mapped.
            name: stands in errors.
            truth: the true labels (S, H, W); used by layers that read them, and by nothing else.

        Raises:
            MedsegError: the images have other channels than the network takes, hold pixels
                that are no numbers, need a window that the training did not have, or the
                network needs the truth and there is none.
        """
        require_finite(images, name)
        result = np.empty(images.shape[:3], dtype=np.uint8)
        for start, scores in self._batches(images, name, truth=truth):
            result[start : start + len(scores)] = scores.argmax(dim=1).to(torch.uint8).cpu()
        return result

    def labels_of_slice(
        self, images: Array, number: int, name: str, truth: Array | None = None
    ) -> Array:
        """Return the labels (H, W) of one slice; its intensities are scaled as its volume's.

        `truth` (H, W) is its true labels; see `labels`.
        """
        # Percentiles are taken of the whole volume, a window needs none of the other slices.
        used = images if self.image.percentiles else images[number : number + 1]
        require_finite(used, name)
        limits = limits_of(self.image, images, name)
        if truth is not None:
            truth = truth[np.newaxis]
        for _, scores in self._batches(images[number : number + 1], name, limits, truth):
            return scores.argmax(dim=1).to(torch.uint8).cpu().numpy()[0]
        raise IndexError(f"{name}: has no slice {number}")

    def _batches(
        self,
        images: Array,
        name: str,
        limits: Limits | None = None,
        truth: Array | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield the number of a first slice and class probabilities (B, K, H, W)."""
        found = images.shape[3] if images.ndim == 4 else 1
        if found != self.channels:
            raise MedsegError(
                f"{name}: has {found} image channels, the network takes {self.channels}."
            )
        if self.cheating and truth is None:
            raise MedsegError(
                f"{name}: {type(self.cheating[0]).__name__} of this network reads the true labels "
                "at test time (eval_mode 'true_label'), so it cannot predict where there are "
                "none. Train with another eval_mode."
            )
        limits = limits or limits_of(self.image, images, name)
        rows, columns = images.shape[1:3]
        fit = Fit.of(self.image, (rows, columns))
        for start in range(0, len(images), self.batch_size):
            block = images[start : start + self.batch_size]
            scaled = [fit.image(scale_intensity(one, limits)) for one in block]
            batch = torch.from_numpy(np.stack(scaled).transpose(0, 3, 1, 2).copy())
            if self.cheating and truth is not None:
                masks = np.stack([fit.mask(one) for one in truth[start : start + len(block)]])
                for layer in self.cheating:
                    layer.labels = torch.from_numpy(masks).to(self.device)
            with torch.inference_mode():
                scores = fit.undo(probabilities(self.network(batch.to(self.device))))
            for layer in self.cheating:
                layer.labels = None
            # Outside of the block: in it, the mode would stay on in the caller.
            yield start, scores


def require_finite(images: Array, name: str) -> None:
    """Refuse NaN and infinity, which would become labels without a word.

    Args:
        images: (S, H, W) or (S, H, W, C), of any type; may be memory-mapped.
        name: stands in the error.

    Raises:
        MedsegError: a pixel is NaN or infinite.
    """
    if images.dtype.kind != "f":
        return
    for number, one in enumerate(images):
        if odd := one.size - int(np.count_nonzero(np.isfinite(one))):
            where = f" of slice {number}" if len(images) > 1 else ""
            raise MedsegError(
                f"{name}: {odd} of {one.size} pixels{where} are NaN or infinite. Replace them, "
                "for example by the value of the background."
            )

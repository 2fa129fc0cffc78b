"""Labels for whole volumes, a few slices at a time, at the resolution of the source."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medseg_reg.data.preprocessing import Fit, ImageSpec, Limits, limits_of, scale_intensity
from medseg_reg.errors import MedsegError
from medseg_reg.inference.passes import Passes
from medseg_reg.inference.slices import Slices
from medseg_reg.inference.stochastic import require_stochastic, sampling
from medseg_reg.inference.uncertainty import Average
from medseg_reg.insertion.running import seeded
from medseg_reg.networks.build import Network, check_input_size
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
        passes: a sliding window, mirrored passes; by default one pass over the whole slice. With a
            sliding window slices keep their resolution, whatever `image` says of size and fit.
        draws: passes of MC dropout, each with its own random numbers; 0 for a network that does
            not draw.
        seed: decides the draws; those of a slice depend on it, the slice's number in its volume
            and the size of the batch, on nothing else.

    Raises:
        MedsegError: draws are asked for, but no layer of the network draws by chance.
    """

    def __init__(
        self,
        network: nn.Module,
        image: ImageSpec,
        channels: int,
        batch_size: int = 8,
        device: torch.device | str | None = None,
        *,
        passes: Passes | None = None,
        draws: int = 0,
        seed: int = 0,
    ) -> None:
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.network = network.to(self.device).eval()
        self.image, self.channels, self.batch_size = image, channels, batch_size
        self.passes, self.draws, self.seed = passes or Passes(), draws, seed
        if draws:
            require_stochastic(self.network, "the network")
        self.cheating = cheating_layers(self.network)

    @property
    def invalid_because(self) -> str:
        """Why scores of this network are no scores; empty where they are."""
        names = sorted({type(layer).__name__ for layer in self.cheating})
        if not names:
            return ""
        return f"INVALID FOR REPORTING: {', '.join(names)} read the true labels at test time"

    def labels(self, images: Slices, name: str, truth: Array | None = None) -> Array:
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
        for start, scores in self.batches(images, name, truth=truth):
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
        for _, scores in self.batches(images[number : number + 1], name, limits, truth):
            labels: Array = scores.argmax(dim=1).to(torch.uint8).cpu().numpy()[0]
            return labels
        raise IndexError(f"{name}: has no slice {number}")

    def case(
        self,
        images: Slices,
        name: str,
        limits: Limits | None = None,
        truth: Array | None = None,
    ) -> Case:
        """Return a case as this network sees it.

        Args:
            images: as of `labels`.
            name: stands in errors.
            limits: the values that become 0 and 1, where they are known already.
            truth: as of `labels`.

        Raises:
            MedsegError: see `labels`.
        """
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
        rows, columns = images.shape[1:3]
        spec = self.image
        if self.passes.window is not None:
            spec = spec.model_copy(update={"size": None})
        if limits is None:
            # Percentiles alone need the other slices too.
            limits = limits_of(self.image, images if self.image.percentiles else images[:1], name)
        return Case(self, images, limits, Fit.of(spec, (rows, columns)), truth)

    def batches(
        self,
        images: Slices,
        name: str,
        limits: Limits | None = None,
        truth: Array | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield the number of a first slice and class probabilities (B, K, H, W).

        Arguments and errors are those of `case`; pixels are not looked at, see `require_finite`.
        """
        case = self.case(images, name, limits, truth)
        for start in range(0, len(images), self.batch_size):
            votes = Average(maps=False)
            for scores in case.members(start, start + self.batch_size):
                votes.add(scores)
            yield start, votes.mean()

    @contextmanager
    def told(self, batch: Tensor) -> Iterator[None]:
        """Say what is wrong where the network fails because of the size of its images.

        Raises:
            MedsegError: it takes none of this size.
        """
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, RuntimeError, ValueError):
            if isinstance(self.network, Network):
                size = self.passes.window or tuple(batch.shape[2:])
                check_input_size(self.network, self.channels, size)
            raise


@dataclass(frozen=True, eq=False)
class Case:
    """The slices of one case, as one network sees them.

    Attributes:
        predictor: the network.
        images: (S, H, W) or (S, H, W, C).
        limits: the values that become 0 and 1.
        fit: how a slice gets the size of the network's input.
        truth: the true labels, where a layer reads them.
    """

    predictor: Predictor
    images: Slices
    limits: Limits
    fit: Fit
    truth: Array | None = None

    def members(self, start: int, stop: int) -> Iterator[Tensor]:
        """Yield class probabilities (B, K, H, W) of some slices, once for each draw."""
        one, batch = self.predictor, self.batch(start, stop)
        for draw in range(one.draws or 1):
            with self._labels_shown(start, len(batch)), one.told(batch), torch.inference_mode():
                if not one.draws:
                    p = one.passes.probabilities(one.network, batch, one.batch_size)
                else:
                    # Seeded anew each time, so that nothing that runs between two slices, and no
                    # slice before them, changes their draws.
                    words = np.random.SeedSequence([one.seed, start, draw]).generate_state(2)
                    seed = int(words[0]) << 32 | int(words[1])
                    with sampling(one.network), seeded(one.device, seed):
                        p = one.passes.probabilities(one.network, batch, one.batch_size)
                p = self.fit.undo(p)
            # Outside of the block: in it, the mode would stay on in the caller.
            yield p

    def batch(self, start: int, stop: int) -> Tensor:
        """Return some slices as the network takes them (B, C, *outer), on its device."""
        scaled = [self.fit.image(scale_intensity(s, self.limits)) for s in self.images[start:stop]]
        batch = torch.from_numpy(np.stack(scaled).transpose(0, 3, 1, 2).copy())
        return batch.to(self.predictor.device)

    @contextmanager
    def _labels_shown(self, start: int, count: int) -> Iterator[None]:
        """Show the true labels of some slices to the layers that read them."""
        layers = self.predictor.cheating
        if layers and self.truth is not None:
            masks = np.stack([self.fit.mask(one) for one in self.truth[start : start + count]])
            for layer in layers:
                layer.labels = torch.from_numpy(masks).to(self.predictor.device)
        try:
            yield
        finally:
            for layer in layers:
                layer.labels = None


def cheating_layers(network: nn.Module) -> list[LabelReader]:
    """Return the layers that read the true labels of what they are tested on, as papers did."""
    return [
        layer
        for layer in network.modules()
        if isinstance(layer, LabelReader) and not layer.valid_for_reporting
    ]


def require_finite(images: Slices, name: str) -> None:
    """Refuse NaN and infinity, which would become labels without a word.

    Args:
        images: (S, H, W) or (S, H, W, C), of any type; may be memory-mapped.
        name: stands in the error.

    Raises:
        MedsegError: a pixel is NaN or infinite.
    """
    if images.dtype.kind != "f":
        return
    for number in range(len(images)):
        one = images[number]
        if odd := one.size - int(np.count_nonzero(np.isfinite(one))):
            where = f" of slice {number}" if len(images) > 1 else ""
            raise MedsegError(
                f"{name}: {odd} of {one.size} pixels{where} are NaN or infinite. Replace them, "
                "for example by the value of the background."
            )

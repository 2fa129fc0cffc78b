"""Slices that stay on the device that trains, and batches that are made there.

Nothing is read or copied in a step but the numbers of the slices and what was drawn for them. The
batches are those of the loader: the same slices in the same order, augmented by the same draws.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medseg_reg.data.dataset import SliceDataset
from medseg_reg.data.device_augment import DeviceAugmentation, unsupported
from medseg_reg.data.preprocessing import Fit
from medseg_reg.data.sampling import Sample
from medseg_reg.data.warp import bring
from medseg_reg.errors import MedsegError

# Of the memory of a GPU that is free when training begins; the rest is for maps and gradients.
SHARE = 0.25


class ResidentSlices:
    """The slices of a data set in two tensors on a device.

    8-bit and 16-bit slices that keep their size are held as they are stored, and get their window
    in each batch; others are held as float32, windowed and resized.

    Args:
        dataset: the slices; its augmentation is applied on the device.
        device: where they stay.

    Attributes:
        images: (N, C, H, W), uint8, int16 or float32.
        masks: (N, H, W), uint8.
    """

    def __init__(self, dataset: SliceDataset, device: torch.device) -> None:
        self.device = device
        self.augmentation = DeviceAugmentation(dataset.augmentation.transforms)
        shape = tuple(dataset[0]["image"].shape)
        count = len(dataset)
        self.images = torch.empty((count, *shape), dtype=_kept_type(dataset), device=device)
        self.masks = torch.empty((count, *shape[1:]), dtype=torch.uint8, device=device)
        # What each image is less, and then times: nothing where it is float32 already.
        low, scale = np.zeros(count, np.float32), np.ones(count, np.float32)
        for index, (case, number) in enumerate(dataset.items):
            if self.images.dtype == torch.float32:
                item = dataset[index]
                image, mask = item["image"], item["mask"]
            else:
                name = dataset.cases[case]
                pixels = np.array(dataset.store.image(name)[number])
                pixels = pixels if pixels.ndim == 3 else pixels[..., np.newaxis]
                image = torch.from_numpy(pixels).permute(2, 0, 1)
                mask = torch.from_numpy(np.array(dataset.store.mask(name)[number]))
                limits = dataset.limits(name)
                low[index], scale[index] = limits[0], 1.0 / (limits[1] - limits[0])
            self.images[index].copy_(image)
            self.masks[index].copy_(mask)
        self._low, self._scale = (torch.from_numpy(v).to(device) for v in (low, scale))
        self._where = torch.tensor(dataset.items, device=device).view(-1, 2)

    def batch(self, keys: Sequence[Sample | int]) -> dict[str, Tensor]:
        """Return a batch as a loader does; augmented where it is asked for by samples."""
        samples = [key for key in keys if isinstance(key, Sample)]
        numbers = [key.index if isinstance(key, Sample) else key for key in keys]
        index = bring(torch.tensor(numbers), self.device)
        images, masks = self.images[index], self.masks[index]
        if images.dtype != torch.float32:
            low, scale = (v[index, None, None, None] for v in (self._low, self._scale))
            images = images.float().sub_(low).mul_(scale).clamp_(0.0, 1.0)
        if samples:
            seeds = [sample.seed for sample in samples]
            images, masks = self.augmentation(images, masks, seeds)
        case, number = self._where[index].unbind(1)
        return {"image": images, "mask": masks, "case": case, "slice": number}


class ResidentLoader:
    """Batches of resident slices, in the order of their numbers or samples.

    Args:
        slices: the slices.
        batches: the numbers or samples of each batch; iterated over anew each time.
    """

    def __init__(self, slices: ResidentSlices, batches: Any) -> None:
        self.slices, self.batches = slices, batches

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for keys in self.batches:
            yield self.slices.batch(keys)


def resident_bytes(datasets: Iterable[SliceDataset]) -> int:
    """Return the memory that the slices of data sets would take."""
    total = 0
    for dataset in datasets:
        channels, height, width = dataset[0]["image"].shape
        each = channels * _kept_type(dataset).itemsize + 1
        total += len(dataset) * height * width * each
    return total


def may_reside(wanted: str | bool, datasets: Sequence[SliceDataset], device: torch.device) -> bool:
    """Whether the slices of a training are to stay on its device.

    Args:
        wanted: `auto`: on a CUDA device, where they fit and all transforms can be computed there;
            or True or False.
        datasets: what is to stay.
        device: where.

    Raises:
        MedsegError: wanted is True, and they do not fit or a transform cannot be computed there.
    """
    if wanted is False or (wanted == "auto" and device.type != "cuda"):
        return False
    transforms = [t for dataset in datasets for t in dataset.augmentation.transforms]
    problem = unsupported(transforms)
    if problem is not None:
        problem = f"{problem} is computed on the CPU alone. Leave it out, or set data.resident=auto"
    elif device.type == "cuda":
        needed, room = resident_bytes(datasets), SHARE * torch.cuda.mem_get_info(device)[0]
        if needed > room:
            problem = (
                f"the slices take {needed / 1e9:.2f} GB, and a {SHARE:.0%} share of what is free "
                f"on {device} is {room / 1e9:.2f} GB. Set data.resident=auto, or a smaller "
                "data.image.size"
            )
    if problem is not None and wanted is True:
        raise MedsegError(f"data.resident: {problem}.")
    return problem is None


def _kept_type(dataset: SliceDataset) -> torch.dtype:
    """Return the type in which the slices are held."""
    first = dataset.store.row(dataset.cases[0])
    stored = {"uint8": torch.uint8, "int16": torch.int16}
    rows = [dataset.store.row(case) for case in dataset.cases]
    for row in rows:
        fit = Fit.of(dataset.spec, (row.shape[1], row.shape[2]))
        if row.dtype not in stored or row.dtype != first.dtype or fit.source != fit.outer:
            return torch.float32
    return stored[first.dtype]

"""Slices of a store as a torch data set: memory-mapped, stateless, safe to fork and to spawn."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from medseg_reg.data.augment import Augmentation
from medseg_reg.data.preprocessing import (
    Fit,
    ImageSpec,
    Limits,
    intensity_limits,
    scale_intensity,
)
from medseg_reg.data.sampling import Sample
from medseg_reg.data.store import SliceStore
from medseg_reg.errors import MedsegError

Array = np.ndarray[Any, np.dtype[Any]]


class SliceDataset(Dataset[dict[str, Any]]):
    """The slices of some cases of a store, ready for the network.

    An item is a dictionary: `image` (C, H, W) float32 in [0, 1], `mask` (H, W) uint8,
    `case` the index into `cases`, `slice` the number in the case.

    Args:
        store: the slice store.
        cases: names of the cases.
        spec: window, size and fit.
        augmentation: applied to items that are asked for by a `Sample`, seeded by it.
        chosen: for each case, the slices to use; all where a case is not named.
    """

    def __init__(
        self,
        store: SliceStore,
        cases: Sequence[str],
        spec: ImageSpec,
        augmentation: Augmentation | None = None,
        chosen: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        self.store = store
        self.cases = list(cases)
        self.spec = spec
        self.augmentation = augmentation or Augmentation([])
        self.items: list[tuple[int, int]] = []
        self.foreground: list[bool] = []
        for index, case in enumerate(self.cases):
            row = store.row(case)
            numbers = range(row.slices) if chosen is None else chosen.get(case, range(row.slices))
            self.items.extend((index, number) for number in numbers)
            self.foreground.extend(row.foreground[number] > 0 for number in numbers)
        self._limits: dict[str, Limits] = {}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: int | Sample) -> dict[str, Any]:
        sample = key if isinstance(key, Sample) else None
        case, number = self.items[sample.index if sample else int(key)]  # type: ignore[arg-type]
        name = self.cases[case]
        image, mask = self.store.image(name)[number], self.store.mask(name)[number]
        fit = Fit.of(self.spec, mask.shape)
        scaled = fit.image(scale_intensity(image, self.limits(name)))
        labels = fit.mask(mask)
        if sample is not None:
            scaled, labels = self.augmentation(scaled, labels, sample.seed)
        return {
            "image": torch.from_numpy(_own(scaled.transpose(2, 0, 1))),
            "mask": torch.from_numpy(_own(labels)),
            "case": case,
            "slice": number,
        }

    def limits(self, case: str) -> Limits:
        """Return the values of a case that become 0 and 1."""
        if case not in self._limits:
            self._limits[case] = intensity_limits(self.spec, self.store, case)
        return self._limits[case]


def _own(array: Array) -> Array:
    """Return an array that torch may take as it is; copied only where it is a view of the file."""
    return np.require(array, requirements=["C_CONTIGUOUS", "WRITEABLE", "ENSUREARRAY"])


def check_uniform(store: SliceStore, cases: Sequence[str], spec: ImageSpec) -> int:
    """Return the image channels of the cases; refuse what cannot be put into one batch."""
    rows = [store.row(case) for case in cases]
    channels = {row.channels for row in rows}
    if len(channels) > 1:
        raise MedsegError(
            f"{store.path}: some cases are gray, others in colour. Convert again with one --color."
        )
    sizes = sorted({row.shape[1:3] for row in rows})
    if spec.size is None and len(sizes) > 1:
        shown = ", ".join(f"{h}x{w}" for h, w in sizes[:5])
        raise MedsegError(
            f"{store.path}: slices have {len(sizes)} sizes ({shown}), so data.image.size must say "
            "to which they are brought, as in `size: [256, 256]`."
        )
    return channels.pop()


def quiet_worker(_: int) -> None:
    """Keep a worker process to one core: several workers with several threads each are slower.

    It lives here so that a spawned worker need not import Lightning. A signal to stop reaches all
    processes of a terminal or a job; the training process answers it, and then ends its workers.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)

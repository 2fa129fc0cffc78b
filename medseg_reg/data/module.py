"""The data of a run: store, split and loaders, for Lightning's trainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import lightning as L
import torch
from torch.utils.data import DataLoader

from medseg_reg.data.augment import Augmentation, check_shape
from medseg_reg.data.dataset import SliceDataset, check_uniform, quiet_worker
from medseg_reg.data.mix_token import MixToken
from medseg_reg.data.preprocessing import ImageSpec, intensity_limits
from medseg_reg.data.resident import (
    ResidentLoader,
    ResidentSlices,
    may_reside,
    resident_bytes,
)
from medseg_reg.data.sampling import BatchSampler, SamplingSpec, epoch_order
from medseg_reg.data.splits import Splits
from medseg_reg.data.store import SliceStore
from medseg_reg.errors import MedsegError

Position = dict[str, int]


class SliceLoader(DataLoader[dict[str, Any]]):
    """A loader of slices; an error in a worker process is told as one in this process is."""

    def __init__(self, dataset: SliceDataset, batches: Any, workers: int, pin: bool) -> None:
        super().__init__(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pin,
            worker_init_fn=quiet_worker,
            # Its own generator: a loader otherwise draws from torch's global one at each epoch.
            generator=torch.Generator(),
        )

    # torch names its own class of iterators, where any will do.
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except MedsegError as error:
            # torch puts the worker's traceback before the message.
            raise MedsegError(str(error).strip().rsplit("MedsegError: ", 1)[-1]) from None


class Positioned:
    """What lets a loader know how far it is, so that a run goes on exactly where it stopped.

    The position counts batches handed out, not batches that workers have prepared ahead.
    """

    position: Position
    batches: BatchSampler

    def __iter__(self) -> Iterator[Any]:
        if self.position["batch"] >= len(self.batches):
            self.position.update(epoch=self.position["epoch"] + 1, batch=0)
        self.batches.epoch, self.batches.start = self.position["epoch"], self.position["batch"]
        for batch in super().__iter__():  # type: ignore[misc]
            self.position["batch"] += 1
            yield batch

    def state_dict(self) -> Position:
        """Return the position; by this method Lightning knows that the loader can go on."""
        return dict(self.position)

    def load_state_dict(self, state: Position) -> None:
        """Go on at a position."""
        self.position.update(state)


class TrainingLoader(Positioned, SliceLoader):  # type: ignore[misc]  # as SliceLoader.__iter__
    """A loader of training slices."""

    def __init__(
        self,
        dataset: SliceDataset,
        batches: BatchSampler,
        workers: int,
        position: Position,
        pin: bool = False,
    ) -> None:
        self.position, self.batches = position, batches
        super().__init__(dataset, batches, workers, pin)


class ResidentTrainingLoader(Positioned, ResidentLoader):
    """The same of slices that stay on the device."""

    def __init__(self, slices: ResidentSlices, batches: BatchSampler, position: Position) -> None:
        self.position = position
        super().__init__(slices, batches)


class SliceDataModule(L.LightningDataModule):
    """Training and validation loaders over one split of a slice store.

    Args:
        store: the slice store.
        splits: which cases are trained on, validated on and tested on.
        image: window, size and fit.
        sampling: which slices an epoch shows.
        augmentation: pairs of a transform's name and its arguments.
        batch_size: samples in a batch of one process.
        workers: loader processes; 0 loads in the training process.
        seed: seed of order and augmentation.
        resident: whether the slices stay on the device that trains, as of `may_reside`; then no
            worker is started.

    Attributes:
        mixing: what is done to a training batch before anything else sees it; None for nothing.
    """

    def __init__(
        self,
        store: SliceStore,
        splits: Splits,
        *,
        image: ImageSpec,
        sampling: SamplingSpec,
        augmentation: Sequence[tuple[str, dict[str, Any]]],
        batch_size: int,
        workers: int,
        seed: int,
        resident: Literal["auto"] | bool = False,
    ) -> None:
        super().__init__()
        self.store, self.splits = store, splits
        self.sampling, self.batch_size, self.workers, self.seed = (
            sampling,
            batch_size,
            workers,
            seed,
        )
        self.wanted_resident = resident
        self._residents: tuple[ResidentSlices, ResidentSlices] | None = None
        self.mixing: MixToken | None = None
        used = (*splits.train, *splits.val, *splits.test)
        self.position: Position = {"epoch": 0, "batch": 0}
        self.channels = check_uniform(store, used, image)
        for case in used:  # a damaged file is told now, not after an hour
            store.image(case)
            store.mask(case)
        for case in {store.row(case).dtype: case for case in used}.values():
            intensity_limits(image, store, case)
        self.train = SliceDataset(
            store, splits.train, image, Augmentation(augmentation), splits.train_slices
        )
        self.val = SliceDataset(store, splits.val, image)
        check_shape(augmentation, tuple(self.val[0]["mask"].shape))

    @property
    def slices_per_epoch(self) -> int:
        """How many slices are drawn for an epoch, over all processes."""
        return len(epoch_order(self.train.foreground, self.sampling, self.seed, 0))

    def train_dataloader(self) -> TrainingLoader | ResidentTrainingLoader:
        """Return the training batches of this process."""
        try:
            batches = BatchSampler(
                self.train.foreground,
                self.sampling,
                self.seed,
                self.batch_size,
                *self._rank_and_world(),
            )
        except ValueError as error:
            raise MedsegError(
                f"{self.store.path}: data.sampling.policy '{self.sampling.policy}': {error}."
            ) from None
        if (residents := self.residents()) is not None:
            return ResidentTrainingLoader(residents[0], batches, self.position)
        return TrainingLoader(self.train, batches, self.workers, self.position, self._pin())

    def residents(self) -> tuple[ResidentSlices, ResidentSlices] | None:
        """Return the training and validation slices on the device, or None where they are read.

        They are brought there once; before a trainer is at hand there is no device.
        """
        if self.trainer is None or self._residents is not None:
            return self._residents
        device, sets = self.trainer.strategy.root_device, (self.train, self.val)
        if may_reside(self.wanted_resident, sets, device):
            if self.trainer.global_rank == 0:
                size = resident_bytes(sets) / 1e9
                print(f"note: data.resident: all slices stay on {device} ({size:.2f} GB)")
            self._residents = (
                ResidentSlices(self.train, device),
                ResidentSlices(self.val, device),
            )
        else:
            self.wanted_resident = False
        return self._residents

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Mix a batch that is trained on."""
        if self.mixing is None or self.trainer is None or not self.trainer.training:
            return batch
        return self.mixing(batch)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the training data, for checkpoints.

        Lightning restores the state of a loader only in the middle of an epoch; without this, a
        run resumed between epochs would repeat the order of the first.
        """
        return dict(self.position)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at a position."""
        self.position.update(state_dict)

    def val_dataloader(self) -> DataLoader[dict[str, Any]] | ResidentLoader:
        """Return the validation batches of this process: every slice once, over all processes."""
        rank, world = self._rank_and_world()
        if len(self.val) < world:
            raise MedsegError(
                f"{self.store.path}: {len(self.val)} validation slices cannot be shared by {world} "
                "processes. Use fewer training.devices, or validate on more cases."
            )
        own = list(range(rank, len(self.val), world))
        batches = [own[i : i + self.batch_size] for i in range(0, len(own), self.batch_size)]
        if (residents := self.residents()) is not None:
            return ResidentLoader(residents[1], batches)
        return SliceLoader(self.val, batches, self.workers, self._pin())

    def _pin(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def _rank_and_world(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

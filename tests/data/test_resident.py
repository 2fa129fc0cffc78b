"""Slices that stay on the device give the batches of the loader, and a run that goes on exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from medseg_reg.config import parse_config
from medseg_reg.data.augment import Augmentation
from medseg_reg.data.dataset import SliceDataset
from medseg_reg.data.module import ResidentTrainingLoader, SliceDataModule, TrainingLoader
from medseg_reg.data.preprocessing import ImageSpec
from medseg_reg.data.resident import SHARE, ResidentSlices, may_reside, resident_bytes
from medseg_reg.data.sampling import Sample, SamplingSpec
from medseg_reg.engine.fit import fit
from medseg_reg.errors import Interrupted, MedsegError
from tests.data.test_dataset import FakeTrainer, module, same
from tests.stores import make_store
from tests.training import same_weights, tiny_config

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
CASES = ("case_00", "case_01", "case_02")


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "store", slices=(4, 3, 5, 2, 2, 2), empty=0.3)


def resident_module(store, rank: int = 0, world: int = 1, **changes: Any) -> SliceDataModule:
    data = module(store, resident=True, **changes)
    data.trainer = FakeTrainer(rank, world)  # type: ignore[assignment]
    return data


@pytest.mark.parametrize(
    ("made", "spec", "kept"),
    [
        ({"dtype": "uint8"}, ImageSpec(), torch.uint8),
        ({"dtype": "uint8", "channels": 3}, ImageSpec(), torch.uint8),
        ({"dtype": "int16"}, ImageSpec(window=(-100, 240)), torch.int16),
        ({"dtype": "int16"}, ImageSpec(percentiles=(1, 98)), torch.int16),
        ({"dtype": "float32"}, ImageSpec(window=(0, 1)), torch.float32),
        ({"dtype": "int16"}, ImageSpec(window=(-100, 240), size=(48, 40)), torch.float32),
        ({"size": (24, 40)}, ImageSpec(size=(32, 32), fit="letterbox"), torch.float32),
        ({"size": (24, 40)}, ImageSpec(size=(24, 40), fit="crop"), torch.uint8),
    ],
)
def test_a_resident_slice_is_the_item_of_the_data_set(tmp_path, made, spec, kept):
    store = make_store(tmp_path / "s", cases=3, slices=3, **made)
    dataset = SliceDataset(store, CASES, spec, chosen={"case_01": [2, 0]})
    slices = ResidentSlices(dataset, CPU)
    assert slices.images.dtype == kept
    numbers = [3, 0, 7, 4]
    batch = slices.batch(numbers)
    expected = torch.utils.data.default_collate([dataset[number] for number in numbers])
    assert batch.keys() == expected.keys()
    for key, value in expected.items():
        assert batch[key].dtype == value.dtype
        assert torch.equal(batch[key], value), key
    held = slices.images.nbytes + slices.masks.nbytes
    assert resident_bytes([dataset]) == held


@pytest.mark.parametrize("policy", ["all", "foreground", "balanced"])
def test_an_epoch_shows_the_slices_of_the_loader_in_its_order(store, policy):
    changes: dict[str, Any] = {"sampling": SamplingSpec(policy=policy), "augmentation": []}
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        resident = resident_module(store, rank, world, **changes)
        plain = module(store, **changes)
        plain.trainer = FakeTrainer(rank, world)  # type: ignore[assignment]
        for _ in range(2):
            ours, theirs = (list(data.train_dataloader()) for data in (resident, plain))
            assert same(ours, theirs)
        assert same(list(resident.val_dataloader()), list(plain.val_dataloader()))
        assert isinstance(resident.train_dataloader(), ResidentTrainingLoader)
        assert isinstance(plain.train_dataloader(), TrainingLoader)


def test_augmented_batches_are_those_of_the_loader_within_interpolation(store):
    chain = [("Affine", {"rotate": [-20, 20], "p": 0.8}), ("HorizontalFlip", {"p": 0.5})]
    ours, theirs = (
        list(data.train_dataloader())
        for data in (resident_module(store, augmentation=chain), module(store, augmentation=chain))
    )
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a["slice"], b["slice"])
        assert (a["image"] - b["image"]).abs().mean() < 0.003
        assert (a["mask"] != b["mask"]).float().mean() < 0.003


def test_an_epoch_resumed_in_its_middle_gives_what_was_left(store):
    whole = list(resident_module(store).train_dataloader())
    first = resident_module(store)
    batches = iter(first.train_dataloader())
    shown = [next(batches) for _ in range(2)]
    again = resident_module(store)
    again.load_state_dict(first.state_dict())
    assert same(shown + list(again.train_dataloader()), whole)
    following = list(again.train_dataloader())
    assert not same(following, whole)


def test_batches_are_copies_and_the_slices_stay_as_they_are(store):
    dataset = SliceDataset(store, CASES, ImageSpec(), Augmentation([("VerticalFlip", {"p": 1.0})]))
    slices = ResidentSlices(dataset, CPU)
    before = slices.images.clone(), slices.masks.clone()
    batch = slices.batch([Sample(0, 1), Sample(2, 3)])
    batch["image"].zero_()
    batch["mask"].fill_(9)
    assert torch.equal(slices.images, before[0])
    assert torch.equal(slices.masks, before[1])


def test_without_a_trainer_or_unless_asked_on_a_cpu_slices_are_read(store):
    assert isinstance(module(store, resident=True).train_dataloader(), TrainingLoader)
    for wanted in ("auto", False):
        data = module(store, resident=wanted)
        data.trainer = FakeTrainer(0, 1)  # type: ignore[assignment]
        assert isinstance(data.train_dataloader(), TrainingLoader)


def test_on_a_gpu_they_stay_where_they_fit_into_the_share_of_free_memory(store, monkeypatch):
    dataset = SliceDataset(store, CASES, ImageSpec())
    needed = resident_bytes([dataset])
    for spare, fits in ((1, True), (-1, False)):
        free = int(needed / SHARE) + 8 * spare
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 9**12))
        assert may_reside("auto", [dataset], GPU) is fits
        assert may_reside(False, [dataset], GPU) is False
        if not fits:
            with pytest.raises(MedsegError, match=r"data\.resident: the slices take 0\.00 GB, and"):
                may_reside(True, [dataset], GPU)


def test_a_transform_that_torch_cannot_compute_keeps_them_on_the_cpu(store, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (9**12, 9**12))
    chain = Augmentation([("Rotate", {"border_mode": 3})])
    dataset = SliceDataset(store, CASES, ImageSpec(), chain)
    assert may_reside("auto", [dataset], GPU) is False
    for device in (CPU, GPU):
        with pytest.raises(MedsegError, match="Rotate with border_mode 3 is computed on the CPU"):
            may_reside(True, [dataset], device)


def test_a_run_of_resident_slices_is_reproducible_and_goes_on_bit_for_bit(tmp_path, monkeypatch):
    store = make_store(tmp_path / "store", cases=6, slices=4, size=32)
    chain = [
        {"name": "Affine", "rotate": [-20, 20], "p": 0.5},
        {"name": "ElasticTransform", "alpha": 20, "sigma": 4, "p": 0.5},
        {"name": "GaussNoise", "std_range": [0.01, 0.05], "p": 0.5},
    ]

    def train(name: str, **changes: Any):
        content = tiny_config(
            store.path,
            tmp_path / name,
            data__resident=True,
            regularization__data=chain,
            training__epochs=2,
            **changes,
        )
        return fit(parse_config(content, "test")).path

    straight = train("straight")
    stop = {"after": 3}
    real = ResidentSlices.batch

    def interrupted(self, keys):
        stop["after"] -= 1
        if stop["after"] == 0:
            import signal

            signal.raise_signal(signal.SIGTERM)
        return real(self, keys)

    monkeypatch.setattr(ResidentSlices, "batch", interrupted)
    with pytest.raises(Interrupted):
        train("stopped")
    monkeypatch.undo()
    assert same_weights(straight, train("stopped"))
    assert not same_weights(straight, train("loader", data__sampling={"per_epoch": 10}))


needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: the same batches from its memory"
)


@needs_gpu
def test_batches_on_a_gpu_are_those_on_the_cpu(store):
    chain = Augmentation([("Affine", {"rotate": [-20, 20], "p": 0.7}), ("RandomGamma", {})])
    dataset = SliceDataset(store, CASES, ImageSpec(), chain)
    samples = [Sample(index, index) for index in range(12)]
    there, here = (ResidentSlices(dataset, device).batch(samples) for device in (GPU, CPU))
    assert {value.device.type for value in there.values()} == {"cuda"}
    assert np.allclose(there["image"].cpu(), here["image"], atol=1e-3)
    assert (there["mask"].cpu() != here["mask"]).float().mean() < 1e-3


@needs_gpu
def test_a_run_on_a_gpu_keeps_its_slices_there(tmp_path, capsys):
    store = make_store(tmp_path / "store", cases=6, slices=4, size=32)
    content = tiny_config(store.path, tmp_path / "run", training__accelerator="gpu")
    fit(parse_config(content, "test"))
    assert "note: data.resident: all slices stay on cuda:0" in capsys.readouterr().out

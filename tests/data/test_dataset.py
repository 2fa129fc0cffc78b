"""Items and loaders give the same data in any process, by any workers, and after a stop."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from medseg_reg.data.augment import Augmentation
from medseg_reg.data.dataset import SliceDataset, check_uniform
from medseg_reg.data.module import SliceDataModule, TrainingLoader
from medseg_reg.data.preprocessing import ImageSpec
from medseg_reg.data.sampling import BatchSampler, Sample, SamplingSpec
from medseg_reg.data.splits import SplitSpec, make_splits
from medseg_reg.data.store import SliceStore
from medseg_reg.errors import MedsegError
from tests.stores import make_store

STEPS: list[tuple[str, dict[str, Any]]] = [
    ("Affine", {"rotate": [-20, 20], "p": 0.8}),
    ("GaussNoise", {"p": 0.5}),
]
CASES = ("case_00", "case_01", "case_02")


@pytest.fixture
def store(tmp_path: Path) -> SliceStore:
    return make_store(tmp_path / "store", slices=(4, 3, 5, 2, 2, 2), empty=0.3)


def loader(store: SliceStore, workers: int = 0, context: str | None = None) -> TrainingLoader:
    dataset = SliceDataset(store, CASES, ImageSpec(), Augmentation(STEPS))
    batches = BatchSampler(dataset.foreground, SamplingSpec(), 7, batch_size=2)
    made = TrainingLoader(dataset, batches, workers, {"epoch": 0, "batch": 0})
    if context:
        made.multiprocessing_context = context
    return made


def module(store: SliceStore, workers: int = 0, **changes: Any) -> SliceDataModule:
    arguments: dict[str, Any] = {
        "image": ImageSpec(),
        "sampling": SamplingSpec(),
        "augmentation": STEPS,
        "batch_size": 2,
        "workers": workers,
        "seed": 7,
        **changes,
    }
    splits = make_splits(store, SplitSpec(kind="counts", train=3, val=2, test=1))
    return SliceDataModule(store, splits, **arguments)


def same(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> bool:
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(left, right, strict=True)
    )


# Items


def test_an_item_is_a_slice_of_the_store(store: SliceStore) -> None:
    dataset = SliceDataset(store, CASES, ImageSpec())
    assert len(dataset) == 12
    expected = [(case, number) for case, n in enumerate((4, 3, 5)) for number in range(n)]
    for index, (case, number) in enumerate(expected):
        item = dataset[index]
        assert (item["case"], item["slice"]) == (case, number)
        image = store.image(CASES[case])[number]
        assert item["image"].shape == (1, 32, 32)
        assert item["image"].dtype == torch.float32
        assert np.allclose(item["image"][0].numpy() * 255, image, atol=1e-3)
        assert item["mask"].dtype == torch.uint8
        assert np.array_equal(item["mask"].numpy(), store.mask(CASES[case])[number])
        assert dataset.foreground[index] == bool(item["mask"].any())


def test_colour_comes_first_and_sizes_are_brought_to_one(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", cases=1, size=(40, 24), channels=3)
    item = SliceDataset(store, ["case_00"], ImageSpec(size=(16, 48), fit="letterbox"))[1]
    assert item["image"].shape == (3, 16, 48)
    assert item["image"].is_contiguous()
    assert item["mask"].shape == (16, 48)


def test_only_the_chosen_slices_are_used(store: SliceStore) -> None:
    dataset = SliceDataset(store, CASES, ImageSpec(), chosen={"case_00": [2], "case_02": [4, 0]})
    assert [(i["case"], i["slice"]) for i in (dataset[n] for n in range(len(dataset)))] == [
        (0, 2),
        (1, 0),
        (1, 1),
        (1, 2),
        (2, 4),
        (2, 0),
    ]
    assert dataset.foreground == [bool(dataset[n]["mask"].any()) for n in range(6)]


def test_only_samples_are_augmented_and_by_their_own_seed(store: SliceStore) -> None:
    dataset = SliceDataset(store, CASES, ImageSpec(), Augmentation(STEPS))
    plain = SliceDataset(store, CASES, ImageSpec())
    assert torch.equal(dataset[3]["image"], plain[3]["image"])
    seeds = [dataset[Sample(3, seed)]["image"] for seed in range(6)]
    assert len({image.numpy().tobytes() for image in seeds}) > 3
    assert torch.equal(dataset[Sample(3, 2)]["image"], seeds[2])


def test_the_maps_are_read_only_and_items_are_copies(store: SliceStore) -> None:
    for array in (store.image("case_00"), store.mask("case_00")):
        assert isinstance(array, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0, 0] = 1
    files = [store.path / kind / "case_00.npy" for kind in ("images", "masks")]
    before = [file.read_bytes() for file in files]
    dataset = SliceDataset(store, CASES, ImageSpec())
    item = dataset[0]
    item["image"].zero_()
    item["mask"].fill_(9)
    assert dataset[0]["image"].any()
    assert dataset[0]["mask"].max() < 9
    assert [file.read_bytes() for file in files] == before


def test_a_pickled_dataset_carries_no_pixels(store: SliceStore) -> None:
    dataset = SliceDataset(store, CASES, ImageSpec(), Augmentation(STEPS))
    expected = dataset[Sample(5, 1)]
    content = pickle.dumps(dataset)
    assert len(content) < 20_000
    assert torch.equal(pickle.loads(content)[Sample(5, 1)]["image"], expected["image"])


def test_gray_and_colour_do_not_mix(tmp_path: Path) -> None:
    gray, colour = (make_store(tmp_path / str(n), cases=1, channels=n) for n in (1, 3))
    rows = (
        gray.manifest.cases[0],
        colour.manifest.cases[0].model_copy(update={"name": "case_01"}),
    )
    gray.manifest = gray.manifest.model_copy(update={"cases": rows})
    with pytest.raises(MedsegError, match="some cases are gray, others in colour"):
        check_uniform(gray, ["case_00", "case_01"], ImageSpec(size=(32, 32)))
    assert check_uniform(colour, ["case_00"], ImageSpec()) == 3


def test_slices_of_several_sizes_need_a_size(tmp_path: Path) -> None:
    small, large = (make_store(tmp_path / str(n), cases=1, size=(24, n)) for n in (24, 40))
    rows = (
        small.manifest.cases[0],
        large.manifest.cases[0].model_copy(update={"name": "case_01"}),
    )
    small.manifest = small.manifest.model_copy(update={"cases": rows})
    with pytest.raises(MedsegError, match=r"2 sizes \(24x24, 24x40\).*data.image.size"):
        check_uniform(small, ["case_00", "case_01"], ImageSpec())
    assert check_uniform(small, ["case_00", "case_01"], ImageSpec(size=(32, 32))) == 1
    assert check_uniform(small, ["case_00"], ImageSpec()) == 1


def test_data_that_need_a_window_are_refused_before_training(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", dtype="int16")
    with pytest.raises(MedsegError, match="needs a `window`"):
        module(store)
    module(store, image=ImageSpec(window=(-100, 240)))


def test_a_policy_that_the_data_cannot_meet_names_store_and_key(tmp_path: Path) -> None:
    data = module(make_store(tmp_path / "s"), sampling=SamplingSpec(policy="balanced"))
    with pytest.raises(MedsegError, match=r"s: data.sampling.policy 'balanced': every training"):
        data.train_dataloader()


# Loaders


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_give_the_same_epochs_as_no_workers(store: SliceStore, context: str) -> None:
    alone, shared = loader(store), loader(store, 2, context)
    for _ in range(2):
        expected = list(alone)
        assert len(expected) == 6
        assert same(list(shared), expected)
    assert shared.position == alone.position == {"epoch": 1, "batch": 6}


def test_the_loader_goes_through_the_epochs_in_the_samplers_order(store: SliceStore) -> None:
    made = loader(store)
    items = made.dataset.items  # type: ignore[attr-defined]
    for epoch in range(3):
        sampler = BatchSampler(made.batches.foreground, SamplingSpec(), 7, batch_size=2)
        sampler.epoch = epoch
        expected = [[items[sample.index] for sample in batch] for batch in sampler]
        found = [
            list(zip(batch["case"].tolist(), batch["slice"].tolist(), strict=True))
            for batch in made
        ]
        assert found == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_the_position_counts_what_was_handed_out_not_what_is_prepared(
    store: SliceStore, workers: int
) -> None:
    made = loader(store, workers)
    assert made.state_dict() == {"epoch": 0, "batch": 0}
    running = iter(made)
    for number in range(1, 5):
        next(running)
        assert made.state_dict() == {"epoch": 0, "batch": number}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 4, 6, 8])
def test_a_stopped_loader_goes_on_with_exactly_the_rest(
    store: SliceStore, workers: int, stop: int
) -> None:
    straight = loader(store)
    whole = [*straight, *straight]
    first = loader(store)
    seen = []
    while len(seen) < stop:
        for batch in first:
            seen.append(batch)
            if len(seen) == stop:
                break
    second = loader(store, workers)
    second.load_state_dict(first.state_dict())
    rest = []
    while len(rest) < 12 - stop:
        rest += list(second)
    assert same(seen + rest, whole)


def test_a_saved_position_does_not_move_with_the_loader(store: SliceStore) -> None:
    made = loader(store)
    saved = made.state_dict()
    next(iter(made))
    assert saved == {"epoch": 0, "batch": 0}


def test_the_data_module_keeps_the_position_between_epochs(store: SliceStore) -> None:
    first = module(store)
    running = first.train_dataloader()
    expected = [list(running) for _ in range(2)]
    second = module(store)
    second.load_state_dict({"epoch": 0, "batch": len(running)})
    assert same(list(second.train_dataloader()), expected[1])
    assert second.state_dict() == first.state_dict()


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_take_nothing_from_the_global_generators(store: SliceStore, workers: int) -> None:
    data = module(store, workers)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index]
    for made in (data.train_dataloader(), data.val_dataloader()):
        for _ in range(2):
            assert len(list(made)) == len(made)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # type: ignore[index]


def test_validation_shows_every_slice_once_without_augmentation(store: SliceStore) -> None:
    data = module(store, batch_size=3)
    made = data.val_dataloader()
    assert isinstance(made, DataLoader)
    found = [
        pair for b in made for pair in zip(b["case"].tolist(), b["slice"].tolist(), strict=True)
    ]
    assert found == data.val.items
    plain = SliceDataset(store, data.splits.val, ImageSpec())
    assert torch.equal(next(iter(made))["image"][1], plain[1]["image"])


class FakeTrainer:
    """What the data module asks of Lightning's trainer."""

    def __init__(self, rank: int, world: int) -> None:
        self.global_rank, self.world_size = rank, world
        self.strategy = SimpleNamespace(root_device=torch.device("cpu"))


def test_processes_share_out_training_and_validation(store: SliceStore) -> None:
    trained, validated = [], []
    for rank in range(2):
        data = module(store)
        data.trainer = FakeTrainer(rank, 2)  # type: ignore[assignment]
        trained += [
            p for b in data.train_dataloader() for p in zip(b["case"], b["slice"], strict=True)
        ]
        validated += [
            p for b in data.val_dataloader() for p in zip(b["case"], b["slice"], strict=True)
        ]
    pairs = [(int(case), int(number)) for case, number in trained]
    assert len(set(pairs)) == len(pairs) == len(data.train) // 4 * 4
    assert sorted((int(c), int(n)) for c, n in validated) == sorted(data.val.items)

"""Pixels of no known class in a store: what holds them, and what must not be taken for them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from medseg_reg.config import parse_config
from medseg_reg.data.augment import Augmentation
from medseg_reg.data.dataset import SliceDataset
from medseg_reg.data.device_augment import DeviceAugmentation
from medseg_reg.data.ignored import require_ignored
from medseg_reg.data.overview import IGNORED, draw_slice
from medseg_reg.data.preprocessing import ImageSpec
from medseg_reg.data.store import SliceStore
from medseg_reg.data.verify import verify
from medseg_reg.engine.regularization import RegularizationControl
from medseg_reg.errors import MedsegError
from medseg_reg.regularizers import NSDropout, PatchDropout
from tests.stores import describe, make_store
from tests.training import tiny_config


@pytest.fixture
def store(tmp_path) -> SliceStore:
    return make_store(tmp_path / "store", cases=3, slices=3, classes=3, ignore_label=255)


def test_a_store_keeps_them_and_counts_the_others(store):
    assert store.classes == ("background", "class_1", "class_2")
    assert store.ignore_label == 255
    for name, row in store.rows.items():
        mask = np.array(store.mask(name))
        assert (mask == 255).any()
        expected = [int(((one == 1) | (one == 2)).sum()) for one in mask]
        assert list(row.foreground) == expected
    assert verify(store) == []


def test_a_store_without_them_is_written_as_it_always_was(tmp_path):
    made = make_store(tmp_path / "store")
    assert made.ignore_label is None
    about = json.loads((made.path / "manifest.json").read_text())["description"]
    assert "ignore_label" not in about


def test_labels_beyond_the_classes_are_still_found(store, tmp_path):
    path = store.path / "masks" / "case_00.npy"
    mask = np.load(path)
    mask[0, 0, 0] = 254
    np.save(path, mask)
    assert any("holds the label 254, the classes are 0 to 2" in line for line in verify(store))


def test_an_ignored_label_that_is_a_class_is_refused():
    with pytest.raises(ValidationError, match="the ignored label 2 is the class 'class_2'"):
        describe(3, "uint8", ignore_label=2)


@pytest.mark.parametrize(
    ("stored", "asked", "message"),
    [
        (255, None, r"pixels with the label 255 .* Set data.ignore_label=255"),
        (255, 254, r"is 254, but .* was converted with --ignore-label 255. Set"),
        (255, 1, r"is 1, but in .* that is the class 'class_1' \(classes are 0 to 1\)"),
        (None, 255, "is 255, but .* was converted without ignored pixels"),
    ],
)
def test_store_and_configuration_must_agree(tmp_path, stored, asked, message):
    made = make_store(tmp_path / "s", cases=1, slices=1, ignore_label=stored)
    with pytest.raises(MedsegError, match=message):
        require_ignored(made, asked)
    require_ignored(made, stored)


@pytest.mark.parametrize("value", [0, -1, 256, True, 1.5, "all"])
def test_values_that_no_mask_can_hold_are_refused(tmp_path, value):
    content = tiny_config(tmp_path, tmp_path / "run", data__ignore_label=value)
    with pytest.raises(MedsegError, match="data.ignore_label"):
        parse_config(content, "test")


@pytest.mark.parametrize("name", ["Affine", "Rotate", "GridDistortion", "OpticalDistortion"])
def test_what_augmentation_fills_in_is_background(name):
    more = {"rotate": [-40, 40], "translate_percent": [-0.3, 0.3]} if name == "Affine" else {}
    chain = Augmentation([(name, {"p": 1.0, **more})])
    image = np.full((24, 24, 1), 0.5, np.float32)
    for seed in range(3):
        mask = np.full((24, 24), 255, np.uint8)
        mask[8:16, 8:16] = 1
        changed, labels = chain(image, mask, seed)
        # Black comes from outside; no label arises that is neither there nor filled in.
        assert set(np.unique(labels)) <= {0, 1, 255}
        assert not (labels[changed[..., 0] == 0] == 255).any()


def test_what_is_filled_in_on_the_device_is_background():
    chain = DeviceAugmentation([("Affine", {"rotate": [40, 40], "p": 1.0})])
    masks = torch.full((2, 24, 24), 255, dtype=torch.uint8)
    images, labels = chain(torch.full((2, 1, 24, 24), 0.5), masks, [0, 1])
    assert set(labels.unique().tolist()) == {0, 255}
    assert not (labels[images[:, 0] == 0] == 255).any()


def test_what_is_padded_is_background(store):
    spec = ImageSpec(size=(48, 48), fit="crop")
    item = SliceDataset(store, ["case_00"], spec)[0]
    labels = item["mask"].numpy()
    assert (labels[8:40, 8:40] == store.mask("case_00")[0]).all()
    labels[8:40, 8:40] = 0
    assert not labels.any()


def test_slices_of_ignored_pixels_alone_show_no_foreground(tmp_path):
    made = make_store(tmp_path / "s", cases=1, slices=4, empty=1.0, ignore_label=255)
    dataset = SliceDataset(made, ["case_00"], ImageSpec())
    assert dataset.foreground == [True, False, False, False]


def test_their_outline_is_gray():
    mask = np.zeros((32, 32), np.uint8)
    mask[4:12, 4:12], mask[20:28, 20:28] = 1, 255
    drawn = np.asarray(draw_slice(np.zeros((32, 32), np.uint8), mask, 32, ignored=255))
    assert tuple(drawn[20, 20]) == IGNORED
    assert tuple(drawn[4, 4]) not in (IGNORED, (0, 0, 0))


def test_ignored_pixels_are_no_foreground_to_a_layer_that_asks_for_it():
    asks, learns = PatchDropout(protect_foreground=True), NSDropout(classes=2)
    network = nn.Sequential(asks, learns)
    control = RegularizationControl(network, [], 0, ignored=255)
    labels = torch.tensor([[[0, 1], [255, 0]]], dtype=torch.uint8)
    control._give_labels(labels)
    assert asks.labels.tolist() == [[[0, 1], [0, 0]]]
    assert torch.equal(learns.labels, labels)
    control._give_labels(None)
    assert asks.labels is learns.labels is None

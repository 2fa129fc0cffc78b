"""What NSDropout remembers: means of a validation and masks, from batch to batch and run to run."""

import math

import numpy as np
import pytest
import torch

from medseg_reg.regularizers import NSDropout, class_masks, nsdropout
from medseg_reg.regularizers.protocols import LabelReader
from tests.reference import nsdropout as reference
from tests.regularizers.test_nsdropout import validated


def test_recorded_batches_give_the_means_of_the_whole_validation_set() -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(9, 4, 5, 5), torch.randint(2, (9, 5, 5))
    layer = NSDropout(0.3, classes=3).eval()
    layer.recording = True
    for part, part_labels in zip(x.split(4), labels.split(4), strict=True):
        layer.labels = part_labels
        assert layer(part) is part
    assert layer.validation_sums is not None
    assert layer.validation_sums.shape == (3, 5)
    layer.finish_validation()
    assert layer.validation_sums is None
    rows, classes = reference.examples(x.numpy(), labels.numpy())
    assert layer.validation_means is not None
    for c in range(2):
        expected = rows[classes == c].mean(0)
        np.testing.assert_allclose(layer.validation_means[c].numpy(), expected, rtol=1e-4)
    assert layer.validation_means[2].isnan().all()


def test_a_class_absent_from_a_validation_keeps_its_former_means() -> None:
    layer, x = NSDropout(0.3, classes=3), torch.rand(4, 6, 2)
    validated(layer, x, torch.tensor([0, 0, 1, 1]))
    validated(layer, x + 1, torch.tensor([0, 0, 0, 0]))
    means = layer.validation_means
    assert means is not None
    torch.testing.assert_close(means[0], x.mean((0, 2)) + 1)
    torch.testing.assert_close(means[1], x[2:].mean((0, 2)))
    layer.finish_validation()  # nothing was recorded
    assert layer.validation_means is means


def test_a_class_without_a_validation_draws_its_channels_at_random() -> None:
    torch.manual_seed(0)
    layer = validated(NSDropout(0.5, classes=2), torch.zeros(2, 6, 1), torch.zeros(2).int())
    layer.labels = torch.tensor([0, 1])
    x = torch.tensor([1.0, 2, 3, 4, 5, 6]).view(1, 6, 1).expand(2, 6, 1)
    zero = torch.stack([layer(x)[..., 0] == 0 for _ in range(2000)]).float()
    assert (zero.sum(2) == 3).all()
    assert zero[:, 0].mean(0).tolist() == [0, 0, 0, 1, 1, 1]
    assert zero[:, 1].mean(0).numpy() == pytest.approx(0.5, abs=0.06)


def test_nan_channels_are_never_chosen_before_others() -> None:
    difference = torch.tensor([[math.nan, 1.0, math.inf, 0.5], [1.0, 2.0, 3.0, 4.0]])
    keep = class_masks(difference, 0.5)
    assert keep.tolist() == [[True, False, True, False], [True, True, False, False]]
    x = torch.rand(4, 6, 3)
    x[0, 2] = math.nan
    y = nsdropout(x, torch.tensor([0, 0, 1, 1]), torch.zeros(2, 6), 0.5)
    assert y[0, 2].isnan().all()
    assert y[:, [0, 1, 3, 4, 5]].isfinite().all()
    assert ((y == 0).sum((1, 2)) == 9).all()


def test_a_training_loop_knows_that_it_must_be_served() -> None:
    assert isinstance(NSDropout(), LabelReader)


def test_only_recording_adds_to_the_sums() -> None:
    layer, x = NSDropout(0.3).eval(), torch.rand(2, 4, 3)
    layer.labels = torch.tensor([0, 1])
    layer(x)
    assert layer.validation_sums is None
    layer.recording = True
    layer.train()(x)
    assert layer.validation_sums is None
    layer.p = 0.0
    layer.eval()(x)  # a schedule may start at 0
    assert layer.validation_sums is not None


@pytest.mark.parametrize("under_way", [False, True])
def test_a_restored_layer_goes_on_exactly(under_way: bool) -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(6, 5, 4), torch.randint(2, (6, 4))
    layer = validated(NSDropout(0.3), x, labels)
    layer.labels = labels
    layer(x)
    if under_way:
        layer.eval().recording = True
        layer(x)
    memory = layer.memory()
    expected_names = {"validation_means", "masks"} | ({"validation_sums"} if under_way else set())
    assert set(memory) == expected_names
    assert not layer.state_dict()
    twin = NSDropout(0.3)
    twin.load_memory(memory)
    twin.labels = torch.zeros(6).long()
    layer.labels = twin.labels
    for each in (layer, twin):
        each.train().recording = False
        each.finish_validation()
    torch.manual_seed(1)
    expected = layer(x * 2)
    torch.manual_seed(1)
    assert torch.equal(twin(x * 2), expected)
    assert layer.masks is not None
    assert twin.masks is not None
    assert torch.equal(twin.masks, layer.masks)
    twin.load_memory({})
    assert not twin.memory()


def test_memory_of_another_layer_is_refused() -> None:
    layer = NSDropout(0.3, classes=3)
    with pytest.raises(ValueError, match=r"masks must have shape \(3, \.\.\.\).*got \(2, 5\)"):
        layer.load_memory({"masks": torch.ones(2, 5)})
    with pytest.raises(ValueError, match="NSDropout remembers validation_means, masks.*'colour'"):
        layer.load_memory({"colour": torch.ones(3, 5)})
    assert not layer.memory()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("faithful", [False, True])
def test_a_compiled_layer_follows_a_schedule_and_remembers_its_masks(faithful: bool) -> None:
    torch._dynamo.reset()
    x, labels = torch.randn(6, 9, 4), torch.randint(2, (6, 4))
    layer = validated(NSDropout(0.1, faithful=faithful), x, labels)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    layer.labels = labels
    for p in (0.1, 0.3, 0.45, 0.7):
        layer.p = p
        torch.manual_seed(3)
        expected = layer(x)
        masks, layer.masks = layer.masks, None
        torch.manual_seed(3)
        torch.testing.assert_close(compiled(x), expected)
        assert masks is not None
        assert layer.masks is not None
        assert torch.equal(layer.masks, masks)


def test_inferring_a_shape_does_not_touch_the_memory() -> None:
    x, labels = torch.rand(2, 4, 3), torch.tensor([0, 1])
    layer = validated(NSDropout(0.5), x, labels)
    layer.labels = labels
    layer(x)
    masks = layer.masks
    assert layer(x.to("meta")).shape == x.shape
    assert layer.masks is masks

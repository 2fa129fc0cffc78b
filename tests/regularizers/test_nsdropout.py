"""NSDropout against the published algorithm, its memory, and the leak of its inference."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from medseg_reg.regularizers import Dropout, NSDropout, class_masks, class_sums, nsdropout
from tests.reference import nsdropout as reference
from tests.regularizers.contract import RegularizerContract
from tests.scripts import load_script


class TestNSDropoutWithoutLabels(RegularizerContract):
    """Ordinary element dropout, as in the first step of the published algorithm."""

    name = "nsdropout"


def set_labels(layer: NSDropout, inputs: tuple[torch.Tensor]) -> None:
    """Labels every pixel (with some of no class) and gives the means of a validation."""
    x = inputs[0]
    if layer.training and x.dim() > 2:
        sizes = (len(x), *x.shape[2:])
        number = torch.arange(math.prod(sizes), device=x.device)
        layer.labels = (number % (layer.classes + 1)).view(sizes)
        layer.validation_means = torch.zeros(layer.classes, x.shape[1])


class LabelledContract(RegularizerContract):
    """The later steps: the means of a class couple the samples of a batch.

    The rounding of p*C is drawn once per class and batch, so the rate is tested over many batches
    below; pixels of no class are not dropped.
    """

    name = "nsdropout"
    independent = False
    calibrated = False

    def make(self, p: float = 0.3) -> Any:
        layer = super().make(p)
        layer.register_forward_pre_hook(set_labels)
        return layer


class TestNSDropout(LabelledContract):
    parameters = {"classes": 3}  # noqa: RUF012


class TestNSDropoutFaithful(LabelledContract):
    parameters = {"classes": 2, "faithful": True, "eval_mode": "true_label"}  # noqa: RUF012


def validated(layer: NSDropout, x: torch.Tensor, labels: torch.Tensor) -> NSDropout:
    """The layer after a validation on one batch, in training."""
    layer.eval()
    layer.recording, layer.labels = True, labels
    layer(x)
    layer.recording, layer.labels = False, None
    layer.finish_validation()
    return layer.train()


@pytest.mark.parametrize(
    ("sizes", "label_sizes"),
    [((1,), None), ((1,), (1,)), ((6, 5), None), ((6, 5), (6, 5)), ((6, 5), (13, 8)),
     ((6, 5), (2, 3)), ((9,), (4,)), ((3, 4, 2), (6, 4, 5))],
)  # fmt: skip
@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_a_step_equals_the_published_algorithm(
    sizes: tuple[int, ...], label_sizes: tuple[int, ...] | None, rate: float
) -> None:
    torch.manual_seed(0)
    x, x_val = torch.randn(24, 11, *sizes), torch.randn(17, 11, *sizes)
    y, y_val = (torch.randint(3, (len(m), *(label_sizes or ()))) for m in (x, x_val))
    layer = validated(NSDropout(rate, classes=3, faithful=True), x_val, y_val)
    layer.labels = y
    output = layer(x)

    rows, classes = reference.examples(x.numpy(), y.numpy())
    masks = reference.published_masks(
        rows, classes, *reference.examples(x_val.numpy(), y_val.numpy()), rate
    )
    assert layer.masks is not None
    np.testing.assert_array_equal(layer.masks.numpy(), np.stack([masks[c] for c in range(3)]))
    if label_sizes is None:  # one mask for all pixels of a sample
        rows = np.moveaxis(x.numpy(), 1, -1).reshape(-1, 11).astype(np.float64)
        classes = classes.repeat(len(rows) // len(classes))
    expected = reference.published_output(rows, classes, masks, rate)
    result = output.movedim(1, -1).reshape(-1, 11).numpy()
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)
    means = layer.validation_means
    assert means is not None
    assert torch.equal(nsdropout(x, y, means, rate, faithful=True), output)


def test_the_difference_is_signed() -> None:
    x = torch.tensor([[[0.0], [-5.0], [1.0]]])
    y = nsdropout(x + 9, torch.tensor([0]), torch.full((1, 3), 9.0), 1 / 3, faithful=True)
    assert (y[0, :, 0] == 0).tolist() == [False, False, True]  # not the farthest, the largest


def test_a_channel_that_learnt_its_training_set_is_dropped_at_that_class_alone() -> None:
    torch.manual_seed(0)
    x, x_val = torch.rand(8, 6, 10, 10), torch.rand(8, 6, 10, 10)
    y = torch.randint(2, (8, 10, 10))
    x[:, 4] += 0.5 * (y == 1)
    x[:, 2] += 0.5 * (y == 0)
    layer = validated(NSDropout(1 / 6, faithful=True), x_val, y)
    layer.labels = y
    zero = layer(x) == 0
    assert zero[:, 4][y == 1].all()
    assert zero[:, 2][y == 0].all()
    assert zero.sum() == y.numel()


def test_dense_labels_of_another_size_are_taken_at_the_centre_of_each_pixel() -> None:
    labels = torch.arange(6).view(1, 6)
    sums = class_sums(torch.ones(1, 1, 3), labels, classes=6)
    assert sums[:, 1].tolist() == [0, 1, 0, 1, 0, 1]
    assert class_sums(torch.ones(1, 1, 12), labels, 6)[:, 1].tolist() == [2] * 6


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.bool])
def test_the_sums_equal_the_reference_for_any_kind_of_label(dtype: torch.dtype) -> None:
    x, labels = torch.randn(3, 4, 5, 6), torch.randint(2, (3, 5, 6))
    rows, classes = reference.examples(x.numpy(), labels.numpy())
    for layout in (x, x.to(memory_format=torch.channels_last)):
        sums = class_sums(layout, labels.to(dtype), 2)
        for c in range(2):
            expected = [*rows[classes == c].sum(0), (classes == c).sum()]
            np.testing.assert_allclose(sums[c].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_the_sums_stay_in_float32_under_autocast() -> None:
    x, labels = torch.randn(3, 4, 5, 6), torch.randint(2, (3, 5, 6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums = class_sums(x, labels, 2)
    assert torch.equal(sums, class_sums(x, labels, 2))


@pytest.mark.parametrize("ignored", [-1, 2, 255])
def test_pixels_of_no_class_are_neither_counted_nor_changed(ignored: int) -> None:
    torch.manual_seed(0)
    x, labels = torch.rand(2, 5, 4, 4) + 0.5, torch.randint(2, (2, 4, 4))
    expected = class_sums(x[:, :, :2], labels[:, :2], 2)
    labels[:, 2:] = ignored
    torch.testing.assert_close(class_sums(x, labels, 2), expected)
    y = nsdropout(x, labels, torch.zeros(2, 5), 0.4)
    assert torch.equal(y[:, :, 2:], x[:, :, 2:])
    kept = y[:, :, :2] != 0
    assert kept.float().mean().item() == pytest.approx(0.6)
    torch.testing.assert_close(y[:, :, :2][kept], x[:, :, :2][kept] / 0.6)


@pytest.mark.parametrize("channels", [1, 3, 7, 10])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_default_rate_is_p_for_any_number_of_channels(channels: int, p: float) -> None:
    torch.manual_seed(0)
    layer = NSDropout(p, classes=40)
    layer.labels, layer.validation_means = torch.arange(40), torch.zeros(40, channels)
    x = torch.rand(40, channels, 1) + 0.5
    rates = [layer.measured_rate(x, layer(x)) for _ in range(400)]
    assert np.mean(rates) == pytest.approx(p, abs=0.01)
    assert NSDropout(0.1, faithful=True).p * 4 < 0.5  # as published: round(.4) is none
    assert class_masks(torch.rand(2, 4), 0.1, faithful=True).all()


def test_the_first_steps_are_ordinary_dropout() -> None:
    x, layer = torch.randn(4, 6, 5, 5), NSDropout(0.3)
    layer.labels = torch.randint(2, (4, 5, 5))
    torch.manual_seed(1)
    expected = Dropout(0.3)(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), expected)  # labels, but no validation yet
    validated(layer, x, layer.labels)
    torch.manual_seed(1)
    assert torch.equal(layer(x), expected)  # a validation, but no labels
    assert layer.masks is None


def test_a_class_absent_from_a_batch_keeps_its_mask() -> None:
    torch.manual_seed(0)
    layer = NSDropout(0.5, classes=2)
    layer.validation_means = torch.zeros(2, 8)
    layer.labels = torch.tensor([0, 1])
    layer(torch.rand(2, 8, 3))
    assert layer.masks is not None
    first = layer.masks.clone()
    layer.labels = torch.tensor([0, 0])
    for _ in range(5):
        layer(torch.rand(2, 8, 3))
        assert torch.equal(layer.masks[1], first[1])
    assert not torch.equal(layer.masks[0], first[0])


def trained(eval_mode: str, p: float = 0.5) -> tuple[NSDropout, torch.Tensor]:
    torch.manual_seed(0)
    layer = NSDropout(p, classes=2, eval_mode=eval_mode)
    x = torch.rand(4, 6, 3) + 0.5
    layer.masks = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0]]).bool()
    return layer.eval(), x


def test_without_a_mode_inference_is_the_identity() -> None:
    layer, x = trained("none")
    assert layer(x) is x
    assert layer.valid_for_reporting


def test_the_mean_mask_is_the_expected_factor_over_the_classes() -> None:
    layer, x = trained("mean_mask")
    expected = x * torch.tensor([1.0, 2, 2, 1, 0, 0]).view(6, 1)
    torch.testing.assert_close(layer(x), expected)
    assert layer(x.half()).dtype == torch.float16
    assert layer.valid_for_reporting
    layer.p = 0.0
    assert layer(x) is x


def test_the_true_labels_mask_is_the_published_inference_and_says_that_it_is_invalid() -> None:
    layer, x = trained("true_label")
    layer.labels = torch.tensor([0, 1, 1, 0])
    assert layer.masks is not None
    assert torch.equal(layer(x), x * layer.masks[layer.labels].float()[..., None])
    assert not layer.valid_for_reporting
    assert "invalid for reporting" in " ".join((NSDropout.__doc__ or "").split())
    layer.labels = None
    with pytest.raises(ValueError, match="true_label reads labels, but none were set"):
        layer(x)


def test_recording_without_labels_is_an_error() -> None:
    layer = NSDropout(0.3).eval()
    layer.recording = True
    with pytest.raises(ValueError, match=r"recording reads labels.*assign layer\.labels"):
        layer(torch.ones(1, 2, 3))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(3).long(), r"needs labels \(4,\) or \(4, \*size\) with 2.*got shape \(3,\)"),
        (torch.zeros(4, 5).long(), r"got shape \(4, 5\)"),
        (torch.zeros(4, 1, 5, 5).long(), r"got shape \(4, 1, 5, 5\)"),
        (torch.zeros(4), r"torch.float32.*labels\.long\(\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: torch.Tensor, message: str) -> None:
    layer, x = NSDropout(0.3), torch.ones(4, 6, 5, 5)
    layer.validation_means, layer.labels = torch.zeros(2, 6), labels
    with pytest.raises(ValueError, match=f"NSDropout: .*{message}"):
        layer(x)
    layer.eval().recording = True
    with pytest.raises(ValueError, match=message):
        layer(x)


def test_a_layer_at_two_places_is_refused() -> None:
    layer = validated(NSDropout(0.3), torch.ones(2, 6, 1), torch.tensor([0, 1]))
    layer.labels = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"has 5 channels.*\(2, 6\).*one layer serves one place"):
        layer(torch.ones(2, 5, 1))
    layer.eval().recording = True
    layer(torch.ones(2, 6, 1))
    with pytest.raises(ValueError, match=r"has 5 channels.*one layer serves one place"):
        layer(torch.ones(2, 5, 1))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"classes": 0}, "classes must be a whole number"),
        (
            {"eval_mode": "predicted"},
            r"eval_mode of nsdropout 'predicted'.*none, mean_mask, true_l",
        ),
        ({"eval_mode": "true label"}, "did you mean 'true_label'"),
    ],
)
def test_bad_parameters_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NSDropout(0.2, **parameters)


def test_the_functions_refuse_other_shapes_and_do_nothing_outside_training() -> None:
    x, labels = torch.ones(1, 4, 1), torch.tensor([0])
    with pytest.raises(ValueError, match=r"expected \(classes, C\), got shape \(3,\)"):
        class_masks(torch.ones(3))
    assert nsdropout(x, labels, torch.zeros(2, 4), 0.5, training=False) is x
    assert nsdropout(x, labels, torch.zeros(2, 4), 0.0) is x
    layer = NSDropout()
    assert (layer.p, layer.classes, layer.eval_mode) == (0.2, 2, "none")


def test_the_true_labels_mask_classifies_noise() -> None:
    bench: Any = load_script("benchmarks/nsdropout_leak.py")
    torch.manual_seed(0)
    x, y = torch.randn(1300, 64), torch.randint(10, (1300,))  # nothing can be learnt
    for layer, least in ((NSDropout(0.5, 10), 0.2), (bench.RandomMasks(0.5, 10), 0.8)):
        (accuracy,) = bench.train(layer, x, y, looks=(60,)).values()
        assert accuracy.none < 0.15
        assert accuracy.mean_mask < 0.15
        assert accuracy.published > least
        assert accuracy.wrong > least


def test_on_digits_random_masks_do_as_well_as_the_method_and_both_by_the_leak() -> None:
    pytest.importorskip("sklearn.datasets", reason="the digits of scikit-learn")
    bench: Any = load_script("benchmarks/nsdropout_leak.py")
    arms = {
        "plain": (lambda: Dropout(0.0), 200),
        "method": (lambda: NSDropout(0.5, 10), 200),
        "random": (lambda: bench.RandomMasks(0.5, 10), 200),
    }
    found = {name: bench.run(arm, seeds=1, looks=(2, 60)) for name, arm in arms.items()}
    plain, method, random = (one[60] for one in found.values())
    assert plain.none > 0.85
    for accuracy in (method, random):
        assert accuracy.published > 0.97
        assert accuracy.wrong > 0.7
        assert max(accuracy.none, accuracy.mean_mask) < 0.6 < plain.none - 0.2
    assert random.published > method.published - 0.02

    lines = bench.table(found).splitlines()
    assert lines[0] == "| trained with | test | 2 | 60 |"
    assert f"| method | mask of the true class | {found['method'][2].published:.2f} " in lines[3]
    assert len(lines) == 2 + 1 + 2 * 4  # without masks there is one way to test

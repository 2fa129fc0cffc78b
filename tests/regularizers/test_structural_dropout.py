"""Structural Dropout against the paper's rule, its published quirk, and narrowing."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from medseg_reg.regularizers import (
    StructuralDropout,
    kept_channels,
    structural_dropout,
    width_scale,
)
from tests.reference import structural_dropout as reference
from tests.regularizers.contract import RegularizerContract


class StructuralContract(RegularizerContract):
    """p is the probability of a cut, so the rate is tested below instead."""

    calibrated = False

    def test_a_schedule_may_assign_the_rate(self) -> None:
        layer, x = self.make(0.0), self.positive(1, 6, 1)
        layer.p = 0.9
        assert layer(x) is not x
        assert sum(layer.measured_rate(x, layer(x)) for _ in range(40)) / 40 > 0.2
        layer.p = 0
        assert layer(x) is x


class TestStructuralDropout(StructuralContract):
    name = "structural_dropout"


class TestStructuralDropoutInSteps(StructuralContract):
    name = "structural_dropout"
    parameters = {"lower_bound": 2, "step": 2}  # noqa: RUF012


class TestStructuralDropoutFaithful(StructuralContract):
    name = "structural_dropout"
    parameters = {"faithful": True}  # noqa: RUF012


def kept_counts(passes: int, channels: int, *args: Any, **options: Any) -> Counter[int]:
    """How often each number of channels was kept, n for a pass that was not cut."""
    x = torch.ones(1, channels, 1)
    return Counter(int((structural_dropout(x, *args, **options) != 0).sum()) for _ in range(passes))


@pytest.mark.parametrize(
    ("channels", "lower_bound", "step"),
    [(8, None, 1), (20, None, 1), (7, 1, 1), (12, 4, 3), (9, 3, 4), (2, 1, 5)],
)
def test_a_cut_pass_keeps_each_allowed_width_equally_often(
    channels: int, lower_bound: int | None, step: int
) -> None:
    torch.manual_seed(0)
    p, passes = 0.6, 3000
    counts = kept_counts(passes, channels, p, lower_bound, step)
    allowed = reference.widths(channels, lower_bound or math.ceil(channels / 8), step)
    assert set(counts) == {*allowed, channels}
    share = p / len(allowed)
    error = 4 * math.sqrt(share * (1 - share) / passes)
    for width in allowed:
        assert counts[width] / passes == pytest.approx(share, abs=error)
    assert counts[channels] / passes == pytest.approx(1 - p, abs=0.04)


@pytest.mark.parametrize(
    ("channels", "lower_bound", "step"), [(64, None, 1), (7, None, 1), (12, 4, 3)]
)
@pytest.mark.parametrize("p", [0.2, 0.5])
def test_the_share_of_dropped_channels_is_the_documented_one(
    channels: int, lower_bound: int | None, step: int, p: float
) -> None:
    torch.manual_seed(0)
    layer, x = StructuralDropout(p, lower_bound, step), torch.ones(1, channels, 1)
    rates = [layer.measured_rate(x, layer(x)) for _ in range(4000)]
    expected = reference.expected_share(p, channels, lower_bound or math.ceil(channels / 8), step)
    assert np.mean(rates) == pytest.approx(expected, abs=0.02)


def test_the_default_drops_about_22_percent() -> None:
    assert reference.expected_share(0.5, 64, 8, 1) == pytest.approx(0.22, abs=0.005)


def test_every_pass_is_the_whole_map_or_the_reference_cut() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 10, 3, 4)
    seen = set()
    for _ in range(100):
        y = structural_dropout(x, 0.7)
        kept = int((y[0, :, 0, 0] != 0).sum())
        seen.add(kept)
        np.testing.assert_allclose(y.numpy(), reference.cut(x.numpy(), kept), rtol=1e-6)
    assert seen == set(range(2, 11))


def test_the_factor_is_rounded_once_in_half_precision() -> None:
    torch.manual_seed(0)
    x = torch.ones(1, 999, 1, dtype=torch.bfloat16)
    for _ in range(30):
        y = structural_dropout(x, 0.99)
        assert torch.equal(y.max(), torch.tensor(999 / int((y != 0).sum())).bfloat16())


def test_one_draw_serves_the_whole_batch() -> None:
    torch.manual_seed(0)
    for _ in range(20):
        kept = (structural_dropout(torch.ones(50, 16, 2), 0.9) != 0).sum((1, 2))
        assert kept.unique().numel() == 1


def test_the_default_factor_is_never_above_eight() -> None:
    torch.manual_seed(0)
    for channels in (8, 17, 64):
        x = torch.ones(1, channels, 1)
        assert max(structural_dropout(x, 0.99).max().item() for _ in range(300)) <= 8.0
    assert max(structural_dropout(x, 0.99, faithful=True).max().item() for _ in range(500)) > 8.0


@pytest.mark.parametrize(("channels", "lower_bound"), [(1, None), (4, 4), (4, 9)])
def test_a_map_without_a_narrower_width_is_never_cut(channels: int, lower_bound: int) -> None:
    x = torch.ones(2, channels, 3)
    assert structural_dropout(x, 0.99, lower_bound) is x


@pytest.mark.parametrize(("p", "probability"), [(0.5, 1.0), (0.01, 0.2003), (0.1, 0.6435)])
def test_the_faithful_rule_cuts_as_often_as_the_published_code(
    p: float, probability: float
) -> None:
    torch.manual_seed(0)
    assert reference.published_probability(p) == pytest.approx(probability, abs=1e-4)
    counts = kept_counts(1500, 8, p, faithful=True)
    assert 1 - counts[8] / 1500 == pytest.approx(probability, abs=0.05)
    assert 1 in counts
    plain = kept_counts(1500, 8, p)
    assert 1 - plain[8] / 1500 == pytest.approx(p, abs=0.05)


@pytest.mark.parametrize(
    ("channels", "width", "kept"),
    [(16, None, 16), (16, 1.0, 16), (16, 1, 1), (16, 0.5, 8), (25, 0.28, 7), (10, 0.701, 8),
     (7, 1 / 8, 1), (20, 1 / 8, 3), (3, 1e-9, 1), (16, 16, 16), (16, np.int64(5), 5)],
)  # fmt: skip
def test_a_width_is_a_count_or_a_share_rounded_up(
    channels: int, width: float | int | None, kept: int
) -> None:
    assert kept_channels(channels, width) == kept
    assert width_scale(channels, kept) == channels / kept


def test_an_eighth_is_the_narrowest_width_that_was_trained() -> None:
    for channels in range(2, 70):
        trained = reference.widths(channels, math.ceil(channels / 8), 1)
        assert kept_channels(channels, 1 / 8) == min(trained)


@pytest.mark.parametrize("width", [0, -1, 0.0, 1.5, math.nan, math.inf, True, "0.5", [1]])
def test_a_bad_width_is_refused_at_once(width: Any) -> None:
    layer = StructuralDropout()
    with pytest.raises(ValueError, match="StructuralDropout: width must be None, a whole number"):
        layer.width = width
    assert layer.width is None
    with pytest.raises(ValueError, match="kept_channels: width must be"):
        kept_channels(8, width)


def test_more_channels_than_there_are_is_an_error() -> None:
    layer = StructuralDropout().eval()
    layer.width = 9
    with pytest.raises(ValueError, match=r"the map has 8 channels.*pass a share"):
        layer(torch.ones(1, 8, 1))
    with pytest.raises(ValueError, match="kept must be a whole number, 1 to 8; got 9"):
        width_scale(8, 9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("width", [3, 0.5, 0.9])
def test_eval_at_a_width_is_the_reference_cut(width: float | int, dtype: torch.dtype) -> None:
    layer, x = StructuralDropout().eval(), torch.randn(2, 8, 3, 4).to(dtype)
    layer.width = width
    y = layer(x)
    assert y.dtype == dtype
    tolerance = 1e-3 if dtype == torch.float16 else 1e-6 if dtype == torch.float32 else 1e-14
    expected = reference.cut(x.numpy(), kept_channels(8, width))
    np.testing.assert_allclose(y.numpy(), expected, rtol=tolerance)
    layer.p = 0.0  # the width is no matter of the rate
    assert torch.equal(layer(x), y)


def test_the_whole_width_returns_the_same_tensor_and_training_ignores_the_width() -> None:
    layer, x = StructuralDropout(0.01).eval(), torch.ones(1, 8, 2)
    for width in (None, 1.0, 8):
        layer.width = width
        assert layer(x) is x
    layer.width = 1
    layer.train()
    torch.manual_seed(0)
    assert sum(torch.equal(layer(x), x) for _ in range(20)) >= 18


def test_a_network_cut_by_hand_gives_the_output_of_the_narrowed_layer() -> None:
    torch.manual_seed(0)
    first, second = torch.nn.Conv2d(1, 12, 3), torch.nn.Conv2d(12, 2, 3)
    layer, x = StructuralDropout().eval(), torch.randn(2, 1, 9, 8)
    layer.width = 0.4
    expected = second(layer(first(x).relu()))
    kept = kept_channels(12, layer.width)
    small, after = torch.nn.Conv2d(1, kept, 3), torch.nn.Conv2d(kept, 2, 3)
    small.load_state_dict({name: value[:kept] for name, value in first.state_dict().items()})
    after.weight.data = second.weight.data[:, :kept] * width_scale(12, kept)
    after.bias = second.bias
    torch.testing.assert_close(after(small(x).relu()), expected)


@pytest.mark.parametrize("parameters", [{"lower_bound": 0}, {"lower_bound": 2.0}, {"step": 0}])
def test_bad_parameters_are_refused(parameters: dict[str, Any]) -> None:
    name = next(iter(parameters))
    for make in (StructuralDropout, lambda **options: structural_dropout(torch.ones(1), **options)):
        with pytest.raises(ValueError, match=f"{name} must be a whole number, 1 or more"):
            make(**parameters)


def test_the_defaults_are_those_of_the_paper_and_the_function_is_identity_outside() -> None:
    layer, x = StructuralDropout(), torch.ones(1, 4, 1)
    assert (layer.p, layer.lower_bound, layer.step) == (0.5, None, 1)
    assert structural_dropout(x, 0.5, training=False) is x
    assert structural_dropout(x, 0.0) is x


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("faithful", [False, True])
def test_a_compiled_layer_follows_a_schedule(faithful: bool) -> None:
    torch._dynamo.reset()
    layer, x = StructuralDropout(0.1, faithful=faithful), torch.ones(2, 9, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for p in (0.1, 0.3, 0.45, 0.7):
        layer.p = p
        torch.manual_seed(3)
        expected = layer(x)
        torch.manual_seed(3)
        assert torch.equal(compiled(x), expected)

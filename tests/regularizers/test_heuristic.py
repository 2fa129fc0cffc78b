"""Heuristic Dropout against the paper's formulas, its golden values and its flaws."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_reg.regularizers import HeuristicDropout, heuristic_dropout, heuristic_scores
from tests.reference import heuristic as reference
from tests.regularizers.contract import RegularizerContract

GOLDEN = torch.tensor(
    [
        [[1.0] * 4] * 4,
        [[0.0, 0.1, 0.2, 0.3], [0.4, 0.5, 0.6, 0.7], [0.8, 0.9, 1.0, 1.1], [1.2, 1.3, 1.4, 1.5]],
        [[0.0] * 4, [0.0, 2, 2, 0], [0.0, 2, 2, 0], [0.0] * 4],
        [[0.0, 0.05, 0.1, 0.2], [0.4, 0.8, 1.6, 3.2], [0.0] * 4, [0.5] * 4],
    ]
)[None]


class TestHeuristicDropout(RegularizerContract):
    name = "heuristic_dropout"
    spares_dead = False  # they score highest


class TestSampled(RegularizerContract):
    name = "heuristic_dropout"
    spares_dead = False  # they score highest
    parameters = {"selection": "sampled", "bins": 4, "signed": True}  # noqa: RUF012


class TestZero(RegularizerContract):
    name = "heuristic_dropout"
    spares_dead = False  # they score highest
    parameters = {"mask": "zero"}  # noqa: RUF012


class TestFaithful(RegularizerContract):
    name = "heuristic_dropout"
    parameters = {"faithful": True}  # noqa: RUF012
    calibrated = False

    def test_a_schedule_may_assign_the_rate(self) -> None:
        layer = self.make(0.0)
        layer.p = 0.5
        x = self.positive(2, 6, 8, 8)
        assert layer.measured_rate(x, layer(x)) == 0.5


def test_the_scores_are_the_golden_values() -> None:
    scores = heuristic_scores(GOLDEN)
    assert scores.entropy[0].tolist() == pytest.approx([0, 2.187322, 0.562335, 1.754105], abs=1e-5)
    assert scores.variance[0].tolist() == pytest.approx([0, 0.226667, 0.8, 0.686323], abs=1e-5)
    assert scores.score[0].tolist() == pytest.approx([2e7, 11.010848, 3.062335, 4.668185], 1e-5)
    assert heuristic_scores(GOLDEN, k=3).score[0, 1].item() == pytest.approx(15.422611, 1e-5)
    assert scores.score[0].argsort(descending=True).tolist() == [0, 1, 3, 2]


def test_the_laplacian_is_the_golden_one() -> None:
    y = heuristic_dropout(GOLDEN[:, 2:3], p=0.99, faithful=True)
    edge, middle = [-2.0, -4, -4, -2], [-4.0, 10, 10, -4]
    assert y[0, 0].tolist() == [edge, middle, middle, edge]


def test_a_constant_channel_becomes_its_border() -> None:
    y = heuristic_dropout(torch.ones(1, 1, 4, 4), p=0.99, faithful=True)[0, 0]
    assert (y[0, 0], y[0, 1], y[1, 1]) == (5, 3, 0)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("size", [(40,), (9, 13), (5, 6, 7), (1, 2)])
def test_the_scores_equal_the_reference(size: tuple[int, ...], signed: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, *size)
    expected = [[reference.score(c, 2.0, 10, signed) for c in s] for s in x.numpy()]
    result = heuristic_scores(x, signed=signed).score
    np.testing.assert_allclose(result.numpy(), expected, rtol=2e-5)


@given(
    bins=st.integers(1, 40),
    k=st.floats(0, 10),
    scale=st.floats(0.01, 20),
    shift=st.floats(-2, 2),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_scores_equal_the_reference_for_any_parameter(
    bins: int, k: float, scale: float, shift: float, seed: int
) -> None:
    noise = torch.randn(1, 2, 7, 9, generator=torch.Generator().manual_seed(seed))
    x = noise * scale + shift
    expected = [[reference.score(c, k, bins) for c in s] for s in x.numpy()]
    # A k near 0 makes scores that float32 cannot hold.
    found = heuristic_scores(x, k, bins).score.numpy()
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-30)


@pytest.mark.parametrize("size", [(30,), (8, 5), (4, 5, 3)])
def test_the_faithful_rule_equals_the_reference(size: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    x = torch.randn(3, 10, *size).relu()
    expected = reference.heuristic_dropout(x.numpy(), p=0.3)
    y = heuristic_dropout(x, p=0.3, faithful=True)
    np.testing.assert_allclose(y.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("bins", [1, 3, 10, 16])
def test_values_beside_a_threshold_fall_where_rounding_puts_them(bins: int) -> None:
    middle = torch.atanh((torch.arange(-bins, bins) + 0.5).double() / bins).float()
    steps = torch.tensor([-1e-5, -1e-6, 0, 1e-6, 1e-5])
    x = (middle[:, None] * (1 + steps)).flatten()
    # one value a channel: the level shows as the entropy of the value beside one known level
    level = torch.round(torch.tanh(x.double()).float() * bins).long()
    for v, expected in zip(x, level, strict=True):
        known = torch.full((1, 1, 2), 20.0)  # level `bins`
        known[..., 0] = v
        alone = expected == bins or (expected < 0)
        entropy = heuristic_scores(known, bins=bins).entropy.item()
        assert entropy == pytest.approx(0.0 if alone else math.log(2)), (v, expected)


def test_an_exact_tie_rounds_to_the_even_level() -> None:
    # 2 * tanh(x) = .5 and 1.5: to levels 0 and 2; a value of level 0 and of level 2 beside them
    low, high = math.atanh(0.25), math.atanh(0.75)
    nearest = [torch.tensor(v).float() for v in (low, high)]
    levels = [torch.round(torch.tanh(v) * 2).item() for v in nearest]
    for v, level in zip(nearest, levels, strict=True):
        pair = torch.tensor([[[v, 20.0]]])
        assert heuristic_scores(pair, bins=2).entropy.item() == pytest.approx(
            0.0 if level == 2 else math.log(2)
        )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_layout_and_the_block_size_do_not_change_the_scores(
    memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(3, 7, 9, 8).relu()
    expected = heuristic_scores(x)
    monkeypatch.setattr("medseg_reg.regularizers.kernels.blocks.BLOCK", 100)
    for result, value in zip(
        heuristic_scores(x.to(memory_format=memory_format)), expected, strict=True
    ):
        torch.testing.assert_close(result, value)


def test_a_large_offset_does_not_spoil_the_variance() -> None:
    x = torch.randn(1, 2, 64, 64)
    shifted = heuristic_scores(x + 1000).variance
    torch.testing.assert_close(shifted, x.var((2, 3)), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("channels", "p", "count"), [(3, 0.1, 0), (5, 0.5, 2), (7, 0.5, 4)])
def test_the_faithful_count_is_bankers_rounding(channels: int, p: float, count: int) -> None:
    layer = HeuristicDropout(p, faithful=True)
    x = torch.rand(4, channels, 6, 6)
    y = layer(x)
    assert ((x != y).flatten(2).any(-1).sum(1) == count).all()
    assert torch.equal(layer(x), y)
    assert (y is x) == (count == 0)


def test_a_whole_count_needs_no_chance() -> None:
    x = torch.rand(2, 30, 5, 5)
    state = torch.get_rng_state()
    y = heuristic_dropout(x, p=0.1)  # .1 * 30 is 3.0000000000000004
    assert ((x != y).flatten(2).any(-1).sum(1) == 3).all()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("selection", ["top", "sampled"])
def test_unselected_channels_are_untouched_and_samples_independent(selection: Any) -> None:
    x = torch.rand(3, 8, 6, 5)
    y = heuristic_dropout(x, p=0.25, selection=selection)
    changed = (x != y).flatten(2).any(-1)
    assert (changed.sum(1) == 2).all()
    assert torch.equal(y[~changed], x[~changed])
    if selection == "top":
        alone = torch.cat([heuristic_dropout(s[None], p=0.25) for s in x])
        assert torch.equal(alone, y)


def test_sampling_prefers_high_scores_but_takes_every_channel_sometimes() -> None:
    torch.manual_seed(0)
    scale = torch.tensor([0.1, 0.3, 1.0, 3.0])[None, :, None, None]
    x = (torch.randn(1, 4, 16, 16) * scale).relu().expand(4000, -1, -1, -1).contiguous()
    y = heuristic_dropout(x, p=0.25, selection="sampled")
    share = (x != y).flatten(2).any(-1).float().mean(0)
    assert (share.diff() < 0).all()
    assert share[-1] > 0.01
    assert share.sum().item() == pytest.approx(1.0)


def test_dead_channels_come_first_and_make_the_layer_a_no_op() -> None:
    x = torch.rand(2, 10, 6, 6)
    x[:, 4] = 0
    layer = HeuristicDropout(0.1)
    assert torch.equal(layer(x), x)
    assert layer.measured_rate(x, layer(x)) == 0


def test_nan_and_infinite_channels_are_filtered_last() -> None:
    x = torch.rand(1, 4, 6, 6)
    x[0, 1, 0, 0], x[0, 2, 0, 0] = math.nan, math.inf
    for selection in ("top", "sampled"):
        y = heuristic_dropout(x, p=0.5, selection=selection)  # type: ignore[arg-type]
        changed = ~torch.isclose(x, y, rtol=0, atol=0, equal_nan=True).flatten(2).all(-1)
        assert changed[0].tolist() == [True, False, False, True]


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
def test_the_scores_of_constant_channels_are_finite(value: float) -> None:
    for size in ((1,), (1, 1), (4, 4)):
        scores = heuristic_scores(torch.full((2, 3, *size), value))
        assert all(t.isfinite().all() for t in scores)
        assert (scores.variance == 0).all()


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("p", [0.1, 0.9])
def test_zeroing_always_leaves_a_channel(channels: int, p: float) -> None:
    y = heuristic_dropout(torch.rand(200, channels, 3, 3) + 0.1, p=p, mask="zero")
    assert (y != 0).flatten(1).any(1).all()


def test_the_gradient_of_a_zeroed_channel_is_zero() -> None:
    x = torch.rand(1, 4, 3, 3, requires_grad=True)
    y = heuristic_dropout(x, p=0.25, mask="zero")
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, (y != 0).float())


def test_half_precision_scores_as_the_same_values_in_float32() -> None:
    x = torch.rand(2, 4, 16, 16).bfloat16()
    for half, full in zip(heuristic_scores(x), heuristic_scores(x.float()), strict=True):
        assert half.dtype == torch.float32
        assert torch.equal(half, full)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"mask": "laplacian"}, "did you mean 'laplace'"),
        ({"selection": "topk"}, "did you mean 'top'"),
        ({"bins": 0}, "bins must be a whole number, 1 to 1000; got 0"),
        ({"bins": 2.5}, "bins must be a whole number"),
        ({"k": -1}, "k must be a finite number at least 0, got -1"),
        ({"k": math.nan}, "k must be"),
        ({"k": math.inf}, "k must be"),
        ({"faithful": True, "signed": True}, "Use faithful=False"),
        ({"faithful": True, "selection": "sampled"}, "Use faithful=False"),
    ],
)
def test_bad_parameters_are_refused_by_module_and_function(
    parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        HeuristicDropout(0.1, **parameters)
    with pytest.raises(ValueError, match=message):
        heuristic_dropout(torch.rand(1, 4, 3, 3), 0.1, **parameters)


def test_only_sampling_counts_as_stochastic() -> None:
    assert not HeuristicDropout.stochastic
    assert not HeuristicDropout(0.1).stochastic
    assert HeuristicDropout(0.1, selection="sampled").stochastic


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_schedule_recompiles_only_when_the_number_of_channels_changes() -> None:
    torch._dynamo.reset()
    layer = HeuristicDropout(0.3)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.rand(2, 7, 5, 5)
    for step in range(20):
        layer.p = 0.3 + step / 200
        torch.manual_seed(step)
        expected = layer(x)
        torch.manual_seed(step)
        assert torch.allclose(compiled(x), expected)


def test_the_function_is_identity_outside_training() -> None:
    x = torch.rand(1, 4, 3, 3)
    assert heuristic_dropout(x, 0.5, training=False) is x
    assert heuristic_dropout(x, 0.0) is x

"""CorrDrop against the paper's equations, its golden values and its flaws."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from medseg_reg.regularizers import (
    CorrDropChannel,
    CorrDropSpatial,
    corrdrop_channel,
    corrdrop_spatial,
    drop_probability,
    drop_rates,
    row_correlation,
)
from medseg_reg.regularizers import corrdrop as module
from tests.reference import corrdrop as reference
from tests.regularizers.contract import RegularizerContract

GOLDEN = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 2], [1, 0, 0]])
GOLDEN_F = [0.341421, 0.141421, 0.424264, 0.0, 0.341421]


class TestCorrDropSpatial(RegularizerContract):
    name = "corrdrop_spatial"


class TestCorrDropSpatialSharp(RegularizerContract):
    name = "corrdrop_spatial"
    parameters = {"block_size": 2, "temperature": 0.2}  # noqa: RUF012


class TestCorrDropSpatialFaithful(RegularizerContract):
    name = "corrdrop_spatial"
    parameters = {"faithful": True, "block_size": 3}  # noqa: RUF012
    calibrated = False


class TestCorrDropChannel(RegularizerContract):
    name = "corrdrop_channel"


class TestCorrDropChannelFaithful(RegularizerContract):
    name = "corrdrop_channel"
    parameters = {"faithful": True}  # noqa: RUF012
    calibrated = False


def test_the_correlation_is_the_golden_value() -> None:
    for rows in (GOLDEN, GOLDEN * torch.tensor([1.0, -1, 1])):  # closed form, and the matrix
        f = row_correlation(rows[None], eps=0.0)[0]
        expected = np.array(GOLDEN_F)
        np.testing.assert_allclose(f.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(
        reference.published_rates(np.array(GOLDEN_F)),
        [0.783356, 0.822627, 0.764644, 0.846018, 0.783356],
        atol=1e-6,
    )
    assert reference.second_rate(np.array([1, 0, 0, 1, 0]), 0.2) == pytest.approx(1 / 3)


@pytest.mark.parametrize("units", [17, 150])
@pytest.mark.parametrize("positive", [True, False])
def test_the_correlation_equals_the_reference(positive: bool, units: int) -> None:
    rows = torch.randn(3, units, 5)
    rows = rows.relu() if positive else rows
    rows[1, 3] = 0
    expected = [reference.row_correlation(sample) for sample in rows.numpy()]
    np.testing.assert_allclose(row_correlation(rows).numpy(), expected, atol=1e-6)


def test_blocks_of_rows_give_the_same_correlation(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(2, 23, 4)
    whole = row_correlation(rows)
    monkeypatch.setattr(module, "_MATRIX", 100)
    torch.testing.assert_close(row_correlation(rows), whole)


def test_the_correlation_stays_in_float32_under_autocast() -> None:
    rows = torch.randn(2, 23, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        f = row_correlation(rows)
    assert torch.equal(f, row_correlation(rows))


def test_the_correlation_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"expected \(B, N, d\), got shape \(4, 3\)"):
        row_correlation(torch.ones(4, 3))


@given(
    units=st.integers(1, 40),
    p=st.floats(0.001, 0.98),
    temperature=st.floats(0.1, 20),
    seed=st.integers(0, 999),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_the_rates_have_mean_p_exactly_and_equal_the_reference(
    units: int, p: float, temperature: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    f = torch.rand(2, units, generator=generator)
    area = torch.randint(1, 9, (units,), generator=generator)
    q = drop_probability(f, p, temperature, area)
    assert ((q >= 0) & (q <= 1)).all()
    mean = (q * area).sum(1) / area.sum()
    torch.testing.assert_close(mean, torch.full((2,), p), rtol=1e-4, atol=1e-6)
    for row, result in zip(f.numpy().astype(np.float64), q.numpy(), strict=True):
        expected = reference.drop_probability(row, p, temperature, area.numpy())
        np.testing.assert_allclose(result, expected, rtol=2e-3, atol=1e-5)


def test_the_temperature_goes_from_uniform_to_the_least_correlated_alone() -> None:
    f = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    assert drop_probability(f, 0.25, math.inf)[0].tolist() == pytest.approx([0.25] * 4)
    assert drop_probability(f, 0.25, 1e-3)[0].tolist() == pytest.approx([1, 0, 0, 0], abs=1e-4)
    sharp, default, flat = (drop_probability(f, 0.25, t)[0, 0] for t in (0.5, 1.0, 5.0))
    assert sharp > default > flat > 0.25


@pytest.mark.parametrize("temperature", [1e-9, 1e-60, 1.0, math.inf])
def test_units_without_area_take_no_part(temperature: float) -> None:
    f = torch.tensor([[0.9, 0.0, 0.5, 0.4, 0.0, 0.6], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]])
    live = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0]])
    q = drop_probability(f, 0.3, temperature, live)
    alone = drop_probability(f[:1, [0, 2, 3, 5]], 0.3, temperature)[0]
    assert q[0, [1, 4]].tolist() == [0, 0]
    torch.testing.assert_close(q[0, [0, 2, 3, 5]], alone)
    # where no unit has an area, all are equal
    torch.testing.assert_close(q[1], drop_probability(f[1:], 0.3, temperature)[0])
    torch.testing.assert_close(q[1].mean(), torch.tensor(0.3))


def test_cells_that_are_zero_in_every_channel_take_no_part() -> None:
    torch.manual_seed(0)
    x = torch.rand(2000, 4, 8, 8) + 0.1
    x[..., 4:, :] = 0  # half of the four by four cells
    zero = corrdrop_spatial(x, 0.3, 2)[..., :4, :] == 0
    assert zero.float().mean().item() == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("value", [0.0, 1.0, math.nan, math.inf])
def test_equal_or_missing_correlations_give_uniform_rates(value: float) -> None:
    q = drop_probability(torch.full((2, 6), value), 0.3)
    torch.testing.assert_close(q, torch.full((2, 6), 0.3))


class Operations(TorchDispatchMode):
    """Notes the operations that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("rule", [corrdrop_spatial, corrdrop_channel])
def test_no_running_sum_that_deterministic_mode_refuses_on_cuda(rule: Any, faithful: bool) -> None:
    with Operations() as seen:
        rule(torch.rand(2, 6, 12, 9), 0.3, faithful=faithful)
    assert "mul" in seen.names
    assert "cumsum" not in seen.names


@pytest.mark.parametrize("units", [0, 1, 2, 3, 64, 1000])
def test_the_running_sum_is_that_of_torch(units: int) -> None:
    values = torch.rand(3, units)
    torch.testing.assert_close(drop_rates.running_sum(values), values.cumsum(1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rule", [corrdrop_spatial, corrdrop_channel])
def test_deterministic_mode_takes_it_on_a_gpu(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        assert rule(torch.rand(2, 6, 12, 9, device="cuda"), 0.3).isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


def half_correlated(batch: int, channels: int, size: int) -> torch.Tensor:
    """Maps whose left half repeats one channel vector and whose right half is noise."""
    x = torch.randn(batch, channels, size, size)
    x[..., : size // 2] = torch.randn(batch, channels, 1, 1)
    return x


def test_uncorrelated_pixels_are_dropped_more_often() -> None:
    torch.manual_seed(0)
    x = half_correlated(400, 16, 20)
    zero = (corrdrop_spatial(x, 0.1, 5) == 0).float().mean((0, 1, 2))
    left, right = zero[:10].mean(), zero[10:].mean()
    assert right > 4 * left
    assert ((left + right) / 2).item() == pytest.approx(0.1, abs=0.01)
    published = (corrdrop_spatial(x, 0.1, 5, faithful=True) == 0).float().mean((0, 1, 2))
    assert published[10:].mean() < 1.3 * published[:10].mean()  # the flaw


def test_uncorrelated_channels_are_dropped_more_often() -> None:
    torch.manual_seed(0)
    x = torch.randn(800, 8, 6, 6)
    x[:, :4] = torch.randn(800, 1, 6, 6)
    zero = (corrdrop_channel(x, 0.1) == 0).float().mean((0, 2, 3))
    assert zero[4:].mean() > 4 * zero[:4].mean()


@pytest.mark.parametrize(
    ("size", "block"), [((12,), 5), ((9, 14), 4), ((4, 4), 5), ((1, 7), 3), ((5, 4, 6), 3)]
)
def test_each_pixel_is_dropped_as_often_as_the_reference_says(
    size: tuple[int, ...], block: int
) -> None:
    torch.manual_seed(0)
    sample = torch.randn(6, *size)
    x = sample.expand(6000, *sample.shape).contiguous()
    frequency = (corrdrop_spatial(x, 0.2, block) == 0).float().mean((0, 1))
    expected = reference.spatial_rates(sample.numpy(), 0.2, block, 1.0)
    np.testing.assert_allclose(frequency.numpy(), expected, atol=0.03)
    assert expected.mean() == pytest.approx(0.2)


def test_one_mask_serves_all_channels_and_survivors_are_rescaled_by_the_nominal_rate() -> None:
    x = torch.rand(3, 5, 12, 10) + 0.5
    for y in (corrdrop_spatial(x, 0.3, 4), corrdrop_channel(x, 0.3)):
        kept = y != 0
        torch.testing.assert_close(y[kept], x[kept] / 0.7)
    zero = corrdrop_spatial(x, 0.3, 4) == 0
    assert torch.equal(zero.all(1), zero.any(1))


def test_a_layout_does_not_change_the_result() -> None:
    x = torch.randn(2, 6, 9, 8)
    for rule in (corrdrop_spatial, corrdrop_channel):
        torch.manual_seed(4)
        expected = rule(x, 0.3)
        torch.manual_seed(4)
        torch.testing.assert_close(rule(x.to(memory_format=torch.channels_last), 0.3), expected)


def test_a_small_map_does_not_change_the_block_for_later_ones() -> None:
    layer = CorrDropSpatial(0.3, block_size=5)
    layer(torch.rand(1, 4, 2, 2))
    assert layer.block_size == 5


def test_a_map_smaller_than_the_block_is_still_cut_in_two() -> None:
    torch.manual_seed(0)
    y = corrdrop_spatial(torch.rand(500, 3, 4, 4) + 0.5, 0.3, block_size=7)
    share = (y == 0).float().mean((1, 2, 3))
    assert set(share.tolist()) == {0.0, 0.25, 0.5, 0.75, 1.0}
    assert (share == 1).float().mean() < 0.05


@pytest.mark.parametrize(
    ("size", "block", "p", "rate"),
    [(16, 5, 0.2, 0.128), (8, 5, 0.2, 0.125), (16, 4, 0.2, 0.198), (8, 3, 0.2, 0.160),
     (32, 5, 0.1, 0.083), (14, 7, 0.1, 0.104), (7, 7, 0.1, 0.0)],
)  # fmt: skip
def test_the_faithful_rule_realises_the_rates_measured_on_the_published_code(
    size: int, block: int, p: float, rate: float
) -> None:
    torch.manual_seed(0)
    x = torch.rand(600, 8, size, size) + 0.1
    y = corrdrop_spatial(x, p, block, faithful=True)
    assert (y == 0).float().mean().item() == pytest.approx(rate, abs=0.012)


def test_the_faithful_rule_rescales_by_the_keep_share_of_the_batch() -> None:
    x = torch.ones(8, 12, 15, 15)
    for rule in (corrdrop_spatial, corrdrop_channel):
        y = rule(x, 0.3, faithful=True)
        assert y.mean().item() == pytest.approx(1.0, abs=1e-5)
        assert (y == 0).any()


def test_the_faithful_channel_rule_never_drops_a_single_channel() -> None:
    x = torch.rand(50, 1, 3, 3) + 0.1
    assert torch.equal(corrdrop_channel(x, 0.5, faithful=True), x)


@pytest.mark.parametrize("size", [(10, 16), (16, 10), (3, 2), (1, 1)])
def test_the_faithful_rule_takes_any_map(size: tuple[int, int]) -> None:
    x = torch.rand(4, 3, *size)
    assert corrdrop_spatial(x, 0.2, 5, faithful=True).isfinite().all()


@pytest.mark.parametrize(
    ("make", "parameters", "message"),
    [
        (CorrDropSpatial, {"block_size": 0}, "block_size must be a whole number"),
        (CorrDropSpatial, {"block_size": 2.0}, "block_size must be a whole number"),
        (CorrDropSpatial, {"temperature": 0}, "temperature must be a number above 0, got 0"),
        (CorrDropChannel, {"temperature": math.nan}, "temperature must be a number above 0"),
        (CorrDropChannel, {"temperature": 2, "faithful": True}, "has no temperature"),
    ],
)
def test_bad_parameters_are_refused(make: Any, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(0.1, **parameters)


def test_the_functions_are_identities_outside_training() -> None:
    x = torch.rand(1, 4, 3, 3)
    for rule in (corrdrop_spatial, corrdrop_channel):
        assert rule(x, 0.5, training=False) is x
        assert rule(x, 0.0) is x

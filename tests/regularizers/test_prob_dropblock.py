"""ProbDropBlock against a counted reference, its golden value, and maps that could break it."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from medseg_reg.regularizers import ProbDropBlock, prob_drop_block
from medseg_reg.regularizers import prob_dropblock as module
from tests.reference import dropblock as blocks
from tests.reference import prob_dropblock as reference
from tests.regularizers.contract import RegularizerContract


class TestProbDropBlock(RegularizerContract):
    name = "prob_drop_block"


class TestSmallEvenBlocks(RegularizerContract):
    name = "prob_drop_block"
    parameters = {"block_size": 2}  # noqa: RUF012


class TestFaithful(RegularizerContract):
    """p is the share of centres, not of dropped pixels; the rate is tested below."""

    name = "prob_drop_block"
    parameters = {"faithful": True, "block_size": 2}  # noqa: RUF012
    calibrated = False


def test_gamma_is_the_golden_value() -> None:
    a = np.array([[0, 1, 2], [3, 0, -2]])
    np.testing.assert_allclose(reference.gamma(a), [[0, 0.5, 1], [1.5, 0, 1]])


@pytest.mark.parametrize("size", [(9,), (6, 5), (3, 4, 3)])
@pytest.mark.parametrize("block", [1, 2, 3, 20])
def test_the_faithful_rule_equals_the_reference(size: tuple[int, ...], block: int) -> None:
    torch.manual_seed(1)
    x = torch.randn(3, 4, *size).relu()
    x[..., 0] += 0.1  # the formula divides by the sum
    torch.manual_seed(2)
    y = prob_drop_block(x, 0.2, block, faithful=True)
    torch.manual_seed(2)
    draws = torch.rand(x.shape).numpy()
    for sample, its_draws, result in zip(x.numpy(), draws, y.numpy(), strict=True):
        for plane, its, values in zip(sample, its_draws, result, strict=True):
            expected = reference.published(plane, its, 0.2, block)
            np.testing.assert_allclose(values, expected, rtol=1e-6)


@pytest.mark.parametrize(("block", "p"), [(7, 0.002), (3, 0.1), (7, 0.1)])
def test_the_faithful_rate_is_that_of_p_centres(block: int, p: float) -> None:
    torch.manual_seed(0)
    y = prob_drop_block(torch.ones(500, 8, 12, 12), p, block, faithful=True)
    expected = (1 - (1 - p) ** blocks.cover_counts((12, 12), block)).mean()
    assert (y == 0).float().mean().item() == pytest.approx(expected, abs=0.005)
    assert expected < 1 - (1 - p) ** (block * block)


def test_the_faithful_rule_enlarges_what_it_keeps() -> None:
    y = prob_drop_block(torch.ones(60, 4, 8, 8), 0.05, 3, faithful=True)
    mean = y.mean((2, 3))
    assert ((mean - 1).abs() < 1e-5).logical_or(mean == 0).all()
    assert (y[y > 0] >= 1).all()
    assert (y > 1).any()


@pytest.mark.parametrize("size", [(11,), (7, 9), (4, 3, 5), (2, 1), (1,)])
@pytest.mark.parametrize("block", [1, 2, 3, 6, 7, 30])
def test_window_sums_equal_the_reference(size: tuple[int, ...], block: int) -> None:
    values = torch.rand(2, 3, *size) + 0.1
    result = module._live_window_sum(values, *module.block_reach(block))
    expected = [[reference.window_sum(c, block) for c in s] for s in values.numpy()]
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("size", "block"), [((14,), 3), ((6, 9), 4), ((5, 5), 7), ((3, 4, 5), 2), ((4, 4), 1)]
)
def test_each_element_is_dropped_as_often_as_the_reference_says(
    size: tuple[int, ...], block: int
) -> None:
    torch.manual_seed(0)
    sample = torch.randn(3, *size).relu()
    x = sample.expand(6000, *sample.shape).contiguous()
    y = prob_drop_block(x, 0.25, block)
    expected = reference.drop_rates(sample.numpy(), 0.25, block)
    live = sample.numpy() > 0
    assert expected[live].mean() == pytest.approx(0.25)
    frequency = (y == 0).float().mean(0).numpy()
    np.testing.assert_allclose(frequency[live], expected[live], atol=0.03)
    torch.testing.assert_close(y[y > 0], x[y > 0] / 0.75)


MAPS: dict[str, Callable[..., torch.Tensor]] = {
    "rectified": lambda *s: torch.randn(*s).relu(),
    "signed": lambda *s: torch.randn(*s),
    "unequal channels": lambda *s: torch.rand(*s) * torch.randn(*s[:2], 1, 1).exp() ** 3,
    "log-normal": lambda *s: (4 * torch.randn(*s)).exp(),
    "heavy tails": lambda *s: torch.randn(*s) / torch.randn(*s),
    "sparse": lambda *s: torch.rand(*s) * (torch.rand(*s) < 0.01),
    "a part that misleads": lambda *s: torch.where(
        (torch.arange(s[2])[:, None] % 3 == 1) & (torch.arange(s[3]) % 3 == 1), 1e-6, torch.rand(*s)
    ),
    "one row": lambda *s: torch.nn.functional.pad(torch.rand(*s[:2], 1, s[3]), [0, 0, 0, s[2] - 1]),
}


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("shape", [(3, 4, 20, 20), (2, 32, 64, 48)])
@pytest.mark.parametrize("reach", [0, 3])
def test_every_sample_loses_p_and_never_more_in_expectation(
    kind: str, shape: tuple[int, ...], reach: int
) -> None:
    torch.manual_seed(0)
    x = MAPS[kind](*shape)
    scale = torch.tensor([1e-3, 1.0, 1e4])[: shape[0]].view(-1, 1, 1, 1)
    strength = module._strength(x * scale)
    window = module._live_window_sum(strength, reach, reach)
    for p in (0.02, 0.1, 0.5, 0.9):
        alpha = module._solve(window, p)
        for values, a in zip(window, alpha, strict=True):
            live = values[values < module._FAR].double()
            rate = -torch.expm1(-a.double() * live).mean().item()
            assert p - 0.005 < rate < p + 1e-4


def test_strong_regions_and_channels_are_dropped_more_often() -> None:
    torch.manual_seed(0)
    x = torch.rand(300, 4, 20, 20) + 0.5
    x[..., :10] *= 10
    x[:, 0] *= 5
    zero = (prob_drop_block(x, 0.1, 3) == 0).float().mean(0)
    assert zero[1:, :, :9].mean() > 5 * zero[1:, :, 11:].mean()
    assert zero[0].mean() > 2 * zero[1].mean()
    assert zero.mean().item() == pytest.approx(0.1, abs=0.01)


def test_a_lone_live_channel_keeps_the_share_that_p_leaves() -> None:
    torch.manual_seed(0)
    x = torch.zeros(200, 16, 12, 12)
    x[:, 3] = torch.rand(200, 12, 12) + 0.1
    y = prob_drop_block(x, 0.3, 3)
    lost = (y[:, 3] == 0).float().mean((1, 2))
    assert lost.mean().item() == pytest.approx(0.3, abs=0.02)
    assert lost.max() < 1


def test_a_block_larger_than_a_large_map_still_drops_p() -> None:
    torch.manual_seed(0)
    x = torch.rand(40, 25, 70, 65) + 0.5
    share = (prob_drop_block(x, 0.1, 200) == 0).float().mean((2, 3))
    assert set(share.unique().tolist()) == {0.0, 1.0}  # whole channels
    assert share.mean().item() == pytest.approx(0.1, abs=5 * math.sqrt(0.09 / 1000))


def test_blocks_of_planes_and_layouts_change_the_speed_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # candidates would be other draws than coins
    monkeypatch.setattr("medseg_reg.regularizers.kernels.points._DENSE", math.inf)
    x = torch.randn(3, 10, 24, 30).relu()
    results = []
    for block, last in [(1 << 30, False), (24 * 30 * 4, False), (1, False), (1 << 30, True)]:
        monkeypatch.setattr("medseg_reg.regularizers.kernels.blocks.BLOCK", block)
        torch.manual_seed(4)
        results.append(
            prob_drop_block(x.to(memory_format=torch.channels_last) if last else x, 0.2, 5)
        )
    for result in results[1:]:
        assert torch.equal(result, results[0])


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float16, 6e4), (torch.float64, 1e300), (torch.float64, 1e-300)]
)
def test_the_range_of_a_dtype_does_not_matter(dtype: torch.dtype, size: float) -> None:
    torch.manual_seed(0)
    x = (torch.rand(200, 6, 8, 8, dtype=torch.float64) * size / 2 + size / 4).to(dtype)
    y = prob_drop_block(x, 0.2, 3)
    assert (y == 0).float().mean().item() == pytest.approx(0.2, abs=0.01)
    assert y.isfinite().all()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_infinite_values_draw_no_blocks(value: float) -> None:
    torch.manual_seed(0)
    x = torch.full((400, 2, 9, 9), 1e-3)
    x[:, 0, 4, 4] = value
    zero = (prob_drop_block(x, 0.2, 3) == 0).float().mean(0)
    assert zero[1].mean().item() == pytest.approx(0.2, abs=0.03)
    assert zero[0, 4, 3].item() == pytest.approx(0.2, abs=0.1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("faithful", [False, True])
def test_a_compiled_layer_follows_a_schedule(faithful: bool) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    layer, x = ProbDropBlock(block_size=3, faithful=faithful).train(), torch.rand(2, 6, 8, 9)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for p in np.linspace(0.005, 0.6, 20):
        layer.p = float(p)
        torch.manual_seed(1)
        expected = layer(x)
        torch.manual_seed(1)
        torch.testing.assert_close(compiled(x), expected)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("value", [0, 2.0, True, None])
def test_a_bad_block_size_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="block_size must be a whole number, 1 or more"):
        ProbDropBlock(0.1, block_size=value)


def test_the_function_is_identity_outside_training() -> None:
    x = torch.rand(1, 2, 3)
    assert prob_drop_block(x, 0.5, training=False) is x
    assert prob_drop_block(x, 0.0) is x

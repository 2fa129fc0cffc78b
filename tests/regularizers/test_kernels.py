"""The fast kernels against the plain ones: in either layout, in blocks and as a whole."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from medseg_reg.regularizers import build, heuristic_dropout, heuristic_scores, stochastic_pool
from medseg_reg.regularizers.dropblock import grow
from medseg_reg.regularizers.kernels import histogram, loops
from medseg_reg.regularizers.kernels.blocks import BLOCK, by_planes
from medseg_reg.regularizers.kernels.elements import drop_elements, multiply_kept
from medseg_reg.regularizers.kernels.masks import multiply_masks
from medseg_reg.regularizers.kernels.peaks import neighbourhood_peaks
from medseg_reg.regularizers.kernels.planes import filter_channels
from medseg_reg.regularizers.kernels.points import random_points
from tests.reference import heuristic as published
from tests.reference import kernels as plain

LARGE = (3, 20, 56, 72)  # more than one block
SHAPES = [(2, 5, 40), (2, 5, 9, 8), LARGE, (2, 9, 7, 30, 40)]


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "contiguous" or x.dim() < 4:
        return x
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.to(memory_format=formats[x.dim()])


LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
# channels_last has loops of its own, which take seconds to compile
LAYOUTS_AND_RULES = pytest.mark.parametrize(
    ("layout", "rules"),
    [
        ("contiguous", "operators"),
        ("channels_last", "operators"),
        ("contiguous", "numba"),
        pytest.param("channels_last", "numba", marks=pytest.mark.slow),
    ],
    indirect=["rules"],
)
BOTH_RULES = pytest.mark.parametrize("rules", ["operators", "numba"], indirect=True)


@pytest.fixture
def rules(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "numba":
        pytest.importorskip("numba")
        monkeypatch.setattr(loops, "_HERE", True)


@LAYOUTS_AND_RULES
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("signed", [False, True])
def test_the_histogram_is_exact_and_so_is_the_selection(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, rules: None, signed: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape) * torch.rand(shape[1]).view(-1, *[1] * (len(shape) - 2))
    x = laid_out((x if signed else x.relu()).to(dtype), layout)
    thresholds = histogram.level_thresholds(10, signed)
    sums, expected = histogram.level_sums(x, thresholds), plain.level_sums(x, thresholds)
    assert torch.equal(sums[..., 1:].double(), expected[..., 1:])
    torch.testing.assert_close(sums[..., 0].double(), expected[..., 0], rtol=1e-5, atol=0)
    score = published_scores(x, signed=signed)
    assert torch.equal(heuristic_scores(x, signed=signed).score.topk(2).indices, score.topk(2)[1])
    assert filtered(x, 2, signed=signed) == highest(score, 2)


def published_scores(x: Tensor, k: float = 2.0, signed: bool = False) -> Tensor:
    maps = x.double().numpy()
    scores = [[published.score(channel, k, signed=signed) for channel in sample] for sample in maps]
    return torch.tensor(scores)


def highest(score: Tensor, count: int) -> list[set[int]]:
    return [set(row) for row in score.topk(count).indices.tolist()]


def filtered(x: Tensor, count: int, k: float = 2.0, signed: bool = False) -> list[set[int]]:
    """The channels of each sample that the layer changed."""
    y = heuristic_dropout(x, count / x.shape[1], k, signed=signed)
    changed = ((x != y) & ~(x.isnan() & y.isnan())).flatten(2).any(-1)
    return [set(row.nonzero()[:, 0].tolist()) for row in changed]


@BOTH_RULES
@pytest.mark.parametrize("k", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("spread", [0.0, 0.05, 1.0])
def test_channels_that_their_variance_rules_out_are_never_among_the_highest(
    k: float, spread: float, rules: None
) -> None:
    generator = torch.Generator().manual_seed(4)
    scale = torch.exp(spread * torch.randn(2, 24, 1, 1, generator=generator))
    x = (torch.randn(2, 24, 64, 80, generator=generator) * scale).relu()
    for count in (1, 3, 12):
        assert filtered(x, count, k) == highest(published_scores(x, k), count)


@BOTH_RULES
def test_where_variances_are_alike_the_entropy_decides(rules: None) -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 20, 96, 96) * 3  # of high variance, so of low score
    for c in range(6):  # of two values or of many, scaled to one variance
        few = (torch.rand(2, 96, 96) < 0.5).float() + 0.5
        values = few if c % 2 else torch.rand(2, 96, 96) + 0.5
        x[:, c] = (values - 1) / values.std((1, 2), keepdim=True) * 0.3 + 1
    assert filtered(x, 3) == highest(published_scores(x), 3) == [{0, 2, 4}] * 2


@BOTH_RULES
def test_channels_with_nan_are_the_last_to_be_filtered_and_dead_ones_the_first(rules: None) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 20, 96, 96).relu() * torch.linspace(0.2, 2, 20).view(-1, 1, 1)
    x[:, 0], x[:, 1] = math.nan, 0.5
    assert filtered(x, 2) == [{1, 2}] * 2
    assert filtered(x, 19) == [set(range(1, 20))] * 2


@BOTH_RULES
def test_a_half_beside_a_threshold_is_counted_as_its_value(rules: None) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        thresholds = histogram.level_thresholds(10, False)
        near = torch.tensor(thresholds).to(dtype)
        steps = torch.arange(-2, 2, dtype=torch.int16)
        beside = (near[1:].view(torch.int16)[:, None] + steps).view(dtype)
        x = beside[None]
        expected = plain.level_sums(x, thresholds)[..., 1:]
        assert torch.equal(histogram.level_sums(x, thresholds)[..., 1:].double(), expected)


@BOTH_RULES
@pytest.mark.parametrize("offset", [0.5, 30.0, 1000.0])
def test_the_variance_survives_an_offset(offset: float, rules: None) -> None:
    x = torch.randn(2, 6, 64, 64) * 0.1 + offset
    sums = histogram.level_sums(x, (0.5,))
    expected = plain.level_sums(x, (0.5,))
    torch.testing.assert_close(sums[..., 0].double(), expected[..., 0], rtol=1e-3, atol=0)


@LAYOUTS
@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 1), (2, 3, 2, 1), (2, 3, 1, 40)])
@pytest.mark.parametrize("pad", [False, True])
def test_peaks_are_those_of_pooling_and_argmax(
    shape: tuple[int, ...], layout: str, pad: bool
) -> None:
    torch.manual_seed(1)
    x = laid_out(torch.randn(shape), layout)
    assert torch.equal(neighbourhood_peaks(x, pad), plain.neighbourhood_peaks(x, pad))


def test_of_equal_peaks_the_first_counts() -> None:
    x = torch.zeros(1, 2, 8, 9)
    x[0, 0, 2, 5] = x[0, 0, 5, 3] = 1
    assert neighbourhood_peaks(x)[0].tolist() == [[1, 4], [0, 0]]


@LAYOUTS_AND_RULES
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zero", [False, True])
def test_chosen_channels_are_filtered_and_the_others_untouched(
    shape: tuple[int, ...], dtype: torch.dtype, zero: bool, layout: str, rules: None
) -> None:
    torch.manual_seed(0)
    x = laid_out(torch.randn(shape).to(dtype), layout)
    index = torch.stack([torch.randperm(shape[1])[:3] for _ in range(shape[0])])
    chosen = torch.rand(index.shape) < 0.7
    fast = gradients(lambda x: filter_channels(x, index, chosen, zero), x)
    slow = gradients(lambda x: plain.filter_channels(x, index, chosen, zero), x)
    half = x.element_size() == 2
    torch.testing.assert_close(fast[0], slow[0], rtol=2e-2 if half else 1e-4, atol=1e-4)
    if not half:  # the plain gradient of halves is rounded several times
        torch.testing.assert_close(fast[1], slow[1], rtol=1e-4, atol=1e-4)
    kept = torch.ones(shape[:2], dtype=torch.bool).scatter(1, index, ~chosen)
    assert torch.equal(fast[0][kept], x[kept])
    assert fast[0].stride() == x.stride()


def test_a_rule_applied_by_planes_gives_what_it_gives_for_the_whole() -> None:
    x, factor = torch.randn(3, 7, 300, 200), torch.rand(3, 1, 1, 1)  # two planes a block, 21 planes
    assert 2 * 300 * 200 < BLOCK < 3 * 300 * 200
    calls = []

    def rule(planes: Tensor, factors: Tensor) -> Tensor:
        calls.append(planes.shape[1])
        return (planes * factors).amax(-1)

    assert torch.equal(by_planes(rule, x, factor), (x * factor).amax(-1))
    assert calls == [2] * 10 + [1]


@pytest.mark.parametrize("reach", [(0, 0), (1, 2), (3, 3), (80, 90)])
def test_blocks_are_painted_as_by_pooling(reach: tuple[int, int]) -> None:
    seeds = torch.rand(LARGE) < 0.002
    assert torch.equal(grow(seeds, *reach), plain.grow(seeds, *reach))


def gradients(rule: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = rule(x)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y) * 0.5 + y.detach())
    return y, grad


@LAYOUTS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_multiply_as_two_products_do(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str
) -> None:
    x = laid_out(torch.randn(shape, dtype=dtype), layout)
    channels = torch.rand(*shape[:2], *[1] * (len(shape) - 2)).to(dtype)
    positions = (torch.rand(shape[0], 1, *shape[2:]) < 0.7).to(dtype)
    fast = gradients(lambda x: multiply_masks(x, channels, positions), x)
    slow = gradients(lambda x: plain.multiply_masks(x, channels, positions), x)
    assert torch.equal(fast[0], slow[0])
    assert torch.equal(fast[1], slow[1])
    assert fast[0].stride() == x.stride()


@LAYOUTS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [torch.bool, torch.int16])
def test_kept_elements_are_scaled_and_the_others_zero(
    shape: tuple[int, ...], kind: torch.dtype, layout: str
) -> None:
    x = laid_out(torch.randn(shape), layout)
    keep = laid_out((torch.rand(shape) < 0.7).to(kind), layout)
    fast = gradients(lambda x: multiply_kept(x, keep, 1.5), x)
    slow = gradients(lambda x: plain.multiply_kept(x, keep, 1.5), x)
    assert torch.equal(fast[0], slow[0])
    assert torch.equal(fast[1], slow[1])
    assert fast[0].stride() == x.stride()


@pytest.mark.parametrize("rule", [lambda x, m: multiply_kept(x, m, 1.5), multiply_masks])
def test_a_gradient_has_a_gradient_where_one_is_asked_for(rule: Callable[..., Tensor]) -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    masks = [(torch.rand(x.shape) < 0.7).double()]
    if rule is multiply_masks:
        masks = [torch.rand(2, 3, 1, 1).double(), torch.rand(2, 1, 4, 5).double()]
    factor = rule(torch.ones_like(x), *masks)
    (first,) = torch.autograd.grad(rule(x, *masks).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 6 * factor.pow(3) * x.detach())
    (alone,) = torch.autograd.grad(rule(x, *masks).pow(3).sum(), x)
    assert torch.equal(alone, first)
    assert not alone.requires_grad


def test_a_gradient_in_another_layout_is_right_too() -> None:
    x = torch.randn(LARGE, requires_grad=True)
    y = drop_elements(x, 0.3)
    y.sum().backward()  # the gradient that comes in is one number, expanded
    assert x.grad is not None
    assert torch.equal(x.grad != 0, y != 0)


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9])
def test_elements_are_dropped_independently_at_the_rate(p: float) -> None:
    torch.manual_seed(0)
    dropped = (drop_elements(torch.ones(1, 4, 500, 500), p) == 0).flatten().double()
    error = 5 * (p * (1 - p) / len(dropped)) ** 0.5
    assert dropped.mean().item() == pytest.approx(p, abs=error)
    for lag in (1, 2, 3, 4, 500):  # four elements share a draw
        pairs = ((dropped[lag:] - p) * (dropped[:-lag] - p)).mean().item()
        assert abs(pairs) < 5 * p * (1 - p) / len(dropped) ** 0.5


def test_points_have_the_frequency_of_a_coin_for_each_element() -> None:
    torch.manual_seed(0)
    strength = torch.rand(2, 1, 1, 400).expand(2, 1, 400, 400).contiguous()
    alpha = torch.tensor([0.02, 0.1]).view(2, 1, 1, 1)
    frequency = sum(random_points(strength, alpha).double().mean(2) for _ in range(50)) / 50
    expected = plain.point_rates(strength, alpha).double()[:, :, 0]
    error = (expected * (1 - expected) / 20_000).sqrt()
    assert ((frequency - expected).abs() < 5 * error + 1e-4).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_stochastic_pooling_draws_as_the_plain_rule_does(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    torch.manual_seed(3)
    fast = stochastic_pool(x)
    torch.manual_seed(3)
    assert torch.equal(fast, plain.stochastic_pool(x))


def test_compiled_dropout_is_torchs_own() -> None:
    torch._dynamo.reset()
    x = torch.rand(2, 8, 64, 64)
    compiled = torch.compile(drop_elements, fullgraph=True, backend="eager")
    torch.manual_seed(1)
    expected = torch.nn.functional.dropout(x, 0.3)
    torch.manual_seed(1)
    assert torch.equal(compiled(x, 0.3), expected)


@pytest.mark.parametrize("name", ["dropout", "drop_block", "adcm", "heuristic_dropout"])
def test_functional_gradients_are_those_of_backward(name: str) -> None:
    layer, x = build(name).train(), torch.rand(2, 16, 20, 20) + 0.5

    def total(x: Tensor) -> Tensor:
        torch.manual_seed(1)
        return layer(x).square().sum()

    y = x.clone().requires_grad_()
    total(y).backward()
    assert y.grad is not None
    assert torch.equal(torch.func.grad(total)(x), y.grad)

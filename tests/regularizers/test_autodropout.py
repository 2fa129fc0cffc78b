"""AutoDropout's pattern against rectangles painted one by one, and its rates."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from medseg_reg.regularizers import AutoDropout, auto_dropout, pattern_coverage
from tests.reference import autodropout as reference
from tests.regularizers.contract import RegularizerContract


class TestAutoDropout(RegularizerContract):
    name = "auto_dropout"


class TestTurnedAndShearedForEachChannel(RegularizerContract):
    name = "auto_dropout"
    parameters = {  # noqa: RUF012
        "size": 5, "stride": (1, 2), "rotate": 25.0, "shear_x": 0.3, "share_c": False,
    }  # fmt: skip


class TestManyTiles(RegularizerContract):
    name = "auto_dropout"
    parameters = {"size": (7, 6), "stride": 1, "repeat": 40}  # noqa: RUF012


class TestFaithful(RegularizerContract):
    """The rate is that of the pattern, whatever p; it is tested below."""

    name = "auto_dropout"
    parameters = {"size": 4, "repeat": 3, "faithful": True}  # noqa: RUF012
    calibrated = False


TRANSFORMS: list[dict[str, float]] = [
    {},
    {"rotate": 30.0},
    {"rotate": -100.0},
    {"shear_x": 0.7},
    {"shear_y": -0.4},
    {"rotate": 200.0, "shear_x": -0.3, "shear_y": 0.6},
]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("shape", [(16, 21), (9, 4), (1, 1)])
def test_a_pattern_is_that_of_the_reference(
    transform: dict[str, float], shape: tuple[int, int]
) -> None:
    size, stride, repeat, batch = (4, 3), (1, 2), 3, 30
    torch.manual_seed(1)
    y = auto_dropout(
        torch.ones(batch, 2, *shape), 0.5, size, stride, repeat, **transform, faithful=True
    )
    torch.manual_seed(1)
    draws = torch.rand(2, batch).numpy().astype(np.float64)
    m = reference.matrix(*(transform.get(k, 0.0) for k in ("rotate", "shear_x", "shear_y")))
    extent = [repeat * (k + g) - g for k, g in zip(size, stride, strict=True)]
    corners = m @ np.array([[0, extent[0], 0, extent[0]], [0, 0, extent[1], extent[1]]])
    low, high = corners.min(1), corners.max(1)
    wrong = 0
    for sample, draw in zip(y.numpy(), draws.T, strict=True):
        origin = draw * (np.array(shape) - 1 + high - low) - high
        mask = reference.hits(shape, size, stride, range(repeat), m, tuple(origin))
        expected = ~mask if not mask.all() else np.ones(shape)
        wrong += int(((sample[0] != 0) != expected).sum())
        np.testing.assert_array_equal(sample[0], sample[1])
    # a pixel may lie on an edge within rounding
    assert wrong <= 1e-4 * batch * math.prod(shape)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_tiles_without_end_are_those_of_the_reference(transform: dict[str, float]) -> None:
    size, stride, shape = (3, 5), (2, 1), (12, 15)
    torch.manual_seed(2)
    y = auto_dropout(torch.ones(20, 1, *shape), 0.59, size, stride, **transform)
    torch.manual_seed(2)
    used = torch.rand(20) < 0.59 / pattern_coverage(shape, size, stride)
    draws = torch.rand(2, 20).numpy().astype(np.float64)
    m = reference.matrix(*(transform.get(k, 0.0) for k in ("rotate", "shear_x", "shear_y")))
    wrong = 0
    for sample, draw, on in zip(y.numpy(), draws.T, used.tolist(), strict=True):
        origin = -m @ (draw * (np.array(size) + stride))
        mask = reference.hits(shape, size, stride, range(-12, 13), m, tuple(origin))
        wrong += int(((sample[0] == 0) != (mask & on)).sum())
    assert wrong <= 1e-4 * 20 * math.prod(shape) + 1
    assert used.any()


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (12, 9)])
@pytest.mark.parametrize(
    ("size", "stride", "repeat"), [((1, 1), (1, 1), 1), ((4, 3), (1, 2), 3), ((2, 6), (3, 1), 2)]
)
def test_the_coverage_is_the_mean_over_all_whole_offsets(
    shape: tuple[int, int], size: tuple[int, int], stride: tuple[int, int], repeat: int
) -> None:
    expected = reference.coverage(shape, size, stride, repeat)
    assert pattern_coverage(shape, size, stride, repeat) == pytest.approx(expected)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("repeat", [None, 2])
def test_every_pixel_is_dropped_equally_often(
    transform: dict[str, float], repeat: int | None
) -> None:
    torch.manual_seed(0)
    pattern: dict[str, Any] = {"size": (4, 3), "stride": 1, "repeat": repeat, **transform}
    p = 0.25 if repeat is None else 0.9  # more than two tiles an axis cover
    frequency = (auto_dropout(torch.ones(20_000, 1, 6, 9), p, **pattern) == 0).float().mean(0)
    options = {k: v for k, v in pattern.items() if k != "size"}
    rate = min(p, pattern_coverage((6, 9), pattern["size"], **options))
    assert 0.1 < rate < 0.6
    np.testing.assert_allclose(frequency, rate, atol=5 * math.sqrt(rate * (1 - rate) / 20_000))


def test_where_the_pattern_covers_less_than_p_that_is_the_rate_and_the_scale() -> None:
    torch.manual_seed(0)
    coverage = pattern_coverage((32, 32), 4, 1, 3)
    assert coverage < 0.1
    y = auto_dropout(torch.ones(4000, 1, 32, 32), 0.5, 4, 1, 3)
    assert (y == 0).float().mean().item() == pytest.approx(coverage, abs=0.003)
    assert y.max().item() == pytest.approx(1 / (1 - coverage))
    assert y.mean().item() == pytest.approx(1, abs=0.004)


def test_survivors_are_rescaled_by_the_rate() -> None:
    x = torch.rand(50, 2, 8, 8) + 0.5
    y = auto_dropout(x, 0.3)
    torch.testing.assert_close(y[y != 0], x[y != 0] / 0.7)


def test_the_faithful_rule_rescales_by_size_over_sum_and_always_applies() -> None:
    torch.manual_seed(0)
    y = auto_dropout(torch.ones(300, 1, 12, 12), 0.01, 3, 2, 4, faithful=True)
    torch.testing.assert_close(y.mean((1, 2, 3)), torch.ones(300))
    assert (y == 0).flatten(1).any(1).float().mean() > 0.8
    rate = (y == 0).float().mean().item()
    assert rate == pytest.approx(pattern_coverage((12, 12), 3, 2, 4), abs=0.02)


def test_a_sample_that_the_published_pattern_covers_whole_stays_as_it_is() -> None:
    x = torch.rand(40, 3, 2, 2) + 0.5
    y = auto_dropout(x, 0.5, size=30, repeat=2, faithful=True)
    assert (y != 0).any((1, 2, 3)).all()
    assert (y == x).all((1, 2, 3)).float().mean() > 0.5


def test_channels_share_a_pattern_or_have_their_own() -> None:
    torch.manual_seed(0)
    shared = auto_dropout(torch.ones(50, 4, 16, 16), 0.3) == 0
    own = auto_dropout(torch.ones(50, 4, 16, 16), 0.3, share_c=False) == 0
    assert torch.equal(shared.any(1), shared.all(1))
    assert (own.any(1) & ~own.all(1)).any()
    # a channel either has its pattern or keeps all, whatever the others do
    kept_whole = ~own.flatten(2).any(2)
    assert kept_whole.float().mean().item() == pytest.approx(0.5, abs=0.15)


def test_a_layout_does_not_change_the_result() -> None:
    x = torch.rand(5, 3, 9, 8)
    torch.manual_seed(4)
    expected = auto_dropout(x, 0.3, rotate=20)
    torch.manual_seed(4)
    result = auto_dropout(x.to(memory_format=torch.channels_last), 0.3, rotate=20)
    assert torch.equal(result, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_layer_follows_a_schedule() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    layer, x = AutoDropout(rotate=10, repeat=4).train(), torch.rand(5, 2, 14, 10)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for p in np.linspace(0.005, 0.6, 20):
        layer.p = float(p)
        torch.manual_seed(1)
        expected = layer(x)
        torch.manual_seed(1)
        torch.testing.assert_close(compiled(x), expected)
    assert counter.frame_count <= 3


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"size": 0}, "size must be a whole number, 1 or more; got 0"),
        ({"size": (2, 3, 4)}, r"size must be one number or \(height, width\), got \(2, 3, 4\)"),
        ({"size": 2.5}, "size must be a whole number, 1 or more; got 2.5"),
        ({"stride": (1, 0)}, "stride must be a whole number, 1 or more; got 0"),
        ({"repeat": 0}, "repeat must be a whole number, 1 or more; got 0"),
        ({"rotate": math.nan}, "rotate must be a finite number, got nan"),
        ({"shear_x": "1"}, "shear_x must be a finite number, got '1'"),
        ({"faithful": True}, "faithful=True needs repeat"),
    ],
)
def test_bad_parameters_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoDropout(0.1, **parameters)


def test_pairs_may_be_lists_as_in_a_configuration() -> None:
    assert AutoDropout(size=[4, 3], stride=[1, 2]).size == (4, 3)


def test_the_function_is_identity_outside_training() -> None:
    x = torch.rand(1, 2, 3, 3)
    assert auto_dropout(x, 0.5, training=False) is x
    assert auto_dropout(x, 0.0) is x

"""DropBlock against a counted reference, its golden values, and the flaws of its relatives."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medseg_reg.regularizers import DropBlock, calibrated_gamma, drop_block
from medseg_reg.regularizers import dropblock as module
from tests.reference import dropblock as reference
from tests.regularizers.contract import RegularizerContract


class TestDropBlock(RegularizerContract):
    name = "drop_block"


class TestSmallEvenBlocks(RegularizerContract):
    name = "drop_block"
    parameters = {"block_size": 2}  # noqa: RUF012


class TestOneMaskForAllChannels(RegularizerContract):
    name = "drop_block"
    parameters = {"block_size": 3, "per_channel": False}  # noqa: RUF012


class TestFaithful(RegularizerContract):
    """gamma ignores overlap (rates tested below), and the rescaling sums over the batch."""

    name = "drop_block"
    parameters = {"faithful": True, "block_size": 3}  # noqa: RUF012
    calibrated = False
    independent = False


SIZES = [(1,), (9,), (1, 1), (2, 2), (4, 4), (7, 7), (5, 3), (28, 13), (5, 4, 7)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("block", [1, 2, 3, 4, 7, 40])
def test_gamma_equals_the_reference(size: tuple[int, ...], block: int) -> None:
    for p in (1e-6, 0.1, 0.5, 0.99):
        assert calibrated_gamma(size, block, p) == pytest.approx(
            reference.gamma(size, block, p), rel=1e-8
        )
    assert calibrated_gamma(size, block, 0.0) == 0.0


@pytest.mark.parametrize(
    ("size", "block", "p", "gamma"),
    [
        ((28, 28), 7, 0.1, 0.00244180),  # published: .00330579, with fewer places for centres
        ((14, 14), 7, 0.1, 0.00279835),
        ((7, 7), 7, 0.1, 0.00377938),  # timm: .1
        ((4, 4), 5, 0.1, 0.00858254),
        ((8, 8), 3, 0.2, 0.02923921),
        ((1, 1), 7, 0.3, 0.3),
        ((2, 2), 7, 0.1, 1 - 0.9**0.25),
        ((5, 3), 9, 0.1, 1 - 0.9 ** (1 / 15)),  # every block covers the map
    ],
)
def test_the_golden_gammas(size: tuple[int, ...], block: int, p: float, gamma: float) -> None:
    assert calibrated_gamma(size, block, p) == pytest.approx(gamma, rel=2e-6)


@pytest.mark.parametrize(
    ("size", "block", "p", "gamma"),
    [
        (28, 7, 0.1, 0.00330579), (14, 7, 0.1, 0.00625), (7, 7, 0.1, 0.1),
        (14, 5, 0.1, 0.00784), (8, 3, 0.2, 0.03950617), (32, 5, 0.1, 0.00522449),
    ],
)  # fmt: skip
def test_the_golden_gammas_of_the_published_rule(
    size: int, block: int, p: float, gamma: float
) -> None:
    assert reference.published_gamma((size, size), block, p) == pytest.approx(gamma, rel=2e-6)


@pytest.mark.parametrize("size", [(11,), (9, 6), (5, 4, 6)])
@pytest.mark.parametrize("block", [1, 2, 3, 4, 5, 6, 7, 30])
def test_blocks_are_painted_as_in_the_reference(size: tuple[int, ...], block: int) -> None:
    torch.manual_seed(0)
    seeds = torch.rand(3, 2, *size) < 0.06
    grown = module.grow(seeds, *module.block_reach(block)).numpy()
    for sample, result in zip(seeds.numpy(), grown, strict=True):
        for plane, mask in zip(sample, result, strict=True):
            assert np.array_equal(mask, reference.painted(plane, block))


@pytest.mark.parametrize("size", [(9,), (8, 5), (5, 3), (4, 3, 6)])
@pytest.mark.parametrize("block", [2, 3, 7])
def test_the_faithful_rule_equals_the_reference(size: tuple[int, ...], block: int) -> None:
    x = torch.rand(4, 3, *size, dtype=torch.float64) + 0.5
    torch.manual_seed(5)
    y = drop_block(x, 0.3, block, faithful=True)
    torch.manual_seed(5)
    draws = torch.rand(4, 3, *[n - min(block, n) + 1 for n in size])
    corners = draws.numpy() < reference.published_gamma(size, block, 0.3)
    planes = corners.reshape(12, *corners.shape[2:])
    masks = [reference.published_mask(plane, size, block) for plane in planes]
    keep = ~np.stack(masks).reshape(x.shape)
    np.testing.assert_allclose(y.numpy(), x.numpy() * keep * keep.size / keep.sum(), rtol=1e-6)


@pytest.mark.parametrize(
    ("size", "block", "p", "rate"),
    [
        (28, 7, 0.1, 0.094), (14, 7, 0.1, 0.093), (7, 7, 0.1, 0.101),
        (28, 7, 0.3, 0.251), (14, 7, 0.5, 0.358),
    ],
)  # fmt: skip
def test_the_faithful_rule_realises_the_rates_measured_elsewhere(
    size: int, block: int, p: float, rate: float
) -> None:
    torch.manual_seed(0)
    y = drop_block(torch.ones(800, 8, size, size), p, block, faithful=True)
    assert (y == 0).float().mean().item() == pytest.approx(rate, abs=0.008)


@pytest.mark.parametrize(("size", "block"), [((4, 4), 5), ((8, 8), 7), ((7, 7), 7), ((2, 2), 5)])
def test_the_maps_on_which_timm_drops_nearly_everything_get_p(
    size: tuple[int, ...], block: int
) -> None:
    torch.manual_seed(0)
    for p in (0.1, 0.3):
        y = drop_block(torch.ones(2000, 50, *size), p, block)
        assert (y == 0).float().mean().item() == pytest.approx(p, abs=0.004)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("p", [0.02, 0.1, 0.15])
def test_few_seeds_drawn_one_by_one_drop_each_pixel_as_often_as_the_reference(
    p: float, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    size, block = (9, 12), 6
    x = torch.ones(500, 40, *size).to(memory_format=layout)
    assert module._slots(size, block, p, x.numel()) is not None
    frequency = (drop_block(x, p, block) == 0).float().mean((0, 1)).numpy()
    expected = 1 - (1 - reference.gamma(size, block, p)) ** reference.cover_counts(size, block)
    assert expected.mean() == pytest.approx(p)
    np.testing.assert_allclose(frequency, expected, atol=5 * np.sqrt(p * (1 - p) / 20_000))


def test_a_coin_for_each_position_gives_the_same_frequencies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_slots", lambda *_: None)
    torch.manual_seed(0)
    frequency = (drop_block(torch.ones(500, 40, 9, 12), 0.1, 6) == 0).float().mean((0, 1)).numpy()
    expected = 1 - (1 - reference.gamma((9, 12), 6, 0.1)) ** reference.cover_counts((9, 12), 6)
    np.testing.assert_allclose(frequency, expected, atol=5 * np.sqrt(0.09 / 20_000))


@pytest.mark.parametrize("p", [0.01, 0.05, 0.15, 0.5])
def test_the_seeds_that_are_reserved_suffice(p: float) -> None:
    for size, block in [((64, 64), 7), ((512, 512), 7), ((30, 20, 40), 5), ((20, 20), 40)]:
        total = 64 * int(np.prod(size))
        mean = -np.log1p(-calibrated_gamma(size, block, p)) * total
        slots = module._slots(size, block, p, total)
        assert slots is not None or p > 0.4
        assert slots is None or slots > mean + 8 * np.sqrt(mean)


def test_dropped_pixels_are_blocks_and_survivors_are_rescaled() -> None:
    torch.manual_seed(0)
    x = torch.rand(20, 4, 24, 17) + 0.5
    y = drop_block(x, 0.2, 3)
    dropped = y == 0
    torch.testing.assert_close(y[~dropped], x[~dropped] / 0.8)
    # a 3 x 3 opening leaves a union of 3 x 3 blocks as it is, except where the border cuts them
    inside = dropped.float()
    eroded = -F.max_pool2d(F.pad(-inside, (1, 1, 1, 1), value=-1.0), 3, 1)
    opened = F.max_pool2d(eroded, 3, 1, 1) > 0
    assert torch.equal(opened[..., 1:-1, 1:-1], dropped[..., 1:-1, 1:-1])
    assert dropped.any()


def test_channels_have_their_own_blocks_or_share_them() -> None:
    torch.manual_seed(0)
    own = drop_block(torch.ones(50, 4, 16, 16), 0.2, 5) == 0
    shared = drop_block(torch.ones(50, 4, 16, 16), 0.2, 5, per_channel=False) == 0
    assert (own.any(1) & ~own.all(1)).any()
    assert torch.equal(shared.any(1), shared.all(1))


@pytest.mark.parametrize("p", [0.05, 0.6])
def test_a_layout_changes_the_speed_alone(p: float) -> None:
    for shape, last in [((3, 20, 24, 30), torch.channels_last),
                        ((2, 20, 8, 9, 10), torch.channels_last_3d)]:  # fmt: skip
        x = torch.rand(shape)
        torch.manual_seed(4)
        expected = drop_block(x, p, 4)
        torch.manual_seed(4)
        assert torch.equal(drop_block(x.to(memory_format=last), p, 4), expected)


def test_a_small_map_does_not_change_the_block_for_later_ones() -> None:
    layer = DropBlock(0.3, block_size=7)
    layer(torch.rand(1, 4, 2, 2))
    assert layer.block_size == 7


def test_a_faithful_batch_that_is_dropped_whole_gives_zeros() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        y = drop_block(torch.ones(1, 1, 3, 3), 0.9, 3, faithful=True)
        assert set(y.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_layer_follows_a_schedule_with_the_results_of_the_plain_one() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    layer, x = DropBlock(block_size=5).train(), torch.rand(2, 20, 24, 30)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for p in np.linspace(0.005, 0.3, 25):
        layer.p = float(p)
        torch.manual_seed(1)
        expected = layer(x)
        torch.manual_seed(1)
        torch.testing.assert_close(compiled(x), expected)
    assert counter.frame_count <= 4


@pytest.mark.parametrize("value", [0, -3, 2.0, True, None])
def test_a_bad_block_size_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="block_size must be a whole number, 1 or more"):
        DropBlock(0.1, block_size=value)
    with pytest.raises(ValueError, match="block_size must be a whole number, 1 or more"):
        calibrated_gamma((4, 4), value, 0.1)


def test_a_bad_map_size_is_refused() -> None:
    with pytest.raises(ValueError, match="calibrated_gamma: each size must be a whole number"):
        calibrated_gamma((4, 0), 3, 0.1)


def test_the_function_is_identity_outside_training() -> None:
    x = torch.rand(1, 2, 3)
    assert drop_block(x, 0.5, training=False) is x
    assert drop_block(x, 0.0) is x

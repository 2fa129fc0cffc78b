"""Channel DropBlock against the paper's algorithm, its golden value and its flaws."""

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch

from medseg_reg.regularizers import ChannelDropBlock, channel_drop_block, channel_similarity
from tests.reference import channel_dropblock as reference
from tests.regularizers.contract import RegularizerContract

Metric = Literal["max_activation", "bilinear"]
METRICS: list[Metric] = ["max_activation", "bilinear"]
GOLDEN = torch.tensor(
    [[1.0, 2, 0, 0], [1, 2, 0, 0], [0, 0, 3, 1], [2, 1, 0, 0], [0, 1, 0, 1]],
)[None]


class TestMaxActivation(RegularizerContract):
    name = "channel_drop_block"


class TestBilinear(RegularizerContract):
    name = "channel_drop_block"
    parameters = {"metric": "bilinear"}  # noqa: RUF012


class TestMaxActivationFaithful(RegularizerContract):
    name = "channel_drop_block"
    parameters = {"faithful": True}  # noqa: RUF012
    calibrated = False


class TestBilinearFaithful(RegularizerContract):
    name = "channel_drop_block"
    parameters = {"metric": "bilinear", "faithful": True}  # noqa: RUF012
    calibrated = False


def dropped(y: torch.Tensor) -> torch.Tensor:
    """Which channels (B, C) of a map are zero everywhere."""
    return (y == 0).flatten(2).all(-1)


def test_the_cosine_is_the_golden_value() -> None:
    row = channel_similarity(GOLDEN, torch.tensor([0]), "bilinear")[0]
    assert row.tolist() == pytest.approx([1, 1, 0, 0.8, 0.632456], abs=1e-6)


@pytest.mark.parametrize("faithful", [False, True])
def test_the_golden_group_is_dropped_with_its_first_channel(faithful: bool) -> None:
    # 2 of 5: {0, 1} when either is picked; {2, 4}, {3, 0 or 1}, {4, 3 or 0 or 1...} otherwise
    torch.manual_seed(0)
    x = GOLDEN.expand(4000, -1, -1).contiguous()
    groups = dropped(channel_drop_block(x, 0.4, "bilinear", faithful=faithful))
    alone = groups[:, 0] & groups[:, 1] & (groups.sum(1) == 2)
    # picked 0 or 1: two in five; a picked 3 takes one of them, or both by the published threshold
    assert alone.float().mean().item() == pytest.approx(0.4, abs=0.05)
    assert not (groups[:, 0] & groups[:, 2]).any()


@pytest.mark.parametrize("size", [(9,), (7, 5), (4, 5, 3), (1, 6), (2, 2), (1, 1)])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("faithful", [False, True])
def test_the_similarities_equal_the_reference(
    size: tuple[int, ...], signed: bool, faithful: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 6, *size)
    x = x if signed else x.relu()
    x[1, 2] = 0
    picked = torch.tensor([4, 0, 5])
    for metric in METRICS:
        rows = channel_similarity(x, picked, metric, faithful=faithful)
        for sample, c, row in zip(x.numpy(), picked.tolist(), rows.numpy(), strict=True):
            if metric == "bilinear":
                expected = reference.cosine(sample)[c]
            else:
                expected = reference.nearness(sample, faithful)[c]
            np.testing.assert_allclose(row, expected, atol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("p", [0.1, 0.35, 0.6])
def test_each_channel_is_dropped_as_often_as_the_reference_says(metric: Metric, p: float) -> None:
    torch.manual_seed(1)
    sample = torch.rand(6, 4, 5)
    x = sample.expand(8000, -1, -1, -1).contiguous()
    frequency = dropped(channel_drop_block(x, p, metric)).float().mean(0)
    matrix = reference.cosine if metric == "bilinear" else reference.nearness
    expected = reference.drop_rates(matrix(sample.numpy()), p)
    assert expected.mean() == pytest.approx(p)
    np.testing.assert_allclose(frequency.numpy(), expected, atol=0.025)


@pytest.mark.parametrize("metric", METRICS)
def test_the_faithful_groups_are_those_of_the_reference(metric: Metric) -> None:
    torch.manual_seed(2)
    sample = torch.rand(10, 6, 6)
    x = sample.expand(500, -1, -1, -1).contiguous()
    y = channel_drop_block(x, 0.3, metric, faithful=True)
    found = {tuple(row) for row in dropped(y).tolist()}
    if metric == "bilinear":
        matrix = reference.cosine(sample.numpy())
    else:
        matrix = reference.nearness(sample.numpy(), published=True)
    expected = {tuple(reference.published_group(row, 0.3).tolist()) for row in matrix}
    assert found == expected
    kept = y != 0
    torch.testing.assert_close(y[kept], (x / 0.7)[kept])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("faithful", [False, True])
def test_channels_that_say_the_same_are_lost_together(metric: Metric, faithful: bool) -> None:
    torch.manual_seed(0)
    base = torch.rand(1000, 4, 8, 8).square()
    x = torch.cat([base, 2 * base], 1)  # channel c and c + 4 are copies
    gone = dropped(channel_drop_block(x, 0.25, metric, faithful=faithful))
    pairs = (gone[:, :4] & gone[:, 4:]).any(1)
    assert pairs.float().mean() > 0.85
    by_chance = dropped(torch.nn.functional.dropout2d(x, 0.25))
    assert (by_chance[:, :4] & by_chance[:, 4:]).any(1).float().mean() < 0.3


@pytest.mark.parametrize("metric", METRICS)
def test_equal_similarities_are_decided_at_random(metric: Metric) -> None:
    # all channels alike: every peak at one place, every cosine 1
    torch.manual_seed(0)
    x = torch.rand(1, 1, 5, 5).expand(4000, 8, -1, -1).contiguous()
    gone = dropped(channel_drop_block(x, 0.25, metric))
    assert (gone.sum(1) == 2).all()
    assert gone.float().mean(0).tolist() == pytest.approx([0.25] * 8, abs=0.04)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("p", [0.05, 0.25, 0.9])
@pytest.mark.parametrize("channels", [2, 3, 8])
def test_all_peaks_at_one_place_do_not_zero_the_sample_in_the_faithful_rule(
    metric: Metric, p: float, channels: int
) -> None:
    x = torch.rand(1, 1, 5, 5).expand(50, channels, -1, -1).contiguous() + 0.1
    gone = dropped(channel_drop_block(x, p, metric, faithful=True))
    assert (gone.sum(1) == min(max(1, int(channels * p)), channels - 1)).all()


def test_the_faithful_rule_takes_at_least_one_channel_but_not_the_only_one() -> None:
    x = torch.rand(20, 3, 6, 6) + 0.1
    for metric in METRICS:
        gone = dropped(channel_drop_block(x, 0.05, metric, faithful=True))
        assert (gone.sum(1) >= 1).all()
        assert (gone.sum(1) < 3).all()
        y = channel_drop_block(x[:, :1], 0.05, metric, faithful=True)
        torch.testing.assert_close(y, x[:, :1] / 0.95)


def test_the_faithful_rule_drops_all_that_tie_with_the_threshold() -> None:
    # channels 0..4 share a peak, the others are far: nominal 2 of 10
    x = torch.zeros(200, 10, 9, 9)
    x[:, :5, 2, 2] = 1
    for c in range(5, 10):
        x[:, c, 7, c - 2] = 1
    gone = dropped_live(x, channel_drop_block(x, 0.2, faithful=True))
    assert (gone[:, :5].all(1) | ~gone[:, :5].any(1)).all()
    assert gone[:, :5].all(1).any()
    assert (dropped_live(x, channel_drop_block(x, 0.2)).sum(1) == 2).all()


@pytest.mark.parametrize(
    ("metric", "p", "low", "high"),
    [("max_activation", 0.2, 0.19, 0.26), ("bilinear", 0.05, 0.044, 0.05)],
)
def test_the_faithful_rule_realises_the_rates_measured_on_the_published_rule(
    metric: Metric, p: float, low: float, high: float
) -> None:
    torch.manual_seed(0)
    for channels, size in ((64, 14), (128, 28)):
        x = torch.randn(40, channels, size, size).relu()
        gone = dropped(channel_drop_block(x, p, metric, faithful=True))
        assert low < gone.float().mean().item() < high


def dropped_live(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Which channels (B, C) lost their values."""
    return (x != 0).flatten(2).any(-1) & dropped(y)


@pytest.mark.parametrize("metric", METRICS)
def test_a_dead_channel_is_neither_picked_nor_counted(metric: Metric) -> None:
    torch.manual_seed(0)
    x = torch.rand(500, 16, 6, 6) + 0.1
    x[:, 4:] = 0
    gone = dropped_live(x, channel_drop_block(x, 0.25, metric))
    assert (gone.sum(1) == 1).all()  # a quarter of the four that live
    assert ChannelDropBlock(0.25, metric).measured_rate(x, channel_drop_block(x, 0.25, metric)) == (
        pytest.approx(0.25)
    )


@pytest.mark.parametrize("metric", METRICS)
def test_dead_channels_do_not_change_what_happens_to_the_others(metric: Metric) -> None:
    torch.manual_seed(0)
    live = torch.rand(5, 6, 6)
    live[0, 0, 0] = 9  # beside the corner, where a dead channel's peak would be found
    live[3:] = live[3:4] * torch.rand(2, 1, 1).add(1) + 0.1 * torch.rand(2, 6, 6)
    x = torch.cat([live, torch.zeros(20, 6, 6)]).expand(6000, -1, -1, -1).contiguous()
    frequency = dropped(channel_drop_block(x, 0.3, metric))[:, :5].float().mean(0)
    matrix = reference.cosine if metric == "bilinear" else reference.nearness
    expected = reference.drop_rates(matrix(live.numpy()), 0.3)
    assert expected.max() > expected.min() + 0.1
    np.testing.assert_allclose(frequency.numpy(), expected, atol=0.025)


@pytest.mark.parametrize("metric", METRICS)
def test_the_picked_channel_is_dropped_even_if_others_resemble_it_entirely(metric: Metric) -> None:
    x = torch.rand(500, 1, 5, 5).expand(-1, 8, -1, -1).contiguous()
    torch.manual_seed(0)
    picked = torch.rand(500, 8).argmax(1)  # the first numbers that the rule draws
    torch.manual_seed(0)
    gone = dropped(channel_drop_block(x, 0.25, metric))
    assert gone.gather(1, picked[:, None]).all()


def test_a_dead_picked_channel_does_not_zero_the_sample_in_the_faithful_rule() -> None:
    x = torch.rand(500, 10, 4, 4) + 0.1
    x[:, :5] = 0  # picked in half of the samples
    gone = dropped_live(x, channel_drop_block(x, 0.2, "bilinear", faithful=True))
    assert (gone.sum(1) <= 2).all()
    assert (gone.sum(1) < 2).any()


@pytest.mark.parametrize("metric", METRICS)
def test_a_single_live_channel_is_zeroed_with_probability_p(metric: Metric) -> None:
    torch.manual_seed(0)
    x = torch.rand(4000, 1, 3, 3) + 0.1
    gone = dropped(channel_drop_block(x, 0.2, metric))
    assert gone.float().mean().item() == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize(("channels", "counts"), [(3, {0, 1}), (10, {2}), (7, {1, 2})])
def test_the_number_is_rounded_up_or_down_at_random(channels: int, counts: set[int]) -> None:
    gone = dropped(channel_drop_block(torch.rand(300, channels, 6, 6) + 0.1, 0.2))
    assert set(gone.sum(1).tolist()) == counts


def test_survivors_are_divided_by_the_nominal_share() -> None:
    x = torch.rand(4, 10, 6, 6) + 0.1
    y = channel_drop_block(x, 0.3)
    kept = y != 0
    torch.testing.assert_close(y[kept], (x / 0.7)[kept])
    assert not kept.all()


@pytest.mark.parametrize("row", [1, 2, 5])
def test_the_row_and_the_column_of_a_peak_both_count(row: int) -> None:
    # true division of the flat index leaves one coordinate at 0
    x = torch.zeros(1, 2, 8, 8)
    x[0, 0, 1, 1] = x[0, 1, row, 6] = 1
    distance = -channel_similarity(x, torch.tensor([0]), faithful=True)[0, 1].item()
    near = [abs(row + d - 1) for d in (-1, 0, 1)]  # the mean makes a 3 x 3 plateau
    assert distance >= math.hypot(min(near), 4) - 1e-6
    assert distance**2 == pytest.approx(round(distance**2), abs=1e-4)


def test_far_peaks_have_an_exact_distance_in_half_precision() -> None:
    x = torch.zeros(1, 2, 300, 300, dtype=torch.float16)
    x[0, 0, 0, 0], x[0, 1, 299, 299] = 1, 1
    s = channel_similarity(x, torch.tensor([0]))
    assert s[0, 0] == 0
    assert s[0, 1].item() == pytest.approx(-299 * math.sqrt(2), abs=0.01)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_the_cosine_does_not_depend_on_the_scale(scale: float) -> None:
    x = torch.randn(2, 5, 6, 6)
    picked = torch.tensor([0, 3])
    expected = channel_similarity(x, picked, "bilinear")
    torch.testing.assert_close(channel_similarity(x * scale, picked, "bilinear"), expected)


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_channels_whose_squares_do_not_fit_are_live_and_resemble_none(scale: float) -> None:
    x = (torch.rand(100, 8, 6, 6) + 0.1) * scale
    assert (channel_similarity(x, torch.zeros(100, dtype=torch.long), "bilinear") == 0).all()
    assert (dropped(channel_drop_block(x, 0.25, "bilinear")).sum(1) == 2).all()


def test_the_similarity_stays_in_float32_under_autocast() -> None:
    x, picked = torch.randn(2, 5, 6, 6), torch.tensor([0, 3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s = channel_similarity(x, picked, "bilinear")
    assert torch.equal(s, channel_similarity(x, picked, "bilinear"))


@pytest.mark.parametrize("metric", METRICS)
def test_channels_with_nan_or_infinity_stay(metric: Metric) -> None:
    x = torch.rand(200, 4, 6, 6) + 0.1
    x[:, 1, 0, 0], x[:, 2, 0, 0] = math.nan, math.inf
    y = channel_drop_block(x, 0.5, metric)
    assert (y[:, 1:3, 1:] != 0).all()
    gone = dropped(y)
    assert (gone.sum(1) == 1).all()
    assert gone[:, 0].any()
    assert gone[:, 3].any()


@pytest.mark.parametrize("metric", METRICS)
def test_a_layout_does_not_change_the_choice(metric: Metric) -> None:
    x = torch.rand(3, 8, 9, 7)
    torch.manual_seed(4)
    expected = channel_drop_block(x, 0.3, metric)
    torch.manual_seed(4)
    last = channel_drop_block(x.to(memory_format=torch.channels_last), 0.3, metric)
    torch.testing.assert_close(last, expected)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"metric": "bilinaer"}, "did you mean 'bilinear'"),
        ({"metric": None}, "choices: max_activation, bilinear"),
    ],
)
def test_an_unknown_metric_is_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChannelDropBlock(0.1, **parameters)
    with pytest.raises(ValueError, match=message):
        channel_drop_block(torch.rand(1, 4, 3, 3), 0.1, **parameters)


def test_the_function_is_identity_outside_training() -> None:
    x = torch.rand(1, 4, 3, 3)
    assert channel_drop_block(x, 0.5, training=False) is x
    assert channel_drop_block(x, 0.0) is x

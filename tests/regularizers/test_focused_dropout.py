"""FocusedDropout against the paper's algorithm, its golden values and its edge cases."""

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from medseg_reg.regularizers import FocusedDropout, Regularizer, build, focused_dropout
from tests.reference import focused_dropout as reference
from tests.regularizers.contract import RegularizerContract

GOLDEN = torch.tensor([[[0.0, 1], [2, 4]], [[1, 1], [1, 1]], [[5, 0], [0, 0]]])[None]


class TestFocusedDropout(RegularizerContract):
    name = "focused_dropout"
    calibrated = False

    def test_a_schedule_may_assign_the_rate(self) -> None:
        # p is the share of batches that take part
        layer, x = self.make(0.0), self.positive(1, 3, 4, 4)
        x[..., 0] = 0.01  # never in focus
        for p in (0.5, 0.1):
            layer.p = p
            took = [bool((layer(x) == 0).any()) for _ in range(1000)]
            assert sum(took) / len(took) == pytest.approx(p, abs=0.06)
        layer.p = 0
        assert layer(x) is x


class TestTakingPart(RegularizerContract):
    name = "focused_dropout"
    parameters = {"gamma": (0.6, 0.9)}  # noqa: RUF012
    calibrated = False

    def make(self, p: float = 0.3) -> Regularizer:
        layer = build(self.name, p=p, **self.parameters).train()
        assert isinstance(layer, FocusedDropout)
        layer.taking_part = True
        return layer


def take_part(x: torch.Tensor, gamma: tuple[float, float] = (0.3, 0.6)) -> torch.Tensor:
    return focused_dropout(x, gamma=gamma, taking_part=True)


@pytest.mark.parametrize(("gamma", "mask"), [(0.5, [[0.0, 0], [0, 1]]), (0.3, [[0.0, 0], [1, 1]])])
def test_the_masks_are_the_golden_ones(gamma: float, mask: list[list[float]]) -> None:
    y = take_part(GOLDEN, (gamma, gamma))
    assert torch.equal(y, GOLDEN * torch.tensor(mask))
    assert reference.focus(GOLDEN[0].numpy(), gamma).tolist() == mask


@pytest.mark.parametrize("size", [(9,), (7, 5), (4, 5, 3), (1, 1)])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("signed", [False, True])
def test_the_map_equals_the_reference(size: tuple[int, ...], gamma: float, signed: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4, *size)
    x = x if signed else x.relu()
    x[3] = -x[3].abs() - 0.1
    y = take_part(x, (gamma, gamma))
    expected = [s * reference.focus(s, gamma) for s in x.numpy()]
    np.testing.assert_allclose(y.numpy(), expected)


def test_gamma_is_one_number_for_each_image_uniform_between_its_limits() -> None:
    torch.manual_seed(0)
    ramp = torch.linspace(0.001, 1, 1000)
    x = ramp.repeat(3000, 2, 1)
    kept = take_part(x) != 0
    assert torch.equal(kept.all(1), kept.any(1))  # all channels share the mask
    threshold = 1 - kept[:, 0].float().mean(1)
    assert 0.299 <= threshold.min() < 0.31
    assert 0.59 < threshold.max() <= 0.601
    quarters = torch.histc(threshold, 4, 0.3, 0.6) / len(threshold)
    assert quarters.tolist() == pytest.approx([0.25] * 4, abs=0.04)
    alone = take_part(ramp.sqrt()[None, None])  # not one number for each position
    assert (alone != 0).int().diff().abs().sum() == 1


def test_nothing_is_rescaled() -> None:
    x = torch.rand(4, 3, 8, 8) + 0.1
    y = take_part(x)
    assert torch.equal(y[y != 0], x[y != 0])
    assert (y == 0).any()


def test_the_focused_positions_are_those_of_the_most_active_channel() -> None:
    x = torch.rand(1, 6, 8, 8)
    x[0, 4, :3] += 5
    kept = take_part(x)[0, 0] != 0
    assert kept[:3].all()
    assert not kept[3:].any()


def test_the_coin_is_for_the_whole_batch() -> None:
    torch.manual_seed(0)
    x = torch.rand(16, 2, 6, 6) + 0.1
    took = torch.stack(
        [(focused_dropout(x, 0.3) == 0).flatten(1).any(1) for _ in range(600)]
    ).float()
    assert ((took.mean(1) == 0) | (took.mean(1) == 1)).all()
    assert took.mean().item() == pytest.approx(0.3, abs=0.07)


def test_the_training_loop_may_decide_instead_of_the_coin() -> None:
    layer, x = FocusedDropout(0.1), torch.rand(2, 3, 6, 6) + 0.1
    layer.taking_part = False
    state = torch.get_rng_state()
    assert layer(x) is x
    assert torch.equal(torch.get_rng_state(), state)
    layer.taking_part = True
    assert all((layer(x) == 0).any() for _ in range(20))
    assert layer.eval()(x) is x
    layer.train().p = 0.0
    assert layer(x) is x


def test_the_decision_is_no_argument_and_no_part_of_the_repr_but_is_copied() -> None:
    layer = FocusedDropout(0.1)
    assert layer.taking_part is None
    text = repr(layer)
    layer.taking_part = True
    assert repr(layer) == text
    assert text == "FocusedDropout(p=0.1, gamma=(0.3, 0.6), magnified_weight_decay=0.001)"
    assert copy.deepcopy(layer).taking_part is True
    assert pickle.loads(pickle.dumps(layer)).taking_part is True
    with pytest.raises(ValueError, match="parameter of focused_dropout"):
        build("focused_dropout", taking_part=True)


@pytest.mark.parametrize(
    ("gamma", "low", "high"), [((0.3, 0.6), 0.67, 0.91), ((0.6, 0.9), 0.91, 0.99)]
)
def test_a_batch_that_takes_part_loses_the_documented_share(
    gamma: tuple[float, float], low: float, high: float
) -> None:
    torch.manual_seed(0)
    layer = FocusedDropout(0.1, gamma)
    layer.taking_part = True
    x = torch.randn(400, 16, 16, 16).relu()
    assert low < layer.measured_rate(x, layer(x)) < high


@pytest.mark.parametrize("kind", ["zero", "negative", "nan", "inf", "tiny"])
def test_a_sample_without_a_focus_stays_as_it_is(kind: str) -> None:
    x = torch.rand(3, 2, 4, 4) + 0.1
    x[1] = {
        "zero": torch.zeros(2, 4, 4),
        "negative": -x[1],
        "nan": torch.full((2, 4, 4), math.nan),
        "inf": torch.full((2, 4, 4), math.inf),
        "tiny": torch.full((2, 4, 4), 1e-45),
    }[kind]
    y = take_part(x, (0.6, 0.6))
    torch.testing.assert_close(y[1], x[1], equal_nan=True, rtol=0, atol=0)
    assert (y[[0, 2]] == 0).any()


def test_a_channel_with_nan_is_no_reference() -> None:
    x = torch.rand(1, 3, 6, 6) + 0.1
    x[0, 1, 2, 2] = math.nan
    with_nan = take_part(x, (0.5, 0.5))[:, [0, 2]]
    assert torch.equal(with_nan, take_part(x[:, [0, 2]], (0.5, 0.5)))


def test_the_maximum_itself_always_stays() -> None:
    x = torch.rand(200, 3, 5, 5)
    y = take_part(x, (0.99, 0.99))
    assert (y != 0).flatten(1).any(1).all()


def test_it_stands_at_the_bottleneck_unless_told_otherwise() -> None:
    assert FocusedDropout.default_places == ("bottleneck",)


def test_a_list_of_a_configuration_serves_as_gamma() -> None:
    layer = FocusedDropout(0.1, [0, 0.5], magnified_weight_decay=None)  # None: leave it alone
    assert layer.gamma == (0.0, 0.5)
    assert layer.magnified_weight_decay is None


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"gamma": 0.5}, r"a pair with 0 <= low <= high < 1; got 0.5.*pass \(g, g\)"),
        ({"gamma": (0.6, 0.3)}, "a pair with"),
        ({"gamma": (0.3, 1.0)}, "a pair with"),
        ({"gamma": (-0.1, 0.3)}, "a pair with"),
        ({"gamma": (0.1, 0.3, 0.5)}, "a pair with"),
        ({"gamma": (math.nan, 0.5)}, "a pair with"),
        ({"gamma": "ab"}, "a pair with"),
        ({"magnified_weight_decay": -1}, "magnified_weight_decay must be a finite number"),
        ({"magnified_weight_decay": math.inf}, "magnified_weight_decay must be a finite number"),
    ],
)
def test_bad_parameters_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FocusedDropout(0.1, **parameters)


def test_the_function_is_identity_outside_training() -> None:
    x = torch.rand(1, 4, 3, 3)
    assert focused_dropout(x, 0.5, training=False, taking_part=True) is x
    assert focused_dropout(x, 0.0, taking_part=True) is x
    with pytest.raises(ValueError, match="focused_dropout: gamma"):
        focused_dropout(x, 0.5, (0.5, 2.0))

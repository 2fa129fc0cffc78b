"""The rate of a layer follows its schedule over the training and its ramp over the depth."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medseg_reg.config_regularization import DepthRampSpec, RateScheduleSpec
from medseg_reg.engine.rates import apply_depth_ramp, in_order_of_flow, rate_factor
from medseg_reg.errors import MedsegError
from medseg_reg.insertion import place
from medseg_reg.networks import UNet

SIZE = (1, 1, 16, 16)

rises = st.builds(
    RateScheduleSpec,
    name=st.sampled_from(["linear", "cosine"]),
    start=st.floats(0, 0.99),
    duration=st.floats(0.01, 1),
)
valleys = st.builds(RateScheduleSpec, name=st.just("v_shape"), turn=st.floats(0.01, 0.99))


def network(**more: Any) -> UNet:
    torch.manual_seed(0)
    return UNet(2, 1, 2, channels=(4, 6, 8), **more)


@pytest.mark.parametrize(
    ("spec", "t", "factor"),
    [
        ({}, 0.0, 1.0),
        ({}, 0.7, 1.0),
        ({"name": "linear"}, 0.0, 0.0),
        ({"name": "linear"}, 0.25, 0.25),
        ({"name": "linear"}, 1.0, 1.0),
        ({"name": "linear", "duration": 0.5}, 0.25, 0.5),
        ({"name": "linear", "duration": 0.5}, 0.75, 1.0),
        ({"name": "linear", "start": 0.2}, 0.5, 0.6),
        ({"name": "cosine"}, 0.0, 0.0),
        ({"name": "cosine"}, 0.25, (1 - math.sqrt(0.5)) / 2),
        ({"name": "cosine"}, 0.5, 0.5),
        ({"name": "cosine", "start": 0.5, "duration": 0.5}, 0.25, 0.75),
        ({"name": "cosine", "start": 0.5, "duration": 0.5}, 0.9, 1.0),
        ({"name": "v_shape"}, 0.0, 1.0),
        ({"name": "v_shape"}, 0.05, 0.5),
        ({"name": "v_shape"}, 0.1, 0.0),
        ({"name": "v_shape"}, 0.55, 0.5),
        ({"name": "v_shape"}, 1.0, 1.0),
        ({"name": "v_shape", "turn": 0.5}, 0.75, 0.5),
    ],
)
def test_the_factor_is_that_of_the_formula(spec: dict[str, Any], t: float, factor: float) -> None:
    assert rate_factor(RateScheduleSpec(**spec), t) == pytest.approx(factor, abs=1e-12)


@given(st.one_of(rises, valleys), st.floats(0, 1))
def test_the_factor_lies_between_zero_and_one(spec: RateScheduleSpec, t: float) -> None:
    assert 0 <= rate_factor(spec, t) <= 1


@given(rises, st.floats(0, 1), st.floats(0, 1))
def test_a_rise_never_falls_and_ends_at_one(spec: RateScheduleSpec, a: float, b: float) -> None:
    early, late = sorted((a, b))
    assert rate_factor(spec, early) <= rate_factor(spec, late) + 1e-12
    assert rate_factor(spec, 0.0) == pytest.approx(spec.start)
    assert rate_factor(spec, spec.duration) == pytest.approx(1)


@given(valleys)
def test_a_v_is_high_at_both_ends_and_zero_at_its_turn(spec: RateScheduleSpec) -> None:
    assert [rate_factor(spec, t) for t in (0, spec.turn, 1)] == [1, 0, 1]


@pytest.mark.parametrize(
    ("pattern", "order"),
    [
        (["decoder"], ["decoder.1.after_block", "decoder.0.after_block"]),
        (
            ["head", "between_convs", "input"],
            [
                "input",
                "encoder.0.between_convs",
                "encoder.1.between_convs",
                "bottleneck.between_convs",
                "decoder.1.between_convs",
                "decoder.0.between_convs",
                "head",
            ],
        ),
        (
            ["skip", "encoder"],
            ["encoder.0.after_block", "skip.0", "encoder.1.after_block", "skip.1"],
        ),
    ],
)
@pytest.mark.parametrize("more", [{}, {"norm": "instance", "upsample": "nontrainable"}])
def test_places_are_met_in_the_order_of_the_data_flow(
    pattern: list[str], order: list[str], more: dict[str, Any]
) -> None:
    net = network(**more)
    placements = place(net, "dropout", pattern, {})
    assert [p.place for p in in_order_of_flow(net, placements, SIZE)] == order


def test_asking_for_the_order_leaves_no_trace() -> None:
    net = network()
    placements = place(net, "dropout", ["decoder"], {})
    net.encoder[0].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    state = torch.get_rng_state()
    in_order_of_flow(net, placements, (1, 1, 50, 37))
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_a_ramp_rises_evenly_over_the_places_as_a_linspace_does() -> None:
    net = network()
    placements = place(net, "spatial_dropout", ["between_convs"], {"p": 0.4})
    apply_depth_ramp(net, placements, DepthRampSpec(), SIZE)
    ordered = in_order_of_flow(net, placements, SIZE)
    expected = torch.linspace(0, 0.4, len(ordered)).tolist()
    assert [p.p for p in ordered] == pytest.approx(expected)
    assert [net.get_submodule(p.path).p for p in ordered] == [p.p for p in ordered]


def test_a_ramp_can_fall() -> None:
    net = network()
    placements = place(net, "dropout", ["encoder", "bottleneck"], {"p": 0.4})
    apply_depth_ramp(net, placements, DepthRampSpec(first=1, last=0.5), SIZE)
    assert [p.p for p in in_order_of_flow(net, placements, SIZE)] == pytest.approx([0.4, 0.3, 0.2])


def test_a_ramp_over_one_place_is_refused() -> None:
    net = network()
    placements = place(net, "dropout", ["bottleneck"], {"p": 0.4})
    with pytest.raises(MedsegError, match="Dropout has one place, 'bottleneck.after_block'"):
        apply_depth_ramp(net, placements, DepthRampSpec(), SIZE)


def test_a_place_that_the_network_does_not_use_is_named() -> None:
    net = network()
    placements = place(net, "dropout", ["encoder", "head"], {"p": 0.4})
    net.forward = lambda x: net.encoder[1](net.encoder[0](x))  # type: ignore[method-assign]
    with pytest.raises(MedsegError, match="at 'head' was never reached"):
        apply_depth_ramp(net, placements, DepthRampSpec(), SIZE)

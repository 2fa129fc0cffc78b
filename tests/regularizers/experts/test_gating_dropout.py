"""Gating Dropout: one coin for everybody; tokens stay with the experts of their machine."""

from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from medseg_reg.regularizers import GatingDropout, Regularizer, build, gating_dropout
from medseg_reg.regularizers.protocols import StepTaker
from tests.reference import gating_dropout as reference
from tests.regularizers.contract import RegularizerContract


class TestGateDrop(RegularizerContract):
    name = "gating_dropout"
    calibrated = False  # p is the share of steps
    independent = False  # one coin, and a machine by the place in the batch

    def make(self, p: float = 0.3) -> Regularizer:
        layer = build(self.name, p=p, **self.parameters).train()
        assert isinstance(layer, GatingDropout)
        layer.taking_part = True
        return layer


class TestGateDropOnThreeMachines(TestGateDrop):
    parameters: ClassVar[dict[str, Any]] = {"groups": 3}


class TestGateExpertDrop(RegularizerContract):
    name = "gating_dropout"
    parameters: ClassVar[dict[str, Any]] = {"mode": "gate_expert_drop"}
    calibrated = False
    independent = False

    def test_the_gradient_flows_and_is_finite(self) -> None:
        x, layer = self.positive(4, 6, 8, 5).requires_grad_(), self.make(0.3)
        for taking_part, slope in ((True, 0.0), (False, 1.0)):
            layer.taking_part = taking_part
            (grad,) = torch.autograd.grad(layer(x).sum(), x)
            assert (grad == slope).all()

    def test_a_schedule_may_assign_the_rate(self) -> None:
        layer, x = self.make(0.0), self.positive(1, 3, 4)
        for p in (0.5, 0.1):
            layer.p = p
            closed = [bool((layer(x) == 0).all()) for _ in range(1000)]
            assert sum(closed) / 1000 == pytest.approx(p, abs=0.06)
        layer.p = 0
        assert layer(x) is x


@pytest.mark.parametrize("mode", ["gate_drop", "gate_expert_drop"])
@pytest.mark.parametrize(
    ("batch", "experts", "groups"), [(4, 6, 2), (5, 4, 3), (1, 4, 2), (2, 2, 9)]
)
def test_the_gates_that_close_are_those_of_the_reference(
    mode: str, batch: int, experts: int, groups: int
) -> None:
    gates = torch.rand(batch, experts, 7, dtype=torch.float64)
    found = gating_dropout(gates, mode=mode, groups=groups, taking_part=True)
    np.testing.assert_array_equal(found, reference.closed(gates.numpy(), mode, groups))
    assert gating_dropout(gates, mode=mode, groups=groups, taking_part=False) is gates


def test_every_sample_keeps_an_expert_and_every_expert_of_enough_samples_is_used() -> None:
    for experts in range(1, 9):
        for groups in range(1, 10):
            y = gating_dropout(torch.ones(9, experts, 1), groups=groups, taking_part=True)
            assert (y.sum(1) > 0).all()
            assert (y.sum(0) > 0).all()


def test_one_coin_decides_for_the_whole_batch_in_a_share_p_of_the_passes() -> None:
    torch.manual_seed(0)
    layer, gates = GatingDropout(0.3), torch.rand(6, 4, 5) + 0.1
    shares = [float((layer(gates) == 0).float().mean()) for _ in range(2000)]
    assert set(shares) == {0.0, 0.5}
    assert np.mean([share > 0 for share in shares]) == pytest.approx(0.3, abs=0.05)


def test_what_the_loop_decides_goes_before_the_coin() -> None:
    layer = GatingDropout(0.5)
    assert isinstance(layer, StepTaker)
    for decided in (True, False):
        layer.taking_part = decided
        assert {layer.decide(torch.device("cpu")) for _ in range(20)} == {decided}
    layer.taking_part = True
    assert not layer.eval().decide(torch.device("cpu"))
    layer.train().p = 0
    assert not layer.decide(torch.device("cpu"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"mode": "gate"}, "did you mean 'gate_drop'"), ({"groups": 0}, "groups must be a whole")],
)
def test_a_bad_argument_is_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        GatingDropout(**arguments)

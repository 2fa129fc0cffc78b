"""Stochastic Depth and DropPath: coins, scaling, and the one layer that acts in eval."""

import math

import numpy as np
import pytest
import torch

from medseg_reg.regularizers import (
    DropPath,
    Regularizer,
    StochasticDepth,
    drop_path,
    stochastic_depth,
)
from tests.reference import stochastic_depth as reference
from tests.regularizers.contract import MAPS, RegularizerContract


def rate_over_passes(layer: Regularizer, size: tuple[int, ...], batch: int, passes: int) -> float:
    """The mean of the measured rate; its unit is a sample or a batch, so maps may be tiny."""
    torch.manual_seed(0)
    x = torch.rand(batch, 2, *size) + 0.5
    return sum(layer.measured_rate(x, layer(x)) for _ in range(passes)) / passes


class TestDropPath(RegularizerContract):
    name = "drop_path"

    @pytest.mark.parametrize("size", MAPS)
    @pytest.mark.parametrize("p", [0.1, 0.5])
    def test_the_realised_rate_is_p_at_every_map_size(
        self, size: tuple[int, ...], p: float
    ) -> None:
        rate = rate_over_passes(self.make(p), size, batch=4000, passes=1)
        assert rate == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / 4000))


class TestStochasticDepth(RegularizerContract):
    """One coin for the batch couples its samples by intention."""

    name = "stochastic_depth"
    independent = False

    @pytest.mark.parametrize("size", MAPS)
    @pytest.mark.parametrize("p", [0.1, 0.5])
    def test_the_realised_rate_is_p_at_every_map_size(
        self, size: tuple[int, ...], p: float
    ) -> None:
        rate = rate_over_passes(self.make(p), size, batch=2, passes=1000)
        assert rate == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / 1000))

    def test_a_schedule_may_assign_the_rate(self) -> None:
        layer, x = self.make(0.0), self.positive(1, 2, 3)
        layer.p = 0.5
        assert layer(x) is not x
        assert sum(layer.measured_rate(x, layer(x)) for _ in range(100)) > 20
        layer.p = 0
        assert layer(x) is x

    def test_the_gradient_flows_and_is_finite(self) -> None:
        layer, x = self.make(0.5), self.positive(4, 6, 8, 5).requires_grad_()
        flows = set()
        for _ in range(20):
            x.grad = None
            layer(x).square().sum().backward()
            assert x.grad is not None
            assert x.grad.isfinite().all()
            flows.add(bool(x.grad.abs().sum() > 0))
        assert flows == {True, False}  # a skipped branch learns nothing in that step


class TestStochasticDepthFaithful(TestStochasticDepth):
    """Published, it scales in eval instead of training: the exceptions below."""

    parameters = {"faithful": True}  # noqa: RUF012

    def test_eval_and_p_zero_return_the_same_tensor_object(self) -> None:
        x = self.positive(2, 4, 5, 6)
        torch.testing.assert_close(self.make(0.3).eval()(x), 0.7 * x)
        assert self.make(0.0)(x) is x
        assert self.make(0.0).eval()(x) is x

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    def test_it_vanishes_from_an_exported_network(self) -> None:
        network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), self.make()).eval()
        x = torch.rand(1, 1, 4, 4)
        program = torch.export.export(network, (x,))
        calls = [n.target for n in program.graph.nodes if n.op == "call_function"]
        assert calls == [torch.ops.aten.conv2d.default, torch.ops.aten.mul.Tensor]
        torch.testing.assert_close(program.module()(x), 0.7 * network[0](x))


@pytest.mark.parametrize("shape", [(9, 5), (9, 3, 4), (9, 2, 3, 4)])
def test_drop_path_equals_the_reference(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape[0], 3, *shape[1:], dtype=torch.float64)
    torch.manual_seed(3)
    y = drop_path(x, 0.4)
    torch.manual_seed(3)
    coins = torch.rand(9).numpy()
    np.testing.assert_allclose(y.numpy(), reference.drop_path(x.numpy(), coins, 0.4))


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_residual_block_equals_the_reference(training: bool, faithful: bool) -> None:
    x, branch = torch.rand(2, 5, 3, 7, dtype=torch.float64), torch.rand(5, 3, 7).double()
    for seed in range(6):
        torch.manual_seed(seed)
        layer = StochasticDepth(0.4, faithful=faithful).train(training)
        y = x + layer(branch.expand(2, -1, -1, -1))
        torch.manual_seed(seed)
        coin = torch.rand(1).item() if training else None
        expected = reference.residual_block(x.numpy(), branch.numpy(), 0.4, coin, faithful)
        np.testing.assert_allclose(y.numpy(), expected)


def test_one_coin_serves_the_batch_or_each_sample_has_its_own() -> None:
    torch.manual_seed(0)
    x = torch.ones(16, 2, 3)
    alive = [stochastic_depth(x, 0.5).flatten(1).any(1) for _ in range(50)]
    assert all(a.all() or not a.any() for a in alive)
    assert {bool(a.all()) for a in alive} == {True, False}
    mixed = drop_path(x, 0.5).flatten(1).any(1)
    assert mixed.any()
    assert not mixed.all()


def test_the_mean_is_kept_by_rescaling_or_in_the_published_rule_by_eval() -> None:
    torch.manual_seed(0)
    x = torch.ones(1, 1, 1)
    rescaled = sum(stochastic_depth(x, 0.3).item() for _ in range(4000)) / 4000
    assert rescaled == pytest.approx(1, abs=0.05)
    published = sum(stochastic_depth(x, 0.3, faithful=True).item() for _ in range(4000)) / 4000
    evaluated = stochastic_depth(x, 0.3, training=False, faithful=True).item()
    assert evaluated == pytest.approx(0.7)
    assert published == pytest.approx(evaluated, abs=0.04)


def test_tokens_are_taken_as_they_are() -> None:
    tokens = torch.ones(200, 10, 8)  # (B, N, C)
    whole = drop_path(tokens, 0.5).flatten(1)
    assert torch.equal(whole.any(1), whole.all(1))


def test_they_belong_to_residual_branches() -> None:
    assert DropPath.default_places == StochasticDepth.default_places == ("residual",)
    assert (DropPath().p, StochasticDepth().p) == (0.1, 0.5)


def test_the_functions_are_identities_outside_training() -> None:
    x = torch.rand(1, 2, 3)
    for rule in (drop_path, stochastic_depth):
        assert rule(x, 0.5, training=False) is x
        assert rule(x, 0.0) is x
    assert stochastic_depth(x, 0.0, training=False, faithful=True) is x

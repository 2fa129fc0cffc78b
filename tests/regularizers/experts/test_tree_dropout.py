"""Dropout in a hierarchical mixture of experts: coins, trees, and what evaluation expects."""

from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from medseg_reg.regularizers import TreeDropout, leaf_shares, tree_dropout, tree_mixture
from tests.reference import tree_dropout as reference
from tests.regularizers.contract import RegularizerContract
from tests.scripts import load_script


class TestTreeDropout(RegularizerContract):
    name = "tree_dropout"


class TestTreeDropoutPlain(RegularizerContract):
    name = "tree_dropout"
    parameters: ClassVar[dict[str, Any]] = {"evaluation": "plain"}


class TestTreeDropoutShared(RegularizerContract):
    """One coin of a node for the batch couples its samples by intention."""

    name = "tree_dropout"
    parameters: ClassVar[dict[str, Any]] = {"shared": True}
    calibrated = False  # over one batch it is a few coins; over passes it is tested below
    independent = False

    def test_a_schedule_may_assign_the_rate(self) -> None:
        layer, x = self.make(0.0), self.positive(1, 6, 3)
        layer.p = 0.5
        assert sum(layer.measured_rate(x, layer(x)) for _ in range(100)) > 20
        layer.p = 0
        assert layer(x) is x

    def test_the_rate_over_many_passes_is_p(self) -> None:
        layer, x = self.make(0.3), self.positive(2, 50, 2)
        rates = [layer.measured_rate(x, layer(x)) for _ in range(300)]
        assert sum(rates) / 300 == pytest.approx(0.3, abs=5 * (0.21 / 15000) ** 0.5)

    def test_all_samples_lose_the_same_subtrees(self) -> None:
        y = self.make(0.5)(self.positive(5, 31, 4))
        assert torch.equal(y == 0, (y == 0)[:1].expand_as(y))
        assert 0 < (y == 0).float().mean() < 1


def tree(depth: int, *spatial: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    leaves = torch.randn(3, 2**depth, 2, *spatial, generator=generator, dtype=torch.float64)
    gates = torch.rand(3, 2**depth - 1, *spatial, generator=generator, dtype=torch.float64)
    return leaves, gates


@pytest.mark.parametrize("depth", [0, 1, 2, 4])
def test_the_tree_answers_as_its_recursion_does(depth: int) -> None:
    leaves, gates = tree(depth, 3, 2)
    expected = [
        reference.answer(one, g) for one, g in zip(leaves.numpy(), gates.numpy(), strict=True)
    ]
    np.testing.assert_allclose(tree_mixture(leaves, gates).numpy(), np.stack(expected), atol=1e-12)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_shares_of_the_leaves_are_the_weights_of_the_answer(depth: int) -> None:
    leaves, gates = tree(depth, 4)
    shares = leaf_shares(gates)
    torch.testing.assert_close(shares.sum(1), torch.ones(3, 4, dtype=torch.float64))
    torch.testing.assert_close((shares[:, :, None] * leaves).sum(1), tree_mixture(leaves, gates))


def test_half_precision_leaves_are_mixed_in_float32() -> None:
    leaves, gates = tree(5, 8)
    y = tree_mixture(leaves.bfloat16(), gates.float())
    assert y.dtype == torch.bfloat16
    exact = tree_mixture(leaves.bfloat16().double(), gates)
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-6)  # one rounding, at the end


@pytest.mark.parametrize(("leaves", "gates"), [(3, 2), (4, 4), (0, 0), (6, 5)])
def test_what_is_no_full_binary_tree_is_refused(leaves: int, gates: int) -> None:
    with pytest.raises(ValueError, match=f"got {leaves} leaves and {gates} gates"):
        tree_mixture(torch.ones(1, leaves, 1, 2), torch.ones(1, gates, 2))
    if leaves == gates + 1:
        with pytest.raises(ValueError, match="L a power of two"):
            leaf_shares(torch.ones(1, gates, 2))


def test_a_coin_below_p_sets_the_gate_to_zero() -> None:
    _, gates = tree(3, 2, 2)
    torch.manual_seed(4)
    found = tree_dropout(gates, p=0.4)
    torch.manual_seed(4)
    coins = torch.rand(3, 7).numpy()
    expected = reference.dropped(gates.numpy(), coins, 0.4)
    np.testing.assert_array_equal(found.numpy(), expected)
    assert 0 < (expected == 0).mean() < 1


def test_a_dropped_left_subtree_does_not_count_and_the_right_one_answers() -> None:
    leaves, gates = tree(2, 5)
    gates[:, 0] = 0  # the root has lost its left subtree
    right = reference.answer(leaves[0].numpy(), gates[0].numpy(), node=2)
    np.testing.assert_allclose(tree_mixture(leaves, gates)[0].numpy(), right)
    leaves[:, :2] = 1e9
    gates[:, 1] = 0.3
    np.testing.assert_allclose(tree_mixture(leaves, gates)[0].numpy(), right)


def test_at_a_rate_near_one_the_rightmost_leaf_answers_alone() -> None:
    leaves, gates = tree(4, 2)
    y = tree_mixture(leaves, tree_dropout(gates, p=1 - 1e-12))
    torch.testing.assert_close(y, leaves[:, -1])


@pytest.mark.parametrize("p", [0.2, 0.7])
def test_expected_gates_are_the_mean_over_every_tree_that_training_draws(p: float) -> None:
    leaves, gates = tree(3, 2)
    layer = TreeDropout(p).eval()
    expected = reference.mean_answer(leaves[0].numpy(), gates[0].numpy(), p)
    found = tree_mixture(leaves, gates * layer.evaluation_factor)[0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-12)
    plain = tree_mixture(leaves, gates * TreeDropout(p, "plain").eval().evaluation_factor)
    assert np.abs(plain[0].numpy() - expected).max() > 0.05


def test_training_on_average_is_what_evaluation_computes() -> None:
    leaves, gates = tree(3, 1)
    many = [part[:1].expand(40_000, *part.shape[1:]) for part in (leaves, gates)]
    torch.manual_seed(0)
    drawn = tree_mixture(many[0], tree_dropout(many[1], p=0.3))
    error = 5 * drawn.std(0) / 200
    expected = tree_mixture(leaves, gates * 0.7)[0]
    assert ((drawn.mean(0) - expected).abs() < error).all()


def test_the_factor_is_for_layers_that_do_not_draw() -> None:
    layer = TreeDropout(0.25)
    assert layer.evaluation_factor == 1.0
    assert layer.eval().evaluation_factor == 0.75
    assert TreeDropout(0.25, evaluation="plain").eval().evaluation_factor == 1.0


def test_the_rate_of_the_last_step_is_remembered() -> None:
    layer, twin = TreeDropout(0.1), TreeDropout(0.4)
    layer.p = 0.123456789
    twin.load_memory(layer.memory())
    assert twin.p == 0.123456789


def test_an_unknown_evaluation_gets_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'expected'"):
        TreeDropout(evaluation="expectation")


# The published experiment


@pytest.mark.slow
def test_dropout_keeps_a_deep_tree_from_overfitting_and_a_shallow_one_from_fitting() -> None:
    bench = load_script("benchmarks/tree_dropout.py")
    curves = {
        (depth, p): bench.train(depth, p, steps=2000, looks=4, draws=8)
        for depth in (2, 5)
        for p in (0.0, 0.1)
    }
    deep, dropped = curves[5, 0.0], curves[5, 0.1]
    assert deep.test[-1] > 1.2 * min(deep.test)  # it overfits
    assert dropped.test[-1] < 1.1 * min(dropped.test)
    assert dropped.test[-1] < deep.test[-1]
    assert dropped.train[-1] > deep.train[-1]
    assert curves[2, 0.1].test[-1] > 1.5 * curves[2, 0.0].test[-1]
    assert len(bench.table(curves).splitlines()) == 5

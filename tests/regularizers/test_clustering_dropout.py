"""The clustering-based dropout against its reference; its rates, caps and edge cases."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_reg.regularizers import ClusteringDropout, cluster_rates, clustering_dropout
from tests.reference import clustering_dropout as reference
from tests.regularizers.contract import RegularizerContract


class ClusteringContract(RegularizerContract):
    """The scale follows the input and is held constant in the gradient."""

    def test_the_gradient_is_the_transpose_of_the_forward_map(self) -> None:
        layer = self.make(0.3)
        x = self.positive(2, 4, 3, 2, dtype=torch.float64).requires_grad_()
        y, direction = layer(x), torch.randn(2, 4, 3, 2, dtype=torch.float64)
        (grad,) = torch.autograd.grad(y, x, direction)
        torch.testing.assert_close(grad, y.detach() / x.detach() * direction)


class TestClusteringDropout(ClusteringContract):
    name = "clustering_dropout"


class TestClusteringDropoutManyClusters(ClusteringContract):
    name = "clustering_dropout"
    parameters = {"clusters": 9, "max_rate": 0.6}  # noqa: RUF012


class TestClusteringDropoutOneCluster(ClusteringContract):
    name = "clustering_dropout"
    parameters = {"clusters": 1}  # noqa: RUF012


@given(
    units=st.integers(1, 40),
    clusters=st.integers(1, 6),
    p=st.floats(0.001, 0.98),
    max_rate=st.floats(0.05, 0.99),
    zeros=st.floats(0, 1),
    seed=st.integers(0, 999),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_the_rates_have_mean_p_stay_under_the_cap_and_equal_the_reference(
    units: int, clusters: int, p: float, max_rate: float, zeros: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    response = torch.rand(2, units, generator=generator)
    response *= torch.rand(2, units, generator=generator) >= zeros  # dead channels are common
    q = cluster_rates(response, p, clusters, max_rate)
    assert ((q >= 0) & (q <= max(p, max_rate))).all()
    for row, result in zip(response, q, strict=True):
        counted = result[row != 0] if row.any() else result
        assert counted.mean().item() == pytest.approx(p, rel=1e-5, abs=1e-6)
    for row, result in zip(response.numpy(), q.numpy(), strict=True):
        np.testing.assert_allclose(
            result, reference.rates(row, p, clusters, max_rate), rtol=1e-4, atol=1e-5
        )


def test_three_clusters_get_the_rates_worked_out_by_hand() -> None:
    response = torch.tensor([[1.0, 1.2, 3.0, 5.0, 5.2, 0.8]])
    # means 1, 3, 5.1 -> w = 1, 2.1/4.1, 0; mean w = (3 + 2.1/4.1) / 6
    expected = 0.2 * np.array([1, 1, 2.1 / 4.1, 0, 0, 1]) * 6 / (3 + 2.1 / 4.1)
    np.testing.assert_allclose(cluster_rates(response, 0.2)[0].numpy(), expected, atol=1e-6)


def test_members_of_one_cluster_share_a_rate_that_falls_with_the_response() -> None:
    torch.manual_seed(0)
    response = torch.cat([torch.rand(4, 10) * 0.1 + level for level in (0.1, 1.0, 2.0)], 1)
    q = cluster_rates(response, 0.3).view(4, 3, 10)
    assert (q == q[..., :1]).all()
    assert (q[:, 0] > q[:, 1]).all()
    assert (q[:, 1] > q[:, 2]).all()
    assert (q[:, 2] == 0).all()


def test_the_cap_moves_all_rates_towards_p_and_keeps_their_order() -> None:
    response = torch.tensor([[0.01] + [0.5] * 9 + [1.0] * 20])
    free, capped = (cluster_rates(response, 0.3, max_rate=cap)[0] for cap in (0.999, 0.9))
    assert free[0] > 0.9
    assert capped[0].item() == pytest.approx(0.9)
    assert capped[0] > capped[1] > capped[10] > 0
    assert capped.mean().item() == pytest.approx(0.3)
    flat = cluster_rates(response, 0.95, max_rate=0.9)
    torch.testing.assert_close(flat, torch.full_like(flat, 0.95))


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-30, 1e30, math.nan, math.inf])
def test_equal_or_missing_responses_give_uniform_rates(value: float) -> None:
    q = cluster_rates(torch.full((2, 6), value), 0.3)
    torch.testing.assert_close(q, torch.full((2, 6), 0.3))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_bad_channel_makes_the_rates_of_its_own_sample_uniform(value: float) -> None:
    response = torch.rand(2, 6)
    expected = cluster_rates(response, 0.3)[1]
    response[0, 2] = value
    q = cluster_rates(response, 0.3)
    torch.testing.assert_close(q[0], torch.full((6,), 0.3))
    assert torch.equal(q[1], expected)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_the_rates_do_not_depend_on_the_unit_of_the_map(scale: float) -> None:
    response = torch.rand(5, 16)
    torch.testing.assert_close(cluster_rates(response * scale, 0.3), cluster_rates(response, 0.3))


def test_fewer_channels_than_clusters_work() -> None:
    assert cluster_rates(torch.tensor([[2.0]]), 0.3, 5).tolist() == [[pytest.approx(0.3)]]
    assert cluster_rates(torch.tensor([[2.0, 1.0]]), 0.3, 5)[0].tolist() == pytest.approx([0, 0.6])


def test_weak_channels_are_dropped_as_often_as_the_reference_says() -> None:
    torch.manual_seed(0)
    level = torch.tensor([0.1, 0.2, 0.1, 1.0, 1.1, 3.0, 3.2, 3.1])
    sample = torch.randn(8, 6, 5) * level.view(8, 1, 1)
    zero = (clustering_dropout(sample.expand(20000, 8, 6, 5), 0.3) == 0).all((2, 3))
    expected = reference.rates(sample.abs().mean((1, 2)).numpy(), 0.3, 3, 0.9)
    np.testing.assert_allclose(zero.float().mean(0).numpy(), expected, atol=0.015)
    assert expected[:3].min() > 0.4
    assert expected[5:].max() == 0
    # independently of each other
    both = (zero[:, 0] & zero[:, 1]).float().mean().item()
    assert both == pytest.approx(expected[0] * expected[1], abs=0.015)


def test_whole_channels_are_dropped_and_the_expectation_is_kept_channel_by_channel() -> None:
    torch.manual_seed(0)
    sample = torch.rand(7, 3, 4) + torch.arange(7).view(7, 1, 1)
    y = clustering_dropout(sample.expand(20000, 7, 3, 4), 0.3)
    assert torch.equal((y == 0).all((2, 3)), (y == 0).any((2, 3)))
    torch.testing.assert_close(y.mean(0), sample, rtol=0.05, atol=0)


def test_a_fully_connected_layer_drops_single_features() -> None:
    torch.manual_seed(0)
    features = torch.tensor([0.1, 0.1, 0.1, 2.0, 2.0, 2.0]).expand(5000, 6)
    zero = (clustering_dropout(features[..., None], 0.25, 2)[..., 0] == 0).float().mean(0)
    assert zero[:3].numpy() == pytest.approx(0.5, abs=0.03)
    assert zero[3:].sum() == 0


def test_a_layout_does_not_change_the_result() -> None:
    x = torch.randn(2, 6, 9, 8)
    torch.manual_seed(4)
    expected = clustering_dropout(x, 0.3)
    torch.manual_seed(4)
    y = clustering_dropout(x.to(memory_format=torch.channels_last), 0.3)
    torch.testing.assert_close(y, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_layer_follows_a_schedule() -> None:
    torch._dynamo.reset()
    layer, x = ClusteringDropout(0.1), torch.rand(2, 9, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for p in (0.1, 0.3, 0.45, 0.95):
        layer.p = p
        torch.manual_seed(3)
        expected = layer(x)
        torch.manual_seed(3)
        torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"clusters": 0}, "clusters must be a whole number, 1 or more"),
        ({"clusters": 3.0}, "clusters must be a whole number"),
        ({"max_rate": 0.0}, r"max_rate must be a number in \(0, 1\), got 0.0"),
        ({"max_rate": 1}, "max_rate must be a number"),
        ({"max_rate": math.nan}, "max_rate must be a number"),
        ({"max_rate": True}, "max_rate must be a number"),
    ],
)
def test_bad_parameters_are_refused(parameters: dict[str, Any], message: str) -> None:
    rules = (
        lambda **options: ClusteringDropout(0.1, **options),
        lambda **options: clustering_dropout(torch.ones(1, 2, 3), 0.1, **options),
        lambda **options: cluster_rates(torch.ones(1, 2), 0.1, **options),
    )
    for rule in rules:
        with pytest.raises(ValueError, match=message):
            rule(**parameters)


def test_the_rates_refuse_other_shapes_and_the_function_is_identity_outside_training() -> None:
    with pytest.raises(ValueError, match=r"expected \(B, C\), got shape \(1, 2, 3\)"):
        cluster_rates(torch.ones(1, 2, 3))
    x = torch.ones(1, 4, 1)
    assert clustering_dropout(x, 0.5, training=False) is x
    assert clustering_dropout(x, 0.0) is x


def test_dead_channels_take_no_part_however_many_they_are() -> None:
    living = torch.tensor([[1.0, 1.1, 1.5, 2.0, 2.1]])
    q = cluster_rates(torch.cat([torch.zeros(1, 40), living], 1), 0.3)[0]
    assert (q[:40] == 0).all()
    torch.testing.assert_close(q[40:], cluster_rates(living, 0.3)[0])
    assert q[40] == q[41] > q[42] > q[43] == q[44] == 0


def test_weak_responses_that_are_alike_take_one_cluster() -> None:
    response = torch.cat([torch.full((1, 40), 0.01), torch.tensor([[1.0, 1.1, 2.0, 2.1]])], 1)
    q = cluster_rates(response, 0.3)[0]
    assert q[0] > q[40] == q[41] > q[42] == q[43] == 0

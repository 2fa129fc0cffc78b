"""Which tokens go to which experts: against a routing that takes one token after the other."""

import numpy as np
import pytest
import torch

from medseg_reg.regularizers.experts.routing import assign, balance_loss, expert_capacity
from tests.reference import routing as reference


def gates(tokens: int = 23, experts: int = 5, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.softmax(2 * torch.randn(tokens, experts, dtype=torch.float64), dim=1)


@pytest.mark.parametrize("top", [1, 2])
@pytest.mark.parametrize("capacity", [None, 1, 4, 6, 100])
def test_weights_and_room_are_those_of_the_reference(top: int, capacity: int | None) -> None:
    g = gates()
    sent = assign(g, top, capacity)
    found = torch.zeros(g.shape)
    found[sent.tokens, sent.experts] = sent.weights
    np.testing.assert_allclose(found, reference.routed(g.numpy(), top, capacity), atol=1e-6)
    assert (sent.experts.diff() >= 0).all()
    assert len(set(zip(sent.tokens.tolist(), sent.experts.tolist(), strict=True))) == len(
        sent.tokens
    )


def test_no_expert_gets_more_than_it_has_room_for_and_strong_gates_go_first() -> None:
    g = gates(200)
    sent = assign(g, 1, 7)
    assert torch.bincount(sent.experts, minlength=5).max() == 7
    for expert in range(5):
        came = g[sent.tokens[sent.experts == expert], expert]
        left = set((g.argmax(1) == expert).nonzero().flatten().tolist()) - set(sent.tokens.tolist())
        assert not left or came.min() >= max(g[token, expert] for token in left)


def test_a_first_choice_goes_before_a_stronger_second_one() -> None:
    g = torch.tensor([[0.45, 0.55, 0.0], [0.4, 0.3, 0.3]])
    sent = assign(g, top=2, capacity=1)
    assert sent.tokens[sent.experts == 0].tolist() == [1]


def test_a_gate_of_zero_is_no_assignment() -> None:
    g = torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.0, 0.0]])
    sent = assign(g, top=2)
    assert (sent.tokens.tolist(), sent.experts.tolist()) == ([0], [0])
    assert sent.weights.tolist() == [1.0]
    assert assign(g[1:], top=1).tokens.numel() == 0


def test_the_gradient_of_a_weight_is_that_of_its_gate() -> None:
    g = gates(4, 3).float().requires_grad_()
    sent = assign(g, 1)
    sent.weights.sum().backward()
    assert torch.equal(g.grad, (g == g.max(1, keepdim=True).values).float())


@pytest.mark.parametrize(
    ("tokens", "top", "factor", "room"), [(100, 1, 1.0, 20), (101, 1, 1.0, 21), (7, 2, 0.1, 1)]
)
def test_room_is_a_multiple_of_the_equal_share(
    tokens: int, top: int, factor: float, room: int
) -> None:
    assert expert_capacity(tokens, 5, top, factor) == room


def test_the_balance_loss_is_that_of_the_reference_and_least_in_balance() -> None:
    g = gates()
    assert balance_loss(g).item() == pytest.approx(reference.balance(g.numpy()), abs=1e-6)
    assert balance_loss(torch.eye(5)).item() == pytest.approx(1.0)
    assert balance_loss(torch.eye(5)[:1].expand(9, 5)).item() == pytest.approx(5.0)


def test_descending_the_balance_loss_brings_experts_into_balance() -> None:
    torch.manual_seed(0)
    x, router = torch.randn(500, 6), torch.nn.Linear(6, 4)
    with torch.no_grad():
        router.bias[0] = 3.0
    optimizer = torch.optim.SGD(router.parameters(), lr=0.5)

    def largest() -> float:
        return torch.bincount(router(x).argmax(1), minlength=4).max().item() / 500

    assert largest() > 0.8
    for _ in range(200):
        optimizer.zero_grad()
        balance_loss(torch.softmax(router(x), 1)).backward()
        optimizer.step()
    assert largest() < 0.4

"""Sparsely gated experts in the place of the feed-forward blocks of transformers."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from medseg_reg.errors import MedsegError
from medseg_reg.insertion import find_places, insert
from medseg_reg.networks import SparseExperts
from medseg_reg.networks.build import Network, build_network
from medseg_reg.networks.summary import summarize
from tests.reference import routing as reference

UNETR = {
    "name": "monai.UNETR",
    "img_size": 32,
    "hidden_size": 24,
    "mlp_dim": 48,
    "num_heads": 2,
    "feature_size": 4,
}
SWIN = {"name": "monai.SwinUNETR", "feature_size": 12, "num_heads": [1, 1, 2, 2]}
DPT = {"name": "smp.DPT", "encoder_name": "tu-vit_tiny_patch16_224", "decoder_readout": "ignore"}
TIMM_SWIN = {"name": "smp.Unet", "encoder_name": "tu-swin_tiny_patch4_window7_224"}
SLOW = [pytest.param(one, marks=pytest.mark.slow) for one in (DPT, TIMM_SWIN)]


def block(experts: int = 3, **more: Any) -> SparseExperts:
    torch.manual_seed(0)
    feed_forward = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))
    return SparseExperts(feed_forward, 6, experts, **{"jitter": 0.0, **more})


def build(arguments: dict[str, Any], **experts: Any) -> Network:
    torch.manual_seed(0)
    return build_network(in_channels=1, classes=2, head="softmax", experts=experts, **arguments)


def blocks(network: nn.Module) -> list[SparseExperts]:
    return [m for m in network.modules() if isinstance(m, SparseExperts)]


def image(network: Network, batch: int = 2) -> torch.Tensor:
    size = getattr(network, "size", (32, 32))
    size = (64, 64) if getattr(network, "name", "") == "monai.SwinUNETR" else size
    return torch.rand(batch, 1, *size, generator=torch.Generator().manual_seed(1))


# The block


@pytest.mark.parametrize("top", [1, 2])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(2, 9, 6), (2, 3, 4, 6)])
def test_the_answer_is_the_weighted_sum_over_the_chosen_experts(
    top: int, training: bool, shape: tuple[int, ...]
) -> None:
    part = block(top=top, capacity=0.7).train(training)
    x = torch.randn(*shape)
    tokens = x.reshape(-1, 6)
    gates = torch.softmax(part.router(tokens), 1).detach().numpy().astype(float)
    room = int(np.ceil(0.7 * top * len(tokens) / 3)) if training else None
    weights = reference.routed(gates, top, room)
    expected = sum(
        weights[:, e, None] * f(tokens).detach().numpy() for e, f in enumerate(part.experts)
    )
    np.testing.assert_allclose(part(x).detach().numpy().reshape(-1, 6), expected, atol=1e-5)
    if training and top == 1:
        assert (weights == 0).all(1).any()  # some token found no room


def test_an_expert_is_asked_about_its_own_tokens_alone() -> None:
    part, asked = block(capacity=1.0), []
    for expert in part.experts:
        expert.register_forward_hook(lambda module, inputs, output: asked.append(len(inputs[0])))
    part(torch.randn(2, 30, 6))
    assert max(asked) <= 20
    assert sum(asked) <= 60


def test_experts_keep_the_distribution_of_the_block_and_differ() -> None:
    feed_forward = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))
    part = SparseExperts(feed_forward, 6, 3)
    for name, weight in feed_forward.named_parameters():
        own = [dict(expert.named_parameters())[name] for expert in part.experts]
        assert all(torch.equal(one.flatten().sort()[0], weight.flatten().sort()[0]) for one in own)
        assert not torch.equal(own[0], own[1])


def test_in_evaluation_an_image_does_not_depend_on_the_others() -> None:
    part, x = block().eval(), torch.randn(5, 20, 6)
    torch.testing.assert_close(part(x)[1:2], part(x[1:2]))


def test_the_penalty_is_there_in_training_alone_and_reaches_the_router() -> None:
    part, x = block(balance=0.5), torch.randn(2, 20, 6)
    part(x)
    gates = torch.softmax(part.router(x.reshape(-1, 6)), 1).detach().numpy()
    assert part.penalty is not None
    assert part.penalty.item() == pytest.approx(0.5 * reference.balance(gates), abs=1e-5)
    part.penalty.backward()
    assert part.router.weight.grad.abs().sum() > 0
    part.eval()(x)
    assert part.penalty is None
    with torch.no_grad():
        part.train()(x)
    assert part.penalty is None


def test_every_expert_that_was_asked_and_the_router_learn() -> None:
    part, x = block(balance=0.0), torch.randn(4, 50, 6, requires_grad=True)
    part(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    assert x.grad is not None


def test_jitter_is_drawn_in_training_alone() -> None:
    part, x = block(jitter=0.3), torch.randn(1, 20, 6)
    assert not torch.equal(part.gates(x), part.gates(x))
    part.eval()
    assert torch.equal(part.gates(x), part.gates(x))


def test_tokens_of_one_expert_alone_and_no_tokens_at_all_are_no_problem() -> None:
    part = block().eval()
    with torch.no_grad():
        part.router.weight.zero_()  # all gates alike: the first expert gets everything
    x = torch.randn(2, 7, 6)
    torch.testing.assert_close(part(x), part.experts[0](x) / 3)
    assert part(torch.zeros(2, 0, 6)).shape == (2, 0, 6)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"experts": 1}, "got 1, top 1"), ({"top": 3}, "top 3"), ({"capacity": 0}, "capacity > 0")],
)
def test_an_argument_out_of_range_is_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        block(**arguments)


def test_autocast_keeps_gates_in_float32() -> None:
    part, x = block(), torch.randn(2, 40, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert part.gates(x).dtype == torch.float32
        y = part(x)
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in part.parameters())


# In networks


@pytest.mark.parametrize("arguments", [UNETR, SWIN, *SLOW])
def test_every_second_feed_forward_block_becomes_a_mixture(arguments: dict[str, Any]) -> None:
    network, plain = (
        build(arguments, experts=4, top=1),
        build_network(in_channels=1, classes=2, head="softmax", **arguments),
    )
    mlps = [p for p, _ in plain.named_modules() if p.endswith(".mlp")]
    paths = [p for p, m in network.named_modules() if isinstance(m, SparseExperts)]
    assert paths == mlps[1::2]
    x = image(network)
    y = network(x)
    total = y.square().mean() + sum(part.penalty for part in blocks(network))
    total.backward()
    assert all(part.router.weight.grad is not None for part in blocks(network))
    assert network.eval()(x).shape == y.shape
    torch.testing.assert_close(network(x)[1:], network(x[1:]), atol=1e-4, rtol=1e-4)
    twin = build(arguments, experts=4, top=1)
    twin.load_state_dict(network.state_dict())
    assert torch.equal(twin.eval()(x), network(x))


def test_every_block_can_be_a_mixture_or_every_third() -> None:
    assert len(blocks(build(UNETR, every=1))) == 12
    assert len(blocks(build(UNETR, every=3))) == 4


def test_places_stay_and_there_is_one_for_the_routing() -> None:
    network, x = build(UNETR), torch.rand(1, 1, 32, 32)
    plain = build_network(in_channels=1, classes=2, head="softmax", **UNETR)
    names = [[one.name for one in find_places(each, x)] for each in (network, plain)]
    more = [name for name in names[0] if name.endswith(".routing")]
    assert [name for name in names[0] if name not in more] == names[1]
    report = insert(network, "spatial_dropout", "routing", example=x, p=0.3)
    assert [one.map_size for one in report] == [(4, 4)] * 6


@pytest.mark.parametrize(
    "arguments", [{"name": "unet", "channels": (4, 8)}, {"name": "smp.Segformer"}]
)
def test_a_network_without_such_blocks_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(MedsegError, match="has 0 feed-forward blocks .* such as monai.UNETR"):
        build(arguments)


def test_multiply_adds_are_those_of_the_experts_that_are_asked() -> None:
    shape = (1, 1, 32, 32)
    plain = summarize(build_network(in_channels=1, classes=2, head="softmax", **UNETR), shape)
    mixed = summarize(build(UNETR, experts=4), shape)
    routers = 6 * 4 * 24 * 4
    assert mixed.rows[0].multiply_adds == plain.rows[0].multiply_adds + routers
    assert mixed.rows[0].parameters > plain.rows[0].parameters


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_an_exported_network_gives_the_same_logits() -> None:
    network = build(UNETR, experts=3, top=2).eval()
    x = image(network)
    program = torch.export.export(network, (x,)).module()
    torch.testing.assert_close(program(x), network(x), atol=1e-5, rtol=1e-4)
    other = torch.rand(2, 1, 32, 32)  # other tokens for each expert
    torch.testing.assert_close(program(other), network(other), atol=1e-5, rtol=1e-4)


def test_a_copy_is_independent() -> None:
    network = build(UNETR).eval()
    x, twin = image(network), copy.deepcopy(network)
    expected = network(x)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.zero_()
    assert torch.equal(network(x), expected)

"""What parts beside, or in the place of, blocks of a transformer keep to in every network.

Chosen tokens, token labels, and sparsely gated experts with Gating Dropout.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medseg_reg.insertion import insert
from medseg_reg.networks import SparseExperts, TokenLabels, TokenSelection
from medseg_reg.networks.sparse_experts import feed_forward_blocks, use_experts
from medseg_reg.networks.token_labels import use_token_labels
from medseg_reg.networks.token_selection import use_token_selection
from tests.insertion.transformers import (
    TRANSFORMERS,
    Transformer,
    blocks,
    outputs,
    recompute,
    same,
    shapes,
)

SLOW = pytest.mark.slow


def select(mode: str) -> Callable[[nn.Module, Transformer], None]:
    def put(network: nn.Module, case: Transformer) -> None:
        shape = case.example().shape
        use_token_selection(network, shape, "x", stages=1, first=0, keep=0.6, mode=mode)

    return put


def label(network: nn.Module, case: Transformer) -> None:
    use_token_labels(network, case.example().shape, "x", 3, taps=2)


def experts(mode: str = "") -> Callable[[nn.Module, Transformer], None]:
    def put(network: nn.Module, case: Transformer) -> None:
        use_experts(network, case.example().shape, "x", experts=3, balance=0.1)
        if mode:
            insert(network, "gating_dropout", example=case.example(), p=0.5, mode=mode)

    return put


PARTS: dict[str, Callable[[nn.Module, Transformer], None]] = {
    "selection": select("block"),
    "feed_forward": select("feed_forward"),
    "labels": label,
    "experts": experts(),
    "gate_drop": experts("gate_drop"),
    "gate_expert_drop": experts("gate_expert_drop"),
}
DRAWN = [part for part in PARTS if part != "labels"]


def unfit(name: str, part: str) -> bool:
    """Whether a network has no place for a part; that it says so is tested elsewhere."""
    if name == "Segformer":
        return part != "labels"
    return name == "DPT-unfused" or (part == "selection" and "win" in name.lower())


pairs = pytest.mark.parametrize(
    ("name", "part"),
    [
        pytest.param(name, part, marks=() if name == "timm-vit-fused" else SLOW)
        for name in TRANSFORMERS
        for part in PARTS
        if not unfit(name, part)
    ],
)


def built(name: str, part: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A network with a part, the plain one, and images."""
    case = TRANSFORMERS[name]
    network = case.network()
    plain = copy.deepcopy(network)
    torch.manual_seed(2)
    PARTS[part](network, case)
    return network, plain, case.example(2)


def step(network: nn.Module, x: Tensor, seed: int = 1) -> tuple[list[Tensor], Tensor]:
    """The outputs of a training pass and its loss, with what parts ask for."""
    for module in network.modules():
        if isinstance(module, TokenLabels):
            module.labels = torch.zeros(len(x), *x.shape[2:], dtype=torch.int64)
    torch.manual_seed(seed)
    found = outputs(network.train(), x)
    asked = [m.penalty for m in network.modules() if getattr(m, "penalty", None) is not None]
    return found, sum(y.float().square().mean() for y in found) + sum(asked)


def gradients(network: nn.Module, loss: Tensor) -> list[Tensor]:
    network.zero_grad()
    loss.backward()
    return [weight.grad for weight in network.parameters() if weight.grad is not None]


def learning(network: nn.Module) -> list[Tensor]:
    """A weight of each part that a training must reach."""
    weights: list[Any] = []
    for module in network.modules():
        if isinstance(module, TokenSelection):
            weights.append(module.predictor[1].weight)
        elif isinstance(module, TokenLabels):
            weights.append(module.head[1].weight)
        elif isinstance(module, SparseExperts):
            weights.append(module.router.weight)
    return weights


@pairs
def test_it_trains_in_a_network_as_every_layer_does(name: str, part: str) -> None:
    network, plain, x = built(name, part)
    ours, loss = step(network, x)
    assert same(ours, step(network, x)[0])
    if part in DRAWN:
        others = [step(network, x, seed)[0] for seed in range(2, 8)]
        assert not all(same(ours, one) for one in others)
    assert all(grad.isfinite().all() for grad in gradients(network, loss))
    assert learning(network)
    assert all(weight.grad.abs().max() > 0 for weight in learning(network))
    inside = [*blocks(plain, x[:1]), *feed_forward_blocks(plain, x[:1].shape)]
    known, found = shapes(plain, x, inside), shapes(network, x, inside)
    assert {path: found[path] for path in known} == known
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, loss = step(network, x)
    assert all(y.isfinite().all() for y in found)
    assert all(grad.isfinite().all() for grad in gradients(network, loss))
    # A copy of a network after a step, as for an average of its weights, is one between steps.
    twin = copy.deepcopy(network)
    assert all(one.penalty is None for one in twin.modules() if hasattr(one, "penalty"))
    assert same(step(twin, x)[0], step(network, x)[0])
    found = outputs(network.eval(), x)
    assert same(found, outputs(network, x))
    for one, both in zip(outputs(network, x[1:]), found, strict=True):
        torch.testing.assert_close(one, both[1:], atol=1e-4, rtol=1e-3)


@pairs
def test_activations_that_are_computed_again_change_no_gradient(name: str, part: str) -> None:
    network, plain, x = built(name, part)
    first = [grad.clone() for grad in gradients(network, step(network, x)[1])]
    recompute(network, blocks(plain, x[:1]))
    again = gradients(network, step(network, x)[1])
    assert same(first, again)
    copy.deepcopy(network)  # the way back has left another penalty behind


@pytest.mark.parametrize(
    ("name", "part"),
    [
        *(("timm-vit-fused", part) for part in ("selection", "labels")),
        pytest.param("timm-vit-fused", "gate_drop", marks=SLOW),
        *(pytest.param(name, "selection", marks=SLOW) for name in ("UNETR", "ViT", "DPT")),
        pytest.param("timm-swin", "feed_forward", marks=SLOW),
        pytest.param("Segformer", "labels", marks=SLOW),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_training_pass_gives_the_same(name: str, part: str) -> None:
    network, _, x = built(name, part)
    expected, wanted = step(network, x)
    torch.compiler.reset()
    # Which tokens go to which expert is known when they come: the graph breaks there.
    whole = part != "gate_drop"
    compiled = torch.compile(network, backend="eager", fullgraph=whole)
    torch.manual_seed(1)
    found = outputs(compiled, x)
    asked = [m.penalty for m in network.modules() if getattr(m, "penalty", None) is not None]
    loss = sum(y.square().mean() for y in found) + sum(asked)
    for a, b in zip([*found, loss], [*expected, wanted], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert all(grad.isfinite().all() for grad in gradients(network, loss))
    assert all(weight.grad.abs().max() > 0 for weight in learning(network))

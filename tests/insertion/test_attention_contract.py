"""What every dropout of tokens keeps to in every transformer, whatever it does there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medseg_reg.insertion import insert
from medseg_reg.regularizers import build
from tests.insertion.test_patch_dropout_windows import CASES as WINDOWS
from tests.insertion.transformers import (
    METHODS,
    SEQUENCES,
    TIMM_VIT,
    TRANSFORMERS,
    UNETR,
    Transformer,
    blocks,
    drawn,
    filled,
    outputs,
    recompute,
    same,
    shapes,
    unfit,
    unfused,
)
from tests.insertion.zoo import monai

SLOW = pytest.mark.slow
QUICK = ("UNETR", "SwinUNETR", "timm-vit-fused")
pairs = pytest.mark.parametrize(
    ("case", "name"),
    [
        *(
            pytest.param(case, name, id=f"{key}-{name}", marks=() if key in QUICK else SLOW)
            for key, case in TRANSFORMERS.items()
            for name in (*METHODS, *SEQUENCES)
            if not unfit(case, name)
        ),
        *(
            pytest.param(
                case,
                "patch_dropout",
                id=f"{key}-windows-patch_dropout",
                marks=() if key in QUICK else SLOW,
            )
            for key, case in WINDOWS.items()
        ),
    ],
)


def extreme(case: Transformer, name: str) -> tuple[nn.Module, nn.Module]:
    """A network with layers that drop nearly all, and the plain one."""
    more = {"p_max": 0.995} if name.startswith("guided") else {}
    return filled(case, name, p=0.99, **more)


@pairs
def test_where_nearly_all_is_dropped_shapes_stay_and_values_are_finite(
    case: Transformer, name: str
) -> None:
    network, plain = extreme(case, name)
    x = case.example(2)
    inside = blocks(plain, case.example()) if name in SEQUENCES else []
    found = shapes(network.train(), x, inside)
    assert found == shapes(plain.train(), x, inside)
    taps = [path for path in inside if path in found]
    assert len(taps) == len(inside)
    for y in (result := outputs(network, x)):
        assert y.isfinite().all()
    sum(y.square().mean() for y in result).backward()
    grads = [p.grad for p in network.parameters() if p.grad is not None]
    assert grads
    assert all(grad.isfinite().all() for grad in grads)
    twin = copy.deepcopy(network)  # with whatever a step left in its layers
    assert same(drawn(twin, x, 3), drawn(network, x, 3))


@pairs
def test_activations_that_are_computed_again_change_no_gradient(
    case: Transformer, name: str
) -> None:
    network, _ = filled(case, name)
    paths, grads = blocks(network, case.example()), []
    for again in (False, True):
        if again:
            recompute(network, paths)
        network.zero_grad()
        torch.manual_seed(1)
        sum(y.square().mean() for y in outputs(network.train(), case.example(2))).backward()
        grads.append([w.grad.clone() for w in network.parameters() if w.grad is not None])
    assert paths
    assert same(*grads)


@pytest.mark.parametrize(
    "key",
    [name if "timm-vit" in name else pytest.param(name, marks=SLOW) for name in TRANSFORMERS],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_all_methods_at_once_compile_without_a_break_and_export_as_before(key: str) -> None:
    case = TRANSFORMERS[key]
    network = case.network()
    plain, x = copy.deepcopy(network), case.example(2)
    for name in (*METHODS, "patch_dropout"):
        if not unfit(case, name):
            insert(network, name, METHODS.get(name), example=case.example(), p=0.3)
    torch.compiler.reset()
    # MONAI's SwinUNETR checks its input in a way that nothing compiles.
    part = getattr(network.train(), "swinViT", network)
    expected = drawn(part, x, 0)
    found = drawn(torch.compile(part, backend="eager", fullgraph=True), x, 0)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    sum(y.square().mean() for y in found).backward()
    calls = []
    for one in (network, plain):
        graph = torch.export.export(one.eval(), (x,)).graph
        calls.append([str(node) for node in graph.nodes if node.op == "call_function"])
    assert calls[0] == calls[1]


# Rates


def encoder(key: str) -> tuple[nn.Module, Tensor]:
    """A transformer with a peaked attention, as trained ones have it, and enough tokens."""
    torch.manual_seed(0)
    if key == "UNETR":
        pytest.importorskip("einops")
        network, x = monai("UNETR", 1, 2, (96, 96), **UNETR)().vit, torch.rand(32, 1, 96, 96)
    elif key == "timm-vit":
        network, x = unfused(TIMM_VIT)(), torch.rand(120, 1, 64, 64)
    elif key == "SwinUNETR":
        network, x = TRANSFORMERS[key].network().swinViT, torch.rand(2, 1, 64, 96)
    elif key == "Segformer":  # with 16 keys; in smaller images there are few to hide
        network, x = TRANSFORMERS[key].network(), torch.rand(40, 1, 128, 128)
    else:
        network, x = TRANSFORMERS[key].network(), TRANSFORMERS[key].example(12)
    for path, module in network.named_modules():
        if path.rpartition(".")[2] in ("qkv", "q", "kv"):
            nn.init.normal_(module.weight, std=0.25)
    return network, x


@pytest.mark.parametrize("beta", [-1.0, 0.0, 2.0])
@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("timm-vit", "guided_key_dropout"),
        ("timm-vit", "guided_residual_dropout"),
        ("SwinUNETR", "guided_key_dropout"),
        pytest.param("UNETR", "guided_key_dropout", marks=SLOW),
        pytest.param("UNETR", "guided_residual_dropout", marks=SLOW),
        pytest.param("timm-swin", "guided_key_dropout", marks=SLOW),
        pytest.param("DPT-unfused", "guided_key_dropout", marks=SLOW),
        pytest.param("DPT-unfused", "guided_residual_dropout", marks=SLOW),
        pytest.param("Segformer", "guided_key_dropout", marks=SLOW),
    ],
)
def test_guided_rates_are_p_at_any_beta(key: str, name: str, beta: float) -> None:
    network, x = encoder(key)
    report = insert(network, name, METHODS[name], example=x, p=0.2, beta=beta)
    rates = [one.measured_rate for one in report if one.map_size[-1] > 8]
    assert rates
    assert sum(rates) / len(rates) == pytest.approx(0.2, abs=0.01)
    lost = [one.attention_dropped for one in report]
    mean = sum(lost) / len(lost)
    assert mean == pytest.approx(0.2, abs=0.015) if beta == 0 else (mean > 0.2) == (beta > 0)
    assert "measured rate  attention dropped  module" in str(report)
    assert all("attention_dropped" in one for one in report.as_dicts())


# Equal ways to compute the same


@pytest.mark.parametrize("key", ["timm-vit-fused", "timm-vit"])
def test_kept_patches_are_computed_as_if_dropped_ones_were_masked(key: str) -> None:
    case = TRANSFORMERS[key]
    network, plain = filled(case, "patch_dropout")
    x = case.example(3)
    found = network.train().forward_features(x)
    layer = network.blocks[0].regularizer
    mask = torch.full((3, 1, 1, found.shape[1]), -torch.inf)
    mask = mask.scatter(3, layer.kept[:, None, None], 0.0)
    masked = plain.train().forward_features(x, attn_mask=mask)
    kept = layer.gathered(masked)
    assert 1 < kept.shape[1] < found.shape[1]
    torch.testing.assert_close(layer.gathered(found), kept, atol=1e-5, rtol=1e-5)


def through_weights(layer: nn.Module, samples: int) -> Any:
    """A hook that drops heads of attention weights, one choice for all windows of a sample."""

    def hook(module: nn.Module, args: Any, weights: Tensor) -> Tensor:
        windows = weights.unflatten(0, (samples, -1)).transpose(1, 2)  # (B, heads, windows, n, n)
        found = layer(windows.flatten(2, 3)).view(windows.shape)
        return found.transpose(1, 2).reshape(weights.shape)

    return hook


@pytest.mark.parametrize(
    ("key", "behind"),
    [("UNETR", "drop_weights"), ("timm-vit", "attn_drop"), ("SwinUNETR", "attn_drop"),
     ("timm-swin", "attn_drop"), pytest.param("Segformer", "attn_drop", marks=SLOW)],
)  # fmt: skip
def test_dropping_heads_is_dropping_their_weights(key: str, behind: str) -> None:
    case = TRANSFORMERS[key]
    network, other = filled(case, "drop_head")
    x, layer = case.example(2), build("drop_head", p=0.5).train()
    hosts = [m for path, m in other.named_modules() if path.endswith(f".{behind}")]
    assert len(hosts) == len(case.heads)
    for host in hosts:
        host.register_forward_hook(through_weights(layer, len(x)))
    ours, theirs = drawn(network.train(), x, 5), drawn(other.train(), x, 5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert not same(ours, drawn(network.eval(), x, 5))


@pytest.mark.parametrize("beta", [-1.0, 1.0])
@pytest.mark.parametrize("key", ["ViT", "timm-vit"])
def test_a_block_that_tokens_skip_gives_the_same_on_average(key: str, beta: float) -> None:
    network, plain = filled(TRANSFORMERS[key], "guided_residual_dropout", p=0.3, beta=beta)
    torch.manual_seed(1)
    tokens = torch.randn(1, 12, 24)
    with torch.no_grad():
        drops = network.blocks[1].train()(tokens.expand(4000, -1, -1))
        wanted = plain.blocks[1].eval()(tokens)
    added, error = wanted - tokens, drops.mean(0) - wanted[0]
    # Of one token the standard error is at most (1 / 4000)^(1/2) of what is added.
    assert error.norm() < 3 * added.norm() / 4000**0.5
    skipped = (drops == tokens).all(-1).float()
    assert not skipped[:, 0].any()  # the class token
    assert skipped[:, 1:].mean().item() == pytest.approx(0.3, abs=0.02)

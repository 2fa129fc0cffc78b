"""Layers go into the attentions and residual branches of unchanged transformers."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import torch
from torch import nn

from medseg_reg.insertion import find_places, insert, inserted, remove
from tests.insertion.transformers import METHODS, TRANSFORMERS, Transformer, filled, outputs, suits

QUICK = ("UNETR", "SwinUNETR", "timm-vit-fused", "timm-swin")
ALL = [
    pytest.param(case, id=name, marks=[] if name in QUICK else pytest.mark.slow)
    for name, case in TRANSFORMERS.items()
]
every_transformer = pytest.mark.parametrize("case", ALL)
every_method = pytest.mark.parametrize("name", METHODS)


def drawn(network: nn.Module, x: torch.Tensor, seed: int) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    with torch.no_grad():
        return outputs(network, x)


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@every_transformer
def test_every_attention_is_found_with_its_heads(case: Transformer) -> None:
    places = find_places(case.network(), case.example())
    for kind in ("attention", "attention_head"):
        found = [place for place in places if place.kind == kind]
        assert [place.map_size[0] for place in found] == case.heads
        assert all(place.tokens and place.name.startswith("encoder.") for place in found)
        assert not any(place.problem for place in found)
    branches = sum(p.calls for p in places if p.kind == "residual" and p.tokens)
    assert branches == 2 * len(case.heads)
    assert len({place.name for place in places}) == len(places)


@every_transformer
@every_method
def test_a_filled_transformer_evaluates_as_before_and_trains_at_random(
    case: Transformer, name: str
) -> None:
    network, plain = filled(case, name)
    x = case.example(2)
    assert list(network.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(network.state_dict(), strict=True)
    network.load_state_dict(plain.state_dict(), strict=True)
    assert same(drawn(network.eval(), x, 0), drawn(plain.eval(), x, 0))
    network.train()
    assert same(drawn(network, x, 1), drawn(network, x, 1))
    assert not same(drawn(network, x, 1), drawn(network, x, 2))
    for one in (network, plain.train()):
        sum(y.square().mean() for y in outputs(one, x)).backward()
    grads = {key: weight.grad for key, weight in network.named_parameters()}
    for key, weight in plain.named_parameters():
        assert (grads[key] is None) == (weight.grad is None), key
        assert grads[key] is None or grads[key].isfinite().all(), key
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(y.isfinite().all() for y in outputs(network, x))


@every_transformer
@every_method
def test_the_measured_rate_is_p(case: Transformer, name: str) -> None:
    suits(case, name)
    network = case.network()
    report = insert(network, name, METHODS[name], example=case.example(16), p=0.2)
    # A single head is never dropped. The units of a map may be few.
    rates = [one.measured_rate for one in report if one.map_size[0] > 1]
    errors = {"drop_key": 0.01, "drop_head": 0.03, "drop_path": 0.05}
    assert sum(rates) / len(rates) == pytest.approx(0.2, abs=errors.get(name, 0.02))
    assert all(abs(rate - 0.2) < 0.15 for rate in rates)


@every_transformer
@every_method
def test_copies_draw_alike_and_nothing_is_left_behind(case: Transformer, name: str) -> None:
    plain = repr(case.network())
    network, _ = filled(case, name)
    x, expected = case.example(2), None
    for one in (network, copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        got = drawn(one.train(), x, 3)
        expected = expected or got
        assert same(got, expected)
        assert len(inserted(one)) == len(remove(one)) > 0
        assert repr(one) == plain
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in one.modules())


@every_method
def test_layers_alone_in_training_mode_draw_as_mc_dropout_wants(name: str) -> None:
    case = TRANSFORMERS["UNETR"]
    network, _ = filled(case, name)
    network.eval()
    for one in inserted(network):
        network.get_submodule(one.path).train()
    x = case.example(2)
    assert not same(drawn(network, x, 0), drawn(network, x, 1))


def test_places_can_be_named_by_level_and_part() -> None:
    case = TRANSFORMERS["SwinUNETR"]
    network = case.network()
    names = [place.name for place in find_places(network, case.example())]
    levels = Counter(name.split(".attention_head")[0] for name in names if "_head" in name)
    assert levels == {"encoder.1": 2, "encoder.2": 2, "encoder.3": 1, "encoder.4": 1}
    report = insert(network, "drop_key", "encoder.[12].attention", example=case.example())
    assert len(report) == 4


def test_windows_of_a_sample_drop_the_same_heads() -> None:
    case = TRANSFORMERS["SwinUNETR"]
    network, _ = filled(case, "drop_head")
    network.train()
    seen = []
    for one in inserted(network):
        host = network.get_submodule(one.path.rpartition(".")[0])
        host.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    batch = 4
    network(case.example(batch))
    checked = 0
    for x, heads in zip(seen, case.heads, strict=True):
        alive = x.unflatten(-1, (heads, -1)).ne(0).any(-1).any(1)  # of each window
        by_sample = alive.unflatten(0, (batch, -1))
        assert torch.equal(by_sample, by_sample[:, :1].expand_as(by_sample))
        checked += by_sample.shape[1] > 1
    assert checked == 5  # the last map is one window
    masks = torch.cat([x.unflatten(-1, (h, -1)).ne(0).any(-1).any(1).flatten() for x, h in
                       zip(seen, case.heads, strict=True)])  # fmt: skip
    assert 0 < masks.float().mean() < 1


def test_keys_hidden_from_a_fused_attention_are_those_hidden_from_its_weights() -> None:
    fused, _ = filled(TRANSFORMERS["timm-vit-fused"], "drop_key")
    plain, _ = filled(TRANSFORMERS["timm-vit"], "drop_key")
    x = TRANSFORMERS["timm-vit"].example(2)
    (a,), (b,) = (drawn(one.train(), x, 4) for one in (fused, plain))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(a, fused.eval()(x), atol=1e-3)


def test_class_tokens_are_never_hidden() -> None:
    for name in ("ViT", "timm-vit-fused", "timm-vit", "DPT"):
        network, _ = filled(TRANSFORMERS[name], "drop_key")
        layers = [network.get_submodule(one.path) for one in inserted(network)]
        assert [layer.prefix_tokens for layer in layers] == [1] * len(layers)
    for name in ("guided_key_dropout", "guided_residual_dropout"):
        network, _ = filled(TRANSFORMERS["timm-vit"], name)
        layers = [network.get_submodule(one.path) for one in inserted(network)]
        assert [layer.prefix_tokens for layer in layers] == [1] * 3
    network, _ = filled(TRANSFORMERS["SwinUNETR"], "drop_key")
    assert all(network.get_submodule(one.path).prefix_tokens == 0 for one in inserted(network))


def test_drop_path_zeroes_whole_branches_of_single_samples() -> None:
    case = TRANSFORMERS["UNETR"]
    network, plain = filled(case, "drop_path")
    attn = "vit.blocks.0.attn"
    seen = []
    for one in (network, plain):
        one.train().get_submodule(attn).register_forward_hook(lambda m, a, y: seen.append(y))
        one.get_submodule("vit.patch_embedding.dropout").eval()
        one(case.example(32))
    ours, theirs = seen
    kept = (ours != 0).flatten(1).any(1)
    assert 4 < kept.sum() < 28
    torch.testing.assert_close(ours[kept], 2 * theirs[kept])


def test_tokens_that_fill_windows_up_are_never_dropped_and_have_no_share() -> None:
    case = TRANSFORMERS["SwinUNETR"]
    network, seen = case.network(), []
    insert(network, "guided_key_dropout", example=case.example(), p=0.4)
    attn = network.train().get_submodule("swinViT.layers1.0.blocks.0.attn")
    attn.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    attn.attn_drop.register_forward_hook(lambda m, args, y: seen.append(y))
    network(case.example(4))
    tokens, weights = seen
    padding = (tokens == 0).all(-1)
    # 32 x 48 tokens in 5 x 7 windows of 7 x 7.
    assert padding.float().mean().item() == pytest.approx(1 - 32 * 48 / (35 * 49))
    hidden = (weights == 0).all(1).float().sum(1) / 48  # without the diagonal
    assert not hidden[padding].any()
    assert hidden[~padding].mean().item() == pytest.approx(0.4, abs=0.03)


def test_a_token_that_skips_a_block_keeps_its_features() -> None:
    case = TRANSFORMERS["UNETR"]
    network, _ = filled(case, "guided_residual_dropout", p=0.4)
    seen = []
    block = network.train().vit.blocks[0]
    block.register_forward_hook(lambda m, args, y: seen.append((args[0], y)))
    network(case.example(16))
    x, y = seen[0]
    same_token = (x == y).all(-1)
    assert same_token.float().mean().item() == pytest.approx(0.4, abs=0.15)
    assert same_token.any(1).sum() > 0
    assert not hasattr(block, "regularizer")  # no key has another name


def test_the_attention_of_a_block_decides_which_tokens_skip_it() -> None:
    case = TRANSFORMERS["UNETR"]
    network = case.network()
    block = network.vit.blocks[0]
    with torch.no_grad():
        block.attn.qkv.weight[:48] *= 30  # queries and keys: a peaked attention
    insert(network, "guided_residual_dropout", "encoder.4.block_residual.0", example=case.example(),
           p=0.2, beta=2.0)  # fmt: skip
    x, scores, skipped = case.example(1).expand(400, -1, -1, -1), [], []
    block.attn.drop_weights.register_forward_hook(lambda m, a, w: scores.append(w.mean((1, 2))[0]))
    block.register_forward_hook(lambda m, a, y: skipped.append((a[0] == y).all(-1).float().mean(0)))
    network.eval()
    block.attn.drop_weights.regularizer.train()
    with torch.no_grad():
        network(x)
    order = scores[0].argsort()
    assert skipped[0][order[-1]] > skipped[0][order[0]] + 0.2
    assert skipped[0].mean().item() == pytest.approx(0.2, abs=0.04)

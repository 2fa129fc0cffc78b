"""The blocks of a transformer run on groups of tokens, and its decoder finds a complete map."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from medseg_reg.errors import MedsegError
from medseg_reg.insertion import insert, inserted, remove
from medseg_reg.regularizers import TokenMerging
from tests.insertion.transformers import TRANSFORMERS, Transformer, drawn, outputs, same

NAMES = ("UNETR", "ViT", "timm-vit-fused", "timm-vit", "DPT")
CASES = [
    pytest.param(TRANSFORMERS[name], id=name, marks=pytest.mark.slow if name == "DPT" else [])
    for name in NAMES
]
every_case = pytest.mark.parametrize("case", CASES)


def filled(case: Transformer, **more: object) -> tuple[nn.Module, nn.Module, TokenMerging]:
    """A network with the layer, the plain one, and the layer."""
    network = case.network()
    plain = copy.deepcopy(network)
    (report,) = insert(
        network, "token_merging", "tokens", example=case.example(), **{"p": 0.5, **more}
    )
    layer = network.get_submodule(report.path)
    assert isinstance(layer, TokenMerging)
    return network, plain, layer


@every_case
def test_a_network_keeps_its_shapes_its_keys_and_its_evaluation(case: Transformer) -> None:
    network, plain, layer = filled(case)
    x = case.example(2)
    assert list(network.state_dict()) == list(plain.state_dict())
    assert same(drawn(network.eval(), x, 0), drawn(plain.eval(), x, 0))
    ours, theirs = drawn(network.train(), x, 1), drawn(plain.train(), x, 1)
    assert [y.shape for y in ours] == [y.shape for y in theirs]
    assert same(ours, drawn(network, x, 1))
    assert not same(ours, drawn(network, x, 2))
    sum(y.square().mean() for y in ours).backward()
    sum(y.square().mean() for y in theirs).backward()
    grads = {key: weight.grad for key, weight in network.named_parameters()}
    for key, weight in plain.named_parameters():
        assert (grads[key] is None) == (weight.grad is None), key
        assert grads[key] is None or grads[key].isfinite().all(), key
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(y.isfinite().all() for y in outputs(network, x))
    layer.p = 0.0
    plain.load_state_dict(network.state_dict())  # statistics of a decoder have changed
    assert same(drawn(network, x, 1), drawn(plain, x, 1))


@every_case
def test_copies_draw_alike_and_nothing_is_left_behind(case: Transformer) -> None:
    before = repr(case.network())
    network, _, _ = filled(case)
    x, expected = case.example(2), drawn(network.train(), case.example(2), 3)
    for one in (copy.deepcopy(network), pickle.loads(pickle.dumps(network)), network):
        assert same(drawn(one.train(), x, 3), expected)
        assert len(inserted(one)) == len(remove(one)) == 1
        assert repr(one) == before
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in one.modules())


@every_case
def test_in_evaluation_it_merges_where_it_is_asked_to_and_draws_nothing(case: Transformer) -> None:
    network, plain, _ = filled(case, in_evaluation=True)
    x = case.example(2)
    ours = drawn(network.eval(), x, 0)
    assert [y.shape for y in ours] == [y.shape for y in drawn(plain.eval(), x, 0)]
    assert not same(ours, drawn(plain, x, 0))
    assert same(ours, drawn(network, x, 1))
    for a, b in zip(outputs(network, x[:1]), ours, strict=True):
        torch.testing.assert_close(a, b[:1], atol=1e-4, rtol=1e-3)


def repeated(case: Transformer, x: torch.Tensor) -> torch.Tensor:
    """An image of which each second patch, from left to right, is the one before."""
    side = x.shape[-1] // 2 if case is TRANSFORMERS["UNETR"] else 16
    x = x.clone()
    for left in range(0, x.shape[-1], 2 * side):
        x[..., left + side : left + 2 * side] = x[..., left : left + side]
    return x


@pytest.mark.parametrize("name", ["UNETR", "timm-vit-fused", "timm-vit"])
def test_merging_equal_tokens_changes_nothing_if_groups_count_by_their_size(name: str) -> None:
    case = TRANSFORMERS[name]
    x = repeated(case, case.example(2))
    off = {}
    for proportional in (True, False):
        network, plain, _ = filled(case, in_evaluation=True, p=0.3, proportional=proportional)
        for module in (network, plain):
            for key, weight in module.named_parameters():
                if "pos" in key:  # positions would tell equal patches apart
                    nn.init.zeros_(weight)
        seen: list[int] = []
        block = next(m for m in network.modules() if hasattr(m, "attn"))
        block.register_forward_hook(lambda m, args, y, seen=seen: seen.append(args[0].shape[1]))
        with torch.no_grad():
            pairs = zip(outputs(network.eval(), x), outputs(plain.eval(), x), strict=True)
            off[proportional] = max(float((a - b).abs().max()) for a, b in pairs)
        assert seen[0] < {"UNETR": 6}.get(name, 17)
    assert off[True] < 1e-5
    assert off[False] > 3 * off[True]


def test_each_block_is_the_run_on_its_groups_and_gives_all_tokens_back() -> None:
    case = TRANSFORMERS["UNETR"]
    network, plain, _ = filled(case, proportional=False, shuffle=False)
    x = plain.train().vit.patch_embedding(case.example(3))
    _, states = network.train().vit(case.example(3))
    ours = TokenMerging(0.5, shuffle=False)
    for block, state in zip(plain.vit.blocks, states, strict=True):
        merged = ours.enter(x)
        assert merged.shape == (3, 3, 24)
        x = ours.leave(block(merged))
        torch.testing.assert_close(state, x)


def test_class_tokens_are_never_merged() -> None:
    for name in ("ViT", "timm-vit"):
        network, _, layer = filled(TRANSFORMERS[name], p=0.9)
        assert layer.prefix_tokens == 1
        first: list[torch.Tensor] = []
        network.blocks[0].register_forward_pre_hook(
            lambda m, args, layer=layer, first=first: first.append(layer.groups.sizes[:, 0])
        )
        network.train()(TRANSFORMERS[name].example(4))
        assert first[0].tolist() == [1.0] * 4


def test_it_saves_the_operations_that_the_formula_says() -> None:
    monai = pytest.importorskip("monai.networks.nets")
    width, patches, layers, hidden = 32, 64, 2, 64
    network = monai.ViT(1, (64, 64), (8, 8), width, hidden, layers, 4, spatial_dims=2)
    (report,) = insert(network, "token_merging", example=torch.rand(1, 1, 64, 64), p=0.25)

    def operations(tokens: int) -> float:
        return 2 * tokens**2 * width + 4 * tokens * width**2 + 2 * tokens * width * hidden

    found = []
    for mode in (False, True):
        with FlopCounterMode(display=False) as counter:
            network.train(mode)(torch.rand(1, 1, 64, 64))
        counts = counter.get_flop_counts()
        parts = [f"ViT.blocks.{i}.{part}" for i in range(layers) for part in ("attn", "mlp")]
        found.append(sum(sum(counts[part].values()) for part in parts) / 2 / layers)
    assert found == [operations(patches), operations(48)]
    assert report.measured_rate == pytest.approx(0.25)


@pytest.mark.parametrize("name", ["SwinUNETR", "timm-swin", "Segformer"])
def test_windows_and_reduced_keys_are_refused(name: str) -> None:
    case = TRANSFORMERS[name]
    network = case.network()
    with pytest.raises(MedsegError, match="left out or merged one by one. Use drop_key"):
        insert(network, "token_merging", example=case.example())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_a_fused_attention_that_takes_no_mask_is_refused_or_left_without_sizes() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.proj(y.transpose(1, 2).flatten(2))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.norm = Fused(), nn.LayerNorm(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.attn(self.norm(x))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Conv2d(1, 8, 4, 4), nn.Conv2d(8, 2, 1)
            self.blocks = nn.Sequential(Block(), Block())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.embed(x)
            y = self.blocks(x.flatten(2).transpose(1, 2))
            return self.out(y.transpose(1, 2).reshape(x.shape))

    network, x = Net(), torch.rand(1, 1, 20, 12)
    with pytest.raises(MedsegError, match="takes no argument attn_mask.* pass proportional=False"):
        insert(network, "token_merging", example=x)
    assert insert(network, "token_merging", example=x, proportional=False)
    assert network.train()(x).shape == (1, 2, 5, 3)


def test_blocks_that_need_the_whole_grid_or_positions_are_refused() -> None:
    timm = pytest.importorskip("timm")
    small = {"img_size": 64, "in_chans": 1, "depth": 2, "embed_dim": 24, "num_heads": 3}
    network, x = timm.create_model("beit_base_patch16_224", **small), torch.rand(1, 1, 64, 64)
    with pytest.raises(MedsegError, match="does not run on a part of its tokens .*Use drop_key"):
        insert(network, "token_merging", example=x, p=0.3, proportional=False)
    network = timm.create_model(
        "eva02_tiny_patch14_224", img_size=56, in_chans=1, depth=2, num_classes=3
    )
    with pytest.raises(MedsegError, match="'blocks.0' gets more tensors than its tokens .rope"):
        insert(network, "token_merging", example=torch.rand(1, 1, 56, 56))


def test_only_one_layer_may_let_blocks_run_on_fewer_tokens() -> None:
    case = TRANSFORMERS["timm-vit"]
    for first, second in (("patch_dropout", "token_merging"), ("token_merging", "patch_dropout")):
        network = case.network()
        insert(network, first, example=case.example(), p=0.5)
        with pytest.raises(MedsegError, match="'blocks.0' runs on fewer tokens already"):
            insert(network, second, example=case.example(), p=0.5)
        assert len(inserted(network)) == 1


def test_other_layers_find_the_places_of_the_network_and_work_on_groups() -> None:
    case = TRANSFORMERS["timm-vit"]
    network, _, layer = filled(case, in_evaluation=True)
    insert(network, "drop_key", example=case.example(), p=0.2)
    report = insert(network, "drop_head", example=case.example(), p=0.2)
    insert(network, "drop_path", "residual", example=case.example(), p=0.2)
    assert report[0].map_size == (3, 17, 8)
    drops = [m for m in network.modules() if type(m).__name__ == "DropKey"]
    assert [drop.prefix_tokens for drop in drops] == [1, 1, 1]
    assert layer.in_evaluation
    seen = []
    network.train().blocks[1].attn.attn_drop.register_forward_hook(
        lambda m, args, y: seen.append(y.shape)
    )
    network(case.example(2)).square().mean().backward()
    assert seen == [(2, 3, 9, 9)]


def test_masks_of_another_layer_hold_beside_the_sizes() -> None:
    case = TRANSFORMERS["timm-vit-fused"]
    for order in (("token_merging", "drop_key"), ("drop_key", "token_merging")):
        network = case.network()
        for name in order:
            insert(network, name, example=case.example(), p=0.5)
        masks: list[torch.Tensor] = []
        network.blocks[0].attn.register_forward_pre_hook(
            lambda m, args, kwargs, masks=masks: masks.append(kwargs["attn_mask"]),
            with_kwargs=True,
        )
        network.train()(case.example(2))
        (mask,) = masks
        assert mask.shape == (2, 3, 9, 9)
        hidden = mask == -torch.inf
        assert 0.3 < hidden[..., 1:].float().mean() < 0.7
        assert (mask[~hidden] >= 0).all()  # logarithms of sizes
        assert (mask[~hidden] > 0).any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["timm-vit-fused", pytest.param("UNETR", marks=pytest.mark.slow)])
def test_it_compiles_without_a_break_and_exports_as_before(name: str) -> None:
    case = TRANSFORMERS[name]
    network, plain, layer = filled(case)
    x = case.example(2)
    torch.compiler.reset()
    compiled = torch.compile(network.train(), backend="eager", fullgraph=True)
    expected = drawn(network, x, 0)
    for a, b in zip(drawn(compiled, x, 0), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    calls = []
    for one in (network, plain):
        graph = torch.export.export(one.eval(), (x,)).graph
        calls.append([str(node) for node in graph.nodes if node.op == "call_function"])
    assert calls[0] == calls[1]
    layer.in_evaluation = True
    program = torch.export.export(network, (x,)).module()
    for a, b in zip(outputs(program, x.flip(-1)), outputs(network, x.flip(-1)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_activation_checkpointing_changes_no_gradient() -> None:
    case = TRANSFORMERS["timm-vit"]
    network, _, _ = filled(case)
    network.train()
    grads = []
    for on in (False, True, True):
        network.set_grad_checkpointing(on)
        network.zero_grad()
        drawn(network, case.example(2), 1)[0].square().mean().backward()
        grads.append([w.grad.clone() for w in network.parameters() if w.grad is not None])
    assert same(grads[0], grads[1])
    assert same(grads[0], grads[2])

"""A transformer runs on a part of its patches, and its decoder finds a complete map."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from medseg_reg.errors import MedsegError
from medseg_reg.insertion import find_places, insert, inserted, remove
from medseg_reg.regularizers import PatchDropout
from tests.insertion.transformers import TRANSFORMERS, Transformer, drawn, outputs, same

NAMES = ("UNETR", "ViT", "timm-vit-fused", "timm-vit", "DPT")
CASES = [
    pytest.param(TRANSFORMERS[name], id=name, marks=pytest.mark.slow if name == "DPT" else [])
    for name in NAMES
]
every_case = pytest.mark.parametrize("case", CASES)


def filled(case: Transformer, **more: object) -> tuple[nn.Module, nn.Module, PatchDropout]:
    """A network with the layer, the plain one, and the layer."""
    network = case.network()
    plain = copy.deepcopy(network)
    (report,) = insert(network, "patch_dropout", example=case.example(), **{"p": 0.5, **more})
    layer = network.get_submodule(report.path)
    assert isinstance(layer, PatchDropout)
    return network, plain, layer


@every_case
def test_a_network_keeps_its_shapes_its_keys_and_its_evaluation(case: Transformer) -> None:
    network, plain, layer = filled(case)
    x = case.example(2)
    assert list(network.state_dict()) == list(plain.state_dict())
    network.load_state_dict(plain.state_dict(), strict=True)
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
    if type(network).__name__ in ("UNETR", "DPT", "ViT"):  # a classifier never reads it
        assert layer.mask_token.grad.abs().max() > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(y.isfinite().all() for y in outputs(network, x))
    plain.load_state_dict(network.state_dict())  # statistics of a decoder have changed
    assert same(drawn(network.eval(), x, 0), drawn(plain.eval(), x, 0))


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


def test_copies_do_not_share_what_they_draw() -> None:
    network, _, layer = filled(TRANSFORMERS["UNETR"])
    twin = copy.deepcopy(network)
    theirs = twin.vit.blocks[0].regularizer
    network.train()(TRANSFORMERS["UNETR"].example(5))
    twin.train()(TRANSFORMERS["UNETR"].example(2))
    assert (len(layer.kept), len(theirs.kept)) == (5, 2)
    for one, own in ((network, layer), (twin, theirs)):
        for block in one.vit.blocks:
            hooks = (*block._forward_pre_hooks.values(), *block._forward_hooks.values())
            assert all(hook.layer is own for hook in hooks if hasattr(hook, "layer"))


def test_each_tap_is_the_run_on_the_kept_tokens_put_in_their_places() -> None:
    case = TRANSFORMERS["UNETR"]
    network, plain, layer = filled(case)
    embedded = plain.train().vit.patch_embedding(case.example(3))
    z, states = network.train().vit(case.example(3))
    x = layer.gathered(embedded)
    assert x.shape == (3, 3, 24)
    for block, state in zip(plain.vit.blocks, states, strict=True):
        x = block(x)
        assert state.shape == (3, 6, 24)
        torch.testing.assert_close(layer.gathered(state), x)
        others = torch.ones(3, 6, dtype=torch.bool).scatter(1, layer.kept, False)
        gone = state[others]
        assert torch.equal(gone, layer.mask_token.expand_as(gone))
    assert z.shape == (3, 6, 24)


def test_class_tokens_are_always_kept() -> None:
    for name in ("ViT", "timm-vit"):
        network, _, layer = filled(TRANSFORMERS[name])
        network.train()(TRANSFORMERS[name].example(4))
        assert (layer.kept[:, 0] == 0).all()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        # Windows of 7 x 7, and on the map of 4 x 6 one that is no square.
        ("SwinUNETR", "windows or fewer keys than tokens.*Use drop_key"),
        ("timm-swin", "10x10 patches of 'layers.0.blocks.0' is no multiple of its windows of 4x4"),
        ("Segformer", "windows or fewer keys than tokens.*Use drop_key"),
    ],
)
def test_windows_that_do_not_fit_and_reduced_keys_are_refused(name: str, said: str) -> None:
    case = TRANSFORMERS[name]
    network = case.network()
    with pytest.raises(MedsegError, match=said):
        insert(network, "patch_dropout", example=case.example())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_blocks_that_get_positions_beside_their_tokens_are_refused() -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model(
        "eva02_tiny_patch14_224", img_size=56, in_chans=1, depth=2, num_classes=3
    )
    with pytest.raises(MedsegError, match="'blocks.0' gets more tensors than its tokens .rope"):
        insert(network, "patch_dropout", example=torch.rand(1, 1, 56, 56))


def test_blocks_that_need_the_whole_grid_are_refused() -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model(
        "beit_base_patch16_224", img_size=64, in_chans=1, depth=2, embed_dim=24, num_heads=3
    )
    with pytest.raises(MedsegError, match="does not run on a part of its tokens .*Use drop_key"):
        insert(network, "patch_dropout", example=torch.rand(1, 1, 64, 64))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert insert(network, "drop_path", "residual", example=torch.rand(1, 1, 64, 64))


def test_a_network_without_transformer_has_no_such_place() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    assert "tokens" not in {p.kind for p in find_places(network, torch.rand(1, 1, 8, 8))}


def test_patches_with_foreground_stay() -> None:
    case = TRANSFORMERS["UNETR"]
    network, _, layer = filled(case, p=0.6, protect_foreground=True)
    x = case.example(4)
    with pytest.raises(ValueError, match="needs the labels of the 4 samples"):
        network.train()(x)
    with torch.no_grad():
        network(x)  # as in MC dropout
    layer.labels = torch.zeros(4, 48, 32, dtype=torch.int64)
    layer.labels[:, 40, 20] = 1  # the last of 3 x 2 patches
    for _ in range(10):
        network(x)
        assert (layer.kept == 5).any(1).all()


@pytest.mark.parametrize("p", [0.25, 0.5])
def test_it_saves_the_operations_that_the_formula_says(p: float) -> None:
    monai = pytest.importorskip("monai.networks.nets")
    width, patches, layers = 32, 64, 2
    network = monai.ViT(1, (64, 64), (8, 8), width, 64, layers, 4, spatial_dims=2)
    (report,) = insert(network, "patch_dropout", example=torch.rand(1, 1, 64, 64), p=p)

    def operations(tokens: int) -> float:
        return layers * (2 * tokens**2 * width + 4 * tokens * width**2)

    found = []
    for mode in (False, True):
        with FlopCounterMode(display=False) as counter:
            network.train(mode)(torch.rand(1, 1, 64, 64))
        counts = counter.get_flop_counts()
        blocks = [counts[f"ViT.blocks.{i}.attn"] for i in range(layers)]
        found.append(sum(sum(one.values()) for one in blocks) / 2)  # of multiply and add
    assert found == [operations(patches), operations(round((1 - p) * patches))]
    assert report.measured_rate == pytest.approx(p)


def test_other_layers_work_on_the_kept_tokens() -> None:
    case = TRANSFORMERS["timm-vit"]
    network = case.network()
    insert(network, "guided_residual_dropout", example=case.example(), p=0.2)
    insert(network, "patch_dropout", example=case.example(), p=0.5)
    insert(network, "drop_key", example=case.example(), p=0.2)
    insert(network, "drop_head", example=case.example(), p=0.2)
    insert(network, "guided_key_dropout", example=case.example(), p=0.2)
    seen = []
    network.train().blocks[1].attn.attn_drop.register_forward_hook(
        lambda m, args, y: seen.append(y.shape)
    )
    y = network(case.example(2))
    y.square().mean().backward()
    assert seen == [(2, 3, 9, 9)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["timm-vit-fused", pytest.param("UNETR", marks=pytest.mark.slow)])
def test_it_compiles_without_a_break_and_exports_as_before(name: str) -> None:
    case = TRANSFORMERS[name]
    network, plain, _ = filled(case)
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


def test_activation_checkpointing_changes_no_gradient() -> None:
    case = TRANSFORMERS["timm-vit"]
    network, _, _ = filled(case)
    network.train()
    grads = []
    for on in (False, True):
        network.set_grad_checkpointing(on)
        network.zero_grad()
        drawn(network, case.example(2), 1)[0].square().mean().backward()
        grads.append([w.grad.clone() for w in network.parameters() if w.grad is not None])
    assert same(*grads)

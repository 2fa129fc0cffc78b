"""A Swin transformer runs on a part of the patches of each window, and its maps stay complete."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from medseg_reg.errors import MedsegError
from medseg_reg.insertion import insert, inserted, remove
from medseg_reg.networks.token_selection import use_token_selection
from medseg_reg.regularizers import PatchDropout
from tests.insertion.transformers import SWIN, TIMM_SWIN, Transformer, outputs
from tests.insertion.zoo import monai, timm

CASES = {
    # Maps of 32 x 32, 16 x 16, 8 x 8 and, where nothing is shifted, 4 x 4.
    "SwinUNETR": Transformer(
        monai("SwinUNETR", 1, 2, **SWIN, window_size=4), (1, 64, 64), {}, needs="einops"
    ),
    # Of 20 x 10 and 10 x 5; an odd window is not shifted by its half.
    "timm-swin": Transformer(
        timm(
            "swin_tiny_patch4_window7_224",
            img_size=(80, 40),
            features_only=True,
            drop_path_rate=0.0,
            **{**TIMM_SWIN, "window_size": 5},
        ),
        (1, 80, 40),
        {},
        needs="timm",
    ),
}
every_case = pytest.mark.parametrize("name", CASES)


def filled(name: str, **more: Any) -> tuple[nn.Module, nn.Module, dict[str, PatchDropout]]:
    """A network with its layers, the plain one, and the layers by the block that has them."""
    network = CASES[name].network()
    plain = copy.deepcopy(network)
    report = insert(network, "patch_dropout", example=CASES[name].example(), **{"p": 0.4, **more})
    layers = {one.path.rpartition(".")[0]: network.get_submodule(one.path) for one in report}
    return network, plain, layers  # type: ignore[return-value]


def drawn(network: nn.Module, x: Tensor, seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    return outputs(network, x)


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def hide(plain: nn.Module, layers: dict[str, PatchDropout]) -> None:
    """Do the same to a network the slow way: all patches are computed, dropped ones are no keys."""
    for first, layer in layers.items():
        blocks = plain.get_submodule(first.rpartition(".")[0])
        for block in blocks.children():
            side = layer.window

            def masked(x: Tensor, layer: PatchDropout = layer, side: int = side) -> Tensor:
                return torch.where(kept_map(layer, x.shape[1:3])[..., None], x, layer.mask_token)

            def before(module: Any, args: Any, masked: Any = masked) -> Any:
                module.size = args[0].shape[1:3]
                return (masked(args[0]), *args[1:])

            def softmax(
                module: Any, args: Any, block: Any = block, layer: PatchDropout = layer
            ) -> Any:
                side, logits = layer.window, args[0]
                keep = kept_map(layer, block.size)
                small = [n <= side for n in block.size]
                shift = block.shift_size
                by = [0 if s else -int(n) for n, s in zip(shift, small, strict=True)]
                keep = keep.roll(by, (0, 1))
                keys = keep.unfold(0, side, side).unfold(1, side, side).reshape(-1, side**2)
                keys = keys.repeat(len(logits) // len(keys), 1)[:, None, None]
                return (logits.masked_fill(~keys, -torch.inf),)

            block.register_forward_pre_hook(before)
            block.attn.softmax.register_forward_pre_hook(softmax)
            block.register_forward_hook(lambda m, args, y, masked=masked: masked(y))


def kept_map(layer: PatchDropout, size: Any) -> Tensor:
    """Where patches of a map are kept."""
    keep = [
        torch.tensor([i % layer.window in lines.tolist() for i in range(n)])
        for lines, n in zip((layer.rows, layer.columns), size, strict=True)
    ]
    return keep[0][:, None] & keep[1]


@every_case
def test_kept_patches_are_computed_as_if_dropped_ones_were_hidden_from_them(name: str) -> None:
    network, plain, layers = filled(name)
    x = CASES[name].example(2)
    found = drawn(network.train(), x, 1)
    hide(plain, layers)
    for a, b in zip(found, outputs(plain.train(), x), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@every_case
def test_a_network_keeps_its_keys_its_evaluation_and_its_gradients(name: str) -> None:
    network, plain, layers = filled(name)
    x = CASES[name].example(2)
    assert list(network.state_dict()) == list(plain.state_dict())
    ours, again = drawn(network.train(), x, 1), drawn(network, x, 1)
    assert same(ours, again)
    assert not same(ours, drawn(network, x, 2))
    assert same(drawn(network.eval(), x, 0), drawn(plain.eval(), x, 0))
    sum(y.square().mean() for y in drawn(network.train(), x, 3)).backward()
    for key, weight in network.named_parameters():
        assert weight.grad is None or weight.grad.isfinite().all(), key
    assert all(layer.mask_token.grad.abs().max() > 0 for layer in layers.values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(y.isfinite().all() for y in outputs(network, x))
    network.load_state_dict(plain.state_dict(), strict=True)


@pytest.mark.parametrize("name", ["SwinUNETR", "timm-swin"])
def test_copies_draw_alike_and_nothing_is_left_behind(name: str) -> None:
    before = repr(CASES[name].network())
    network, _, layers = filled(name)
    x = CASES[name].example(2)
    expected = drawn(network.train(), x, 3)
    for one in (copy.deepcopy(network), pickle.loads(pickle.dumps(network)), network):
        assert same(drawn(one.train(), x, 3), expected)
        assert len(inserted(one)) == len(remove(one)) == len(layers)
        assert repr(one) == before
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in one.modules())


def test_an_attention_that_fails_is_left_as_it_was() -> None:
    network, plain, _ = filled("SwinUNETR")
    attention = network.swinViT.layers1[0].blocks[0].attn
    index = attention.relative_position_index.clone()

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = attention.softmax.register_forward_pre_hook(fail)
    x = CASES["SwinUNETR"].example(2)
    with pytest.raises(RuntimeError, match="out of memory"):
        network.train()(x)
    handle.remove()
    assert torch.equal(attention.relative_position_index, index)
    assert same(drawn(network.eval(), x, 0), drawn(plain.eval(), x, 0))


def test_the_blocks_cost_as_much_as_their_kept_patches() -> None:
    network, plain, layers = filled("timm-swin", p=1 - 9 / 25)
    x = CASES["timm-swin"].example(2)

    def operations(network: nn.Module) -> int:
        with FlopCounterMode(display=False, depth=10) as counter:
            outputs(network.train(), x)
        counts = counter.get_flop_counts()
        return sum(
            sum(one.values()) for path, one in counts.items() if path.endswith(("attn", "mlp"))
        )

    assert {(len(one.rows), len(one.columns)) for one in layers.values()} == {(3, 3)}
    whole, part = operations(plain), operations(network)
    # Linear layers cost as much as they have patches, the attention itself less.
    assert 0.8 * whole * 9 / 25 < part < whole * 9 / 25


def test_activation_checkpointing_changes_no_gradient() -> None:
    grads = []
    network, _, _ = filled("SwinUNETR")
    for on in (False, True):
        for module in network.modules():
            if hasattr(module, "use_checkpoint"):
                module.use_checkpoint = on
        network.zero_grad()
        drawn(network.train(), CASES["SwinUNETR"].example(2), 1)[0].square().mean().backward()
        grads.append([w.grad.clone() for w in network.parameters() if w.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch, where it breaks the graph
@every_case
def test_a_compiled_training_pass_gives_the_same(name: str) -> None:
    network, _, _ = filled(name)
    x = CASES[name].example(2)
    torch.compiler.reset()
    compiled = torch.compile(network.train(), backend="eager")
    for a, b in zip(drawn(compiled, x, 0), drawn(network, x, 0), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_it_exports_as_before() -> None:
    network, plain, _ = filled("timm-swin")
    calls = []
    for one in (network, plain):
        graph = torch.export.export(one.eval(), (CASES["timm-swin"].example(),)).graph
        calls.append([str(node) for node in graph.nodes if node.op == "call_function"])
    assert calls[0] == calls[1]


def test_a_block_that_counts_its_window_itself_is_refused() -> None:
    make = timm("swinv2_tiny_window8_256", img_size=64, features_only=True, **TIMM_SWIN)
    network = make()
    with pytest.raises(MedsegError, match="does not run on a part of its tokens"):
        insert(network, "patch_dropout", example=torch.rand(1, 1, 64, 64))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_windows_that_are_cut_inside_the_attention_are_refused() -> None:
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    network = swin.SwinTransformer([4, 4], 12, [2], [2], [4, 4], num_classes=2)
    with pytest.raises(MedsegError, match="windows or fewer keys than tokens.*Use drop_key"):
        insert(network, "patch_dropout", example=torch.rand(1, 3, 32, 32))


def test_feed_forward_blocks_run_on_fewer_tokens_for_one_reason_alone() -> None:
    case = CASES["timm-swin"]
    network, _, _ = filled("timm-swin")
    options = {"mode": "feed_forward", "stages": 1}
    said = "feed-forward blocks run on fewer tokens already, for PatchDropout"
    with pytest.raises(MedsegError, match=said):
        use_token_selection(network, (1, *case.shape), "Swin", **options)
    network = case.network()
    use_token_selection(network, (1, *case.shape), "Swin", **options)
    with pytest.raises(MedsegError, match=r"mlp' runs on fewer tokens already, for TokenSelection"):
        insert(network, "patch_dropout", example=case.example())


def test_foreground_cannot_be_protected_where_windows_share_their_pattern() -> None:
    with pytest.raises(MedsegError, match="all windows lose the same patches.*protect_foreground"):
        filled("timm-swin", protect_foreground=True)

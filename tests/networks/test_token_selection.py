"""Blocks of a transformer work on chosen tokens; the others stay in their places."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from medseg_reg.errors import MedsegError
from medseg_reg.insertion import find_places, insert
from medseg_reg.insertion.sequence import KeysMaskHook
from medseg_reg.networks import TokenSelection
from medseg_reg.networks.build import Network, build_network
from medseg_reg.networks.token_selection import use_token_selection
from medseg_reg.regularizers import weigh_keys
from tests.insertion.transformers import TRANSFORMERS, outputs
from tests.reference.attention import masked_softmax

UNETR = {
    "name": "monai.UNETR",
    "img_size": 64,
    "hidden_size": 24,
    "mlp_dim": 48,
    "num_heads": 2,
    "feature_size": 4,
}
SWIN = {"name": "monai.SwinUNETR", "feature_size": 12, "num_heads": [1, 1, 2, 2]}
DPT = {"name": "smp.DPT", "encoder_name": "tu-vit_tiny_patch16_224", "decoder_readout": "ignore"}
SLOW = pytest.mark.slow


def build(arguments: dict[str, Any], **selection: Any) -> Network:
    torch.manual_seed(0)
    return build_network(
        in_channels=1, classes=2, head="softmax", token_selection=selection, **arguments
    )


def selections(network: nn.Module) -> list[TokenSelection]:
    return [m for m in network.modules() if isinstance(m, TokenSelection)]


def fixed(network: nn.Module) -> None:
    """Let training choose what evaluation chooses."""

    def best(one: TokenSelection) -> Any:
        def drawn(logits: Tensor) -> Tensor:
            count = max(1, math.floor(one.keep * logits.shape[1] + 1e-9))
            s = torch.zeros_like(logits).scatter(1, logits.topk(count, 1).indices, 1.0)
            return torch.cat([s.new_ones(len(s), one.prefix_tokens), s], 1)

        return drawn

    for one in selections(network):
        one._drawn = best(one)  # type: ignore[method-assign]


# The selection


def test_training_mixes_by_the_drawn_choice_and_evaluation_takes_the_best() -> None:
    part, x = TokenSelection(6, 0.4, prefix_tokens=1), torch.randn(3, 11, 6)
    assert part.enter(x) is x
    mask = part.key_weights()
    assert mask is not None
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert (mask[:, 0] == 1).all()
    y = part.leave(x + 5)
    torch.testing.assert_close(y - x, (5 * mask)[..., None].expand_as(x))
    part.eval()
    best = part.logits(x).topk(4, 1).indices.sort(1).values + 1
    inside = part.enter(x)
    assert torch.equal(inside[:, 1:], x.gather(1, best[..., None].expand(-1, -1, 6)))
    assert part.key_weights() is None
    changed = (part.leave(inside + 5) - x).mean(-1)
    expected = torch.zeros(3, 11).scatter(1, best, 5.0)
    expected[:, 0] = 5.0
    torch.testing.assert_close(changed, expected)


def test_hidden_keys_are_left_out_of_the_softmax_as_if_it_were_masked() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(2, 3, 20, 20, dtype=torch.float64)
    policy = (torch.rand(2, 20) < 0.6).double()
    weighed = weigh_keys(logits.softmax(-1), policy).numpy()
    keep = policy.bool()[:, None, None].expand_as(logits).numpy()
    np.testing.assert_allclose(weighed, masked_softmax(logits.numpy(), keep), atol=2e-7)
    hook = KeysMaskHook(TokenSelection(4), "attn_mask")
    hook.layer._mask = policy
    _, given = hook(nn.Identity(), (logits[:, 0],), {})
    added = (logits + given["attn_mask"]).softmax(-1).numpy()
    np.testing.assert_allclose(added, weighed, atol=2e-7)


def test_the_share_drawn_is_that_of_the_logits() -> None:
    part = TokenSelection(4, 0.3)
    with torch.no_grad():
        part.predictor[-1].weight.zero_()  # all logits log(0.3 / 0.7)
    part.enter(torch.randn(200, 100, 4))
    assert float(part.kept) == pytest.approx(0.3, abs=0.01)


def test_at_least_one_patch_is_chosen() -> None:
    part, x = TokenSelection(4, 0.5), torch.randn(20, 3, 4)
    with torch.no_grad():
        part.predictor[-1].bias.fill_(-50.0)
    part.enter(x)
    assert part.key_weights().sum(1).tolist() == [1.0] * 20
    assert part.eval().enter(torch.randn(2, 1, 4)).shape == (2, 1, 4)


def test_the_penalty_is_the_squared_distance_and_there_in_training_alone() -> None:
    part, x = TokenSelection(4, 0.5, weight=3.0), torch.randn(4, 9, 4)
    part.enter(x)
    assert part.penalty.item() == pytest.approx(3.0 * (float(part.kept) - 0.5) ** 2, abs=1e-6)
    part.penalty.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in part.parameters())
    part.eval().enter(x)
    assert part.penalty is None
    with torch.no_grad():
        part.train().enter(x)
    assert part.penalty is None


@pytest.mark.parametrize("keep", [0.3, 0.7])
def test_a_training_reaches_the_share_and_keeps_the_tokens_that_matter(keep: float) -> None:
    """The block has something to do for the half of the tokens that has a mark, and does harm
    to the others."""
    torch.manual_seed(0)
    part, block = TokenSelection(6, keep, weight=20.0), nn.Linear(6, 6)
    with torch.no_grad():
        part.predictor[-1].bias.fill_(3.0)  # nearly all of them at first
    optimizer = torch.optim.Adam([*part.parameters(), *block.parameters()], 0.02)
    for _ in range(200):
        x = torch.randn(8, 40, 6)
        wanted = x + x.flip(-1) * (x[..., :1] > 0)
        y = part.leave(block(part.enter(x)))
        loss = (y - wanted).square().mean() + part.penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    shares = []
    for _ in range(20):
        part.enter(x := torch.randn(8, 40, 6))
        shares.append(float(part.kept))
    assert sum(shares) / 20 == pytest.approx(keep, abs=0.05)
    logits = part.logits(x)
    marked = x[..., 0] > 0
    assert logits[marked].mean() > logits[~marked].mean() + 1


@pytest.mark.parametrize(
    "arguments", [{"keep": 0.0}, {"keep": 1.0}, {"weight": -1.0}, {"temperature": 0.0}]
)
def test_an_argument_out_of_range_is_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"expected keep in \(0, 1\)"):
        TokenSelection(4, **arguments)


# In networks


@pytest.mark.parametrize("mode", ["block", "feed_forward"])
@pytest.mark.parametrize(
    "name",
    ["UNETR", "timm-vit-fused", *(pytest.param(n, marks=SLOW) for n in ("timm-vit", "SwinUNETR"))],
)
def test_evaluation_computes_what_training_does_with_the_same_choice(name: str, mode: str) -> None:
    case = TRANSFORMERS[name]
    if name == "SwinUNETR" and mode == "block":
        pytest.skip("windows, see below")
    network = case.network()
    use_token_selection(network, case.example().shape, name, stages=2, keep=0.6, mode=mode)
    fixed(network)
    x = case.example(2)
    with torch.no_grad():
        ours, theirs = outputs(network.eval(), x), outputs(network.train(), x)
        whole = outputs(case.network().eval(), x)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    assert [a.shape for a in ours] == [a.shape for a in whole]
    for one in selections(network):
        assert one.prefix_tokens == (1 if "vit" in name else 0)
    torch.testing.assert_close(network.eval()(x[1:]), ours[-1][1:], atol=2e-5, rtol=1e-4)


def test_weights_keep_their_names_and_predictors_stand_beside() -> None:
    network = build(UNETR)
    plain = build_network(in_channels=1, classes=2, head="softmax", **UNETR)
    more = [key for key in network.state_dict() if key not in plain.state_dict()]
    assert plain.state_dict().keys() <= network.state_dict().keys()
    assert all(".selection.predictor." in key for key in more)
    missing, unexpected = network.load_state_dict(plain.state_dict(), strict=False)
    assert (sorted(missing), unexpected) == (sorted(more), [])
    keeps = [round(one.keep, 3) for one in selections(network)]
    assert keeps == [0.7] * 3 + [0.49] * 3 + [0.343] * 3
    assert [one.weight for one in selections(network)] == pytest.approx([4 / 9] * 9)
    for one in selections(network):
        one.in_evaluation = False
    x = torch.rand(1, 1, 64, 64)
    assert torch.equal(network.eval()(x), _same(plain, network)(x))


def _same(plain: nn.Module, network: nn.Module) -> nn.Module:
    state = network.state_dict()
    plain.load_state_dict({key: state[key] for key in plain.state_dict()})
    return plain.eval()


@pytest.mark.parametrize(
    "arguments",
    [UNETR, *(pytest.param(one, marks=SLOW) for one in (DPT, {**SWIN, "mode": "feed_forward"}))],
)
def test_every_part_learns_and_copies_are_independent(arguments: dict[str, Any]) -> None:
    mode = {"mode": "feed_forward"} if "mode" in arguments else {}
    network = build({k: v for k, v in arguments.items() if k != "mode"}, **mode)
    x = torch.rand(2, 1, *((64, 64) if arguments is not DPT else network.size))
    twin = copy.deepcopy(network)
    network.train()(x).square().mean().backward()  # of the task alone, without the penalty
    for one in selections(network):
        grads = [p.grad for p in one.parameters()]
        assert all(grad is not None and grad.isfinite().all() for grad in grads)
        assert one.predictor[1].weight.grad.abs().max() > 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert network(x).isfinite().all()
    expected = network.eval()(x)
    assert torch.equal(network(x), expected)
    twin.load_state_dict(network.state_dict())
    assert torch.equal(twin.eval()(x), expected)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.zero_()
    assert torch.equal(network(x), expected)


@pytest.mark.parametrize(("mode", "share"), [("block", 0.25), ("feed_forward", 0.5)])
def test_evaluation_saves_operations(mode: str, share: float) -> None:
    monai = pytest.importorskip("monai.networks.nets")
    network = monai.ViT(1, (64, 64), (8, 8), 32, 64, 2, 4, spatial_dims=2)
    use_token_selection(network, (1, 1, 64, 64), "ViT", keep=0.25, stages=1, first=0, mode=mode)
    counts = []
    for chosen in (False, True):
        for one in selections(network):
            one.in_evaluation = chosen
        with FlopCounterMode(display=False) as counter:
            network.eval()(torch.rand(1, 1, 64, 64))
        found = counter.get_flop_counts()
        part = "ViT.blocks.1.attn.qkv" if mode == "block" else "ViT.blocks.1.mlp.linear1"
        counts.append(sum(found[part].values()))
    assert counts[1] == 0.25 * counts[0]


def test_places_are_those_of_the_network_and_layers_work_beside() -> None:
    network, x = build(UNETR), torch.rand(1, 1, 64, 64)
    plain = build_network(in_channels=1, classes=2, head="softmax", **UNETR)
    assert [str(one) for one in find_places(network, x)] == [
        str(one) for one in find_places(plain, x)
    ]
    insert(network, "drop_key", example=x, p=0.3)
    insert(network, "drop_path", "encoder.4.residual", example=x, p=0.3)
    network.train()(x).square().mean().backward()
    network.eval()(x)
    for name in ("token_merging", "patch_dropout"):
        with pytest.raises(MedsegError, match="runs on fewer tokens already, for TokenSelection"):
            insert(network, name, example=x)


def test_a_row_that_two_masks_leave_no_key_still_attends() -> None:
    case = TRANSFORMERS["timm-vit-fused"]
    for first in (True, False):
        network = case.network()
        if first:
            insert(network, "drop_key", example=case.example(), p=0.9)
        use_token_selection(network, case.example().shape, "ViT", keep=0.1, stages=1, first=0)
        if not first:
            insert(network, "drop_key", example=case.example(), p=0.9)
        y = network.train()(case.example(4))
        y.square().mean().backward()
        assert y.isfinite().all()
        assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("arguments", "selection", "said"),
    [
        (SWIN, {}, "sees windows, whose tokens .* Use mode=feed_forward"),
        ({**SWIN, "window_size": 8}, {"stages": 1, "first": 0}, "sees windows, whose tokens"),
        ({"name": "unet", "channels": (4, 8)}, {}, "no blocks of a transformer"),
        ({"name": "unet", "channels": (4, 8)}, {"mode": "feed_forward"}, "no feed-forward blocks"),
        (UNETR, {"first": 11}, "1 are left after the first 11: too few for stages=3"),
        (
            {**UNETR, "experts": {"experts": 2}},
            {"mode": "feed_forward"},
            "its feed-forward blocks are experts",
        ),
    ],
)
def test_what_cannot_work_is_refused(
    arguments: dict[str, Any], selection: dict[str, Any], said: str
) -> None:
    with pytest.raises(MedsegError, match=said):
        build(arguments, **selection)


def test_blocks_that_need_the_whole_grid_are_refused() -> None:
    timm = pytest.importorskip("timm")
    small = {"img_size": 64, "in_chans": 1, "depth": 3, "embed_dim": 24, "num_heads": 3}
    network = timm.create_model("beit_base_patch16_224", **small)
    for module in network.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    with pytest.raises(MedsegError, match="does not run on a part .* Use mode=feed_forward"):
        use_token_selection(network, (1, 1, 64, 64), "BEiT", stages=1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_an_exported_network_gives_the_same_logits() -> None:
    network = build(UNETR).eval()
    x, other = torch.rand(1, 1, 64, 64), torch.rand(1, 1, 64, 64)
    program = torch.export.export(network, (x,)).module()
    traced = torch.jit.trace(network, x, check_trace=False)
    for one in (program, traced):
        torch.testing.assert_close(one(other), network(other), atol=1e-5, rtol=1e-4)

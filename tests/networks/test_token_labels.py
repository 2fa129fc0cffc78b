"""The tokens of a transformer learn what their patches show, and nothing else changes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medseg_reg.errors import MedsegError
from medseg_reg.insertion import find_places, insert
from medseg_reg.networks import TokenLabels
from medseg_reg.networks.build import Network, build_network
from medseg_reg.networks.token_labels import (
    finest_patch,
    patch_occupancy,
    token_label_loss,
    use_token_labels,
)
from medseg_reg.networks.token_selection import use_token_selection
from medseg_reg.regularizers.protocols import LabelReader, LabelTaker, PenaltyGiver
from tests.insertion.transformers import TRANSFORMERS, outputs
from tests.reference import token_labels as reference

UNETR = {
    "name": "monai.UNETR",
    "img_size": 48,
    "hidden_size": 12,
    "mlp_dim": 16,
    "num_heads": 2,
    "feature_size": 4,
}
SLOW = pytest.mark.slow


def build(arguments: dict[str, Any], classes: int = 2, **more: Any) -> Network:
    torch.manual_seed(0)
    return build_network(in_channels=1, classes=classes, head="softmax", **more, **arguments)


def layers(network: nn.Module) -> list[TokenLabels]:
    return [m for m in network.modules() if isinstance(m, TokenLabels)]


def step(network: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of a training step, with what the network asks for."""
    for one in layers(network):
        one.labels = labels
    loss = sum(one.square().mean() for one in outputs(network.train(), x))
    return loss + sum(one.penalty for one in layers(network) if one.penalty is not None)


# The loss


@pytest.mark.parametrize(
    ("size", "patch", "multiple"),
    [((8, 12), (4, 4), 1), ((7, 10), (4, 2), 1), ((5, 9), (4, 4), 8), ((4, 5, 6), (2, 2, 4), 1)],
)
def test_the_occupancy_counts_the_pixels_of_a_patch(
    size: tuple[int, ...], patch: tuple[int, ...], multiple: int
) -> None:
    labels = torch.randint(0, 3, (2, *size), generator=torch.Generator().manual_seed(1))
    found = patch_occupancy(labels.to(torch.uint8), 3, patch, multiple)
    np.testing.assert_allclose(
        found.numpy(), reference.occupancy(labels.numpy(), 3, patch, multiple), atol=1e-6
    )
    torch.testing.assert_close(found.sum(1), torch.ones_like(found[:, 0]))


@pytest.mark.parametrize("foreground", [1.0, 5.0, 0.2])
def test_the_loss_and_its_gradient_are_those_of_the_formula(foreground: float) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 3, 5, generator=generator, requires_grad=True)
    shares = torch.softmax(2 * torch.randn(2, 3, 5, generator=generator), 1)
    shares[0, :, 1] *= 0.25  # most of its pixels are of no known class
    shares[1, :, 2] = 0.0
    loss = token_label_loss(logits, shares, foreground)
    z, y = logits.detach().double().numpy(), shares.double().numpy()
    assert loss.item() == pytest.approx(reference.loss(z, y, foreground), rel=1e-6)
    loss.backward()
    for index in ((0, 0, 0), (1, 2, 4)):
        up, down = z.copy(), z.copy()
        up[index] += 1e-6
        down[index] -= 1e-6
        slope = (reference.loss(up, y, foreground) - reference.loss(down, y, foreground)) / 2e-6
        assert logits.grad[index].item() == pytest.approx(slope, rel=1e-4, abs=1e-8)


def test_pixels_of_no_class_count_nowhere() -> None:
    labels = torch.randint(0, 2, (1, 6, 6), generator=torch.Generator().manual_seed(1))
    labels[0, :2, :3], labels[0, 5, 5] = 255, 255
    found = patch_occupancy(labels.to(torch.uint8), 2, (2, 2))
    np.testing.assert_allclose(found, reference.occupancy(labels.numpy(), 2, (2, 2)), atol=1e-6)
    assert found.sum(1)[0].tolist() == [[0, 0.5, 1], [1, 1, 1], [1, 1, 0.75]]
    logits = torch.randn(1, 2, 9, requires_grad=True)
    nothing = token_label_loss(logits, torch.zeros(1, 2, 9), 2.0)
    nothing.backward()
    assert nothing.item() == 0
    assert (logits.grad == 0).all()


def test_the_penalty_is_the_weighted_loss_of_the_patches_and_leaves_the_class_token_out() -> None:
    layer = TokenLabels(6, 3, (2, 2), weight=0.3, foreground=2.0, prefix_tokens=1)
    tokens = torch.randn(2, 7, 6)
    layer.labels = torch.randint(0, 3, (2, 4, 6), generator=torch.Generator().manual_seed(3))
    layer.watch(tokens)
    shares = patch_occupancy(layer.labels, 3, (2, 2)).flatten(2)
    logits = layer.head(tokens[:, 1:]).transpose(1, 2)
    torch.testing.assert_close(layer.penalty, 0.3 * token_label_loss(logits, shares, 2.0))
    changed = tokens.clone()
    changed[:, 0] += 1
    asked = layer.penalty
    layer.watch(changed)
    assert torch.equal(layer.penalty, asked)


def test_without_labels_gradients_or_weight_it_asks_for_nothing() -> None:
    tokens, labels = torch.randn(1, 4, 6), torch.zeros(1, 4, 4, dtype=torch.uint8)
    layer = TokenLabels(6, 2, (2, 2))
    layer.watch(tokens)
    assert layer.penalty is None
    layer.labels = labels
    with torch.no_grad():
        layer.watch(tokens)
    assert layer.penalty is None
    layer.weight = 0.0
    layer.watch(tokens)
    assert layer.penalty is None
    assert isinstance(layer, LabelTaker)
    assert isinstance(layer, PenaltyGiver)
    assert not isinstance(layer, LabelReader)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="expected weight >= 0, foreground > 0"):
        TokenLabels(6, 2, (2, 2), weight=-1.0)
    with pytest.raises(ValueError, match="foreground > 0; got 0.5, 0"):
        TokenLabels(6, 2, (2, 2), foreground=0.0)
    layer = TokenLabels(6, 2, (2, 2))
    for labels in (torch.zeros(1, 4, 6), torch.zeros(2, 4, 4)):
        layer.labels = labels.to(torch.uint8)
        with pytest.raises(ValueError, match="1 images of 4 patches, but labels of the shape"):
            layer.watch(torch.randn(1, 4, 6))


def test_tokens_learn_what_their_patches_show() -> None:
    torch.manual_seed(0)
    embed = nn.Conv2d(1, 12, 4, 4)
    layer = TokenLabels(12, 2, (4, 4), weight=1.0)
    optimizer = torch.optim.Adam([*embed.parameters(), *layer.parameters()], 0.02)
    for _ in range(150):
        layer.labels = (torch.rand(8, 1, 16, 16) < torch.rand(8, 1, 1, 1)).long()[:, 0]
        tokens = embed(layer.labels[:, None].float()).flatten(2).transpose(1, 2)
        layer.watch(tokens)
        optimizer.zero_grad()
        layer.penalty.backward()
        optimizer.step()
    shares = patch_occupancy(layer.labels, 2, (4, 4)).flatten(2)
    assert (torch.softmax(layer(tokens), 1) - shares).abs().mean() < 0.05
    assert (shares - shares.mean()).abs().mean() > 0.15


# In networks


@pytest.mark.parametrize(
    ("name", "taps", "patches"),
    [
        ("UNETR", 3, [(16, 16)] * 3),
        ("timm-vit-fused", 1, [(16, 16)]),
        pytest.param("SwinUNETR", 3, [(2, 2), (4, 4), (16, 16)], marks=SLOW),
        pytest.param("DPT", 1, [(16, 16)], marks=SLOW),
        pytest.param("Segformer", 2, [(8, 8), (32, 32)], marks=SLOW),
    ],
)
def test_heads_hang_beside_blocks_and_the_network_is_as_it_was(
    name: str, taps: int, patches: list[tuple[int, int]]
) -> None:
    case = TRANSFORMERS[name]
    network, plain = case.network(), case.network()
    plain.load_state_dict(network.state_dict())
    x, state = case.example(2), torch.get_rng_state()
    paths = use_token_labels(network, x.shape, name, 3, taps=taps)
    assert torch.equal(torch.get_rng_state(), state)
    found = [network.get_submodule(f"{path}.token_labels") for path in paths]
    assert [one.patch for one in found] == patches
    assert {one.weight for one in found} == {0.5 / taps}
    assert {one.prefix_tokens for one in found} == {1 if "vit" in name or name == "DPT" else 0}
    more = network.state_dict().keys() - plain.state_dict().keys()
    assert {key.rpartition(".token_labels.head.")[0] for key in more} == set(paths)
    assert plain.state_dict().keys() <= network.state_dict().keys()
    with torch.no_grad():
        for a, b in zip(outputs(network.eval(), x), outputs(plain.eval(), x), strict=True):
            assert torch.equal(a, b)
    labels = torch.randint(0, 3, (2, *x.shape[2:]))
    step(network, x, labels).backward()
    for one in found:
        assert all(p.grad is not None and p.grad.isfinite().all() for p in one.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert step(network, x, labels).isfinite()


def test_a_label_is_that_of_the_pixels_that_its_token_sees() -> None:
    network = build(UNETR, token_labels={})
    embed = next(m for m in network.modules() if type(m).__name__ == "PatchEmbeddingBlock")
    for token in (0, 5, 7):
        x = torch.rand(1, 1, 48, 48, requires_grad=True)
        embed(x)[0, token].sum().backward()
        seen = (x.grad[:, 0] != 0).long()
        shares = patch_occupancy(seen, 2, (16, 16)).flatten(2)[0, 1]
        assert shares.nonzero().flatten().tolist() == [token]
        assert shares[token] == 1


def test_the_loss_reaches_the_first_block_and_adds_its_gradient_to_that_of_the_task() -> None:
    network, x = build(UNETR, token_labels={"weight": 2.0}), torch.rand(2, 1, 48, 48)
    plain = build(UNETR)
    (layer,) = layers(network)
    labels = torch.randint(0, 2, (2, 48, 48))
    step(network, x, labels).backward()
    step(plain, x, labels).backward()
    theirs = dict(plain.named_parameters())
    first = next(k for k in theirs if k.endswith("blocks.0.attn.qkv.weight"))
    assert not torch.allclose(network.get_parameter(first).grad, theirs[first].grad)
    layer.weight = 0.0
    network.zero_grad(set_to_none=True)
    step(network, x, labels).backward()
    for key, weight in plain.named_parameters():
        ours = network.get_parameter(key).grad
        assert ours is weight.grad or torch.equal(ours, weight.grad), key
    assert all(p.grad is None for p in layer.parameters())


@pytest.mark.parametrize("method", ["patch_dropout", "token_merging", "token_selection"])
def test_it_sees_every_token_where_blocks_run_on_fewer(method: str) -> None:
    case = TRANSFORMERS["timm-vit"]
    network, x = case.network(), case.example(2)
    labels = torch.randint(0, 2, (2, *x.shape[2:]))
    if method == "token_selection":
        use_token_selection(network, x.shape, "ViT", stages=1, first=0, keep=0.5)
    use_token_labels(network, x.shape, "ViT", 2, taps=2)
    if method != "token_selection":
        insert(network, method, example=x[:1], p=0.5)
        insert(network, "guided_residual_dropout", example=x[:1], p=0.2)
    step(network, x, labels).backward()
    for one in layers(network):
        assert one.penalty is not None
        assert all(p.grad.isfinite().all() for p in one.parameters())


@pytest.mark.slow
def test_images_are_padded_as_the_network_pads_them() -> None:
    name = {"name": "smp.DPT", "encoder_name": "tu-vit_tiny_patch16_224", "dynamic_img_size": True}
    network = build({**name, "decoder_readout": "ignore"}, token_labels={})
    (layer,) = layers(network)
    assert (layer.multiple, layer.patch) == (32, (16, 16))
    x = torch.rand(1, 1, 40, 33)  # becomes 64 x 64, not 48 x 48
    step(network, x, torch.randint(0, 2, (1, 40, 33)))
    assert layer.penalty is not None


def test_places_are_those_of_the_network_and_copies_are_independent() -> None:
    network, x = build(UNETR, token_labels={}), torch.rand(1, 1, 48, 48)
    plain = build(UNETR)
    assert list(map(str, find_places(network, x))) == list(map(str, find_places(plain, x)))
    twin, labels = copy.deepcopy(network), torch.zeros(1, 48, 48, dtype=torch.uint8)
    step(twin, x, labels)
    assert layers(twin)[0].penalty is not None
    assert layers(network)[0].penalty is None
    assert finest_patch(network, (1, 1, 48, 48), "key") == (16, 16)


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        ({"name": "unet", "channels": (4, 8)}, {}, "unet has no blocks of a transformer"),
        (UNETR, {"taps": 13}, "has 12 blocks, fewer than taps=13"),
    ],
)
def test_a_network_that_cannot_is_refused(
    arguments: dict[str, Any], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(MedsegError, match=f"network.token_labels: .*{said}"):
        build(arguments, token_labels=options)


def test_tokens_that_are_no_grid_of_patches_are_refused() -> None:
    monai = pytest.importorskip("monai.networks.nets")
    network = monai.ViT(1, (48, 40), (16, 8), 24, 32, 2, 3, spatial_dims=2)
    with pytest.raises(MedsegError, match="gives .* for images of .*, which is no grid"):
        use_token_labels(network, (1, 1, 48, 40), "ViT", 2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_an_exported_network_has_no_trace_of_it() -> None:
    network, plain = build(UNETR, token_labels={}).eval(), build(UNETR).eval()
    x, other = torch.rand(1, 1, 48, 48), torch.rand(1, 1, 48, 48)
    for one, two in (
        (torch.export.export(network, (x,)), torch.export.export(plain, (x,))),
        (torch.jit.trace(network, x, check_trace=False),) * 2,
    ):
        if not isinstance(one, torch.jit.ScriptModule):
            assert len(one.graph.nodes) - len(two.graph.nodes) == 4  # the head's unused weights
            one = one.module()
        torch.testing.assert_close(one(other), plain(other), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_it_sees_every_token_of_windows_that_run_on_fewer() -> None:
    monai = pytest.importorskip("monai.networks.nets")
    small = {"feature_size": 12, "num_heads": (1, 1, 2, 2), "window_size": 4}
    network = monai.SwinUNETR(1, 2, spatial_dims=2, **small)
    x = torch.rand(2, 1, 128, 128)
    use_token_labels(network, x.shape, "Swin", 2, taps=4)
    insert(network, "patch_dropout", example=x[:1], p=0.5)
    step(network, x, torch.randint(0, 2, (2, 128, 128))).backward()
    assert all(one.penalty is not None for one in layers(network))

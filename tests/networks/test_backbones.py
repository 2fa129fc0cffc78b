"""What docs/backbones.md says of ViT, Swin, ConvNeXt and MiT as encoders is so."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from medseg_reg.config_network import ForeignSpec
from medseg_reg.config_regularization import DepthRampSpec
from medseg_reg.engine.network import own_rates_note
from medseg_reg.engine.rates import apply_depth_ramp
from medseg_reg.errors import MedsegError
from medseg_reg.insertion import insert
from medseg_reg.insertion.kinds import own_drop_paths
from medseg_reg.networks.build import build_network
from medseg_reg.networks.foreign_check import check_foreign
from medseg_reg.networks.pretrained import load_pretrained
from medseg_reg.regularizers import DropPath

timm = pytest.importorskip("timm")
pytest.importorskip("segmentation_models_pytorch")

CONVNEXT = {"encoder_name": "tu-convnext_atto", "dims": [4, 4, 8, 8], "depths": [1, 1, 2, 1]}
SWIN = {
    "encoder_name": "tu-swin_tiny_patch4_window7_224",
    "embed_dim": 4,
    "depths": [1, 1, 1, 2],
    "num_heads": [1, 1, 2, 2],
}
VIT = {"encoder_name": "tu-vit_tiny_patch16_224", "embed_dim": 12, "num_heads": 2}
MIT = {"encoder_name": "mit_b0", "decoder_segmentation_channels": 8}
NARROW = {"decoder_channels": [8, 8, 8, 8, 8]}
DPT = {"decoder_intermediate_channels": [8] * 4, "decoder_fusion_channels": 8}


def network(name: str, channels: int = 1, **arguments: Any) -> nn.Module:
    return build_network(in_channels=channels, classes=2, head="softmax", name=name, **arguments)


def own_rates(network: nn.Module) -> list[float]:
    """The rates of the DropPath modules of a network's own; where one is 0 there is no module."""
    return [m.drop_prob for m in network.modules() if type(m).__name__ == "DropPath"]


def evenly(rate: float, blocks: int, times: int = 1) -> list[float]:
    rates = [rate * i / (blocks - 1) for i in range(blocks)]
    return pytest.approx([one for one in rates for _ in range(times) if one > 0])


# What each has by itself


def test_the_rates_of_a_backbone_rise_evenly_over_its_blocks() -> None:
    found = own_rates(network("smp.UPerNet", **CONVNEXT, drop_path_rate=0.2))
    assert found == evenly(0.2, 5)
    swin = network("smp.UPerNet", **SWIN, img_size=64, window_size=2, drop_path_rate=0.3)
    assert own_rates(swin) == evenly(0.3, 5, times=2)
    vit = network("smp.DPT", **VIT, **DPT, dynamic_img_size=True, drop_path_rate=0.3)
    assert own_rates(vit) == evenly(0.3, 12, times=2)


def test_some_drop_paths_without_being_asked_and_some_do_not() -> None:
    assert own_rates(network("smp.UPerNet", **CONVNEXT)) == []
    assert own_rates(network("smp.DPT", **VIT, **DPT, dynamic_img_size=True)) == []
    swin = {**SWIN, "img_size": 64, "window_size": 2}
    assert own_rates(network("smp.UPerNet", **swin)) == evenly(0.1, 5, times=2)
    assert own_rates(network("smp.UPerNet", **swin, drop_path_rate=0.0)) == []
    mit = network("smp.Segformer", **MIT)
    assert own_rates(mit) == evenly(0.1, 8)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3])
def test_the_rate_of_mit_is_an_argument_as_that_of_encoders_of_timm(rate: float) -> None:
    built = network("smp.Unet", encoder_name="mit_b0", **NARROW, drop_path_rate=rate)
    blocks = [m for m in built.modules() if type(m).__name__ == "DropPath"]
    assert [one.drop_prob for one in blocks] == pytest.approx([rate * i / 7 for i in range(1, 8)])
    plain = network("smp.Unet", encoder_name="mit_b0", **NARROW)
    assert list(built.state_dict()) == list(plain.state_dict())
    assert own_rates(plain) == evenly(0.1, 8)
    assert bool(own_drop_paths(built)) == (rate > 0)


def test_a_rate_of_mit_that_cannot_be_or_changes_nothing_is_refused() -> None:
    spec = ForeignSpec(name="smp.Segformer", **MIT, drop_path_rate=0.0)
    assert own_drop_paths(network("smp.Segformer", **spec.arguments)) == ""
    said = "'drop_path_rate' changes nothing beside the other arguments and this encoder"
    with pytest.raises(ValueError, match=said):
        check_foreign("smp.Segformer", {**MIT, "drop_path_rate": 0.1})
    for rate in (1.0, -0.1, True, "0.2"):
        with pytest.raises(ValueError, match="expected a number from 0 to below 1"):
            check_foreign("smp.Segformer", {**MIT, "drop_path_rate": rate})
    said = "no argument 'drop_rate'. Did you mean 'drop_path_rate'.*no arguments but drop_path_rate"
    with pytest.raises(ValueError, match=said):
        check_foreign("smp.Segformer", {**MIT, "drop_rate": 0.1})


def told(name: str, **arguments: Any) -> str:
    spec = ForeignSpec.model_construct(name=name, **arguments)  # what checks it is tested elsewhere
    return own_rates_note(spec, network(name, **arguments))


def test_a_training_tells_of_a_rate_that_nobody_asked_for() -> None:
    assert told("smp.Segformer", **MIT) == (
        "network: it drops residual branches by itself in training (7 DropPath at rates up to 0.1)"
        ", whatever regularization has. Set network.drop_path_rate; 0.0 is none."
    )
    assert told("smp.Segformer", **MIT, drop_path_rate=0.3) == ""
    swin = {**SWIN, "img_size": 64, "window_size": 2}
    assert told("smp.UPerNet", **swin).endswith(
        "(8 DropPath at rates up to 0.1), whatever regularization has. "
        "Set network.drop_path_rate; 0.0 is none."
    )
    assert told("smp.UPerNet", **swin, drop_path_rate=0.2) == ""
    assert told("smp.UPerNet", **CONVNEXT) == ""
    ours = nn.Sequential(DropPath(0.1))
    assert own_drop_paths(ours) == ""


def test_patches_that_an_encoder_drops_itself_are_refused_by_name() -> None:
    wrong = {**VIT, **DPT, "dynamic_img_size": True, "decoder_readout": "ignore"}
    with pytest.raises(ValueError, match="'patch_drop_rate' leaves .* layer patch_dropout"):
        check_foreign("smp.DPT", {**wrong, "patch_drop_rate": 0.25})


def test_a_shallower_encoder_keeps_the_rates_of_the_whole_one() -> None:
    arguments = {"encoder_depth": 4, "decoder_channels": [8, 8, 8, 8], "drop_path_rate": 0.2}
    found = own_rates(network("smp.Unet", **CONVNEXT, **arguments))
    assert found == pytest.approx([0.05, 0.1, 0.15])


def test_layer_scale_begins_at_a_millionth_in_convnext_and_by_request_in_vit() -> None:
    def scales(network: nn.Module) -> dict[str, float]:
        weights = network.state_dict().items()
        return {key: float(w.max()) for key, w in weights if key.endswith("gamma")}

    found = scales(network("smp.UPerNet", **CONVNEXT))
    assert list(found.values()) == pytest.approx([1e-6] * 5)
    plain = network("smp.DPT", **VIT, **DPT, dynamic_img_size=True)
    assert scales(plain) == {}
    scaled = network("smp.DPT", **VIT, **DPT, dynamic_img_size=True, init_values=0.1)
    found = scales(scaled)
    assert list(found.values()) == pytest.approx([0.1] * 24)


def test_the_first_value_of_layer_scale_is_an_argument_that_counts() -> None:
    check_foreign("smp.UPerNet", {**CONVNEXT, "ls_init_value": 0.1})
    with pytest.raises(ValueError, match="'head_init_scale' changes nothing"):
        check_foreign("smp.UPerNet", {**CONVNEXT, "head_init_scale": 0.1})


def test_a_new_convnext_is_nearly_without_its_blocks_and_grows_them_by_the_learning_rate() -> None:
    model = network("smp.UPerNet", **CONVNEXT).network.encoder.train()
    x = torch.randn(4, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    blocks = [m for m in model.modules() if type(m).__name__ == "ConvNeXtBlock"]
    seen: list[Tensor] = []
    blocks[0].register_forward_hook(lambda m, args, y: seen.append((y - args[0]) / args[0].std()))
    optimizer, lr = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0), 1e-3
    for _ in range(3):
        optimizer.zero_grad()
        model(x)[-1].square().mean().backward()
        optimizer.step()
    assert seen[0].abs().max() < 1e-4
    grown = torch.cat([block.gamma.detach() for block in blocks]).abs()
    assert 1.5 * lr < grown.median() < 3.1 * lr


def test_the_half_resolution_of_these_encoders_has_no_channels() -> None:
    assert network("smp.Unet", **CONVNEXT).network.encoder.out_channels == [1, 0, 4, 4, 8, 8]


# The layer of this package in their place


def convnext() -> tuple[nn.Module, str, int]:
    """A small encoder, its branches, and how many of its blocks drop."""
    model = timm.create_model(
        "convnext_atto", features_only=True, in_chans=1, dims=(4, 4, 8, 8), depths=(1,) * 4,
        ls_init_value=1.0, drop_path_rate=0.0,
    )  # fmt: skip
    return model, "residual", 32


def swin() -> tuple[nn.Module, str, int]:
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", features_only=True, in_chans=1, img_size=16, window_size=2,
        embed_dim=4, depths=(1, 1), num_heads=(1, 2), drop_path_rate=0.0,
    )  # fmt: skip
    return model, "residual", 16


def vit() -> tuple[nn.Module, str, int]:
    model = timm.create_model(
        "vit_tiny_patch16_224", in_chans=1, img_size=32, embed_dim=4, depth=2, num_heads=2,
        num_classes=3, drop_path_rate=0.0,
    )  # fmt: skip
    return model, "residual", 32


def last(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return (y[-1] if isinstance(y, list) else y).flatten(1).detach().double()


def droppers(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where timm has a module for the path of a branch, in order."""
    return [
        (module, name)
        for module in model.modules()
        for name in module._modules
        if name in ("drop_path", "drop_path1", "drop_path2")
    ]


def outcomes(model: nn.Module, x: Tensor, rates: list[float]) -> tuple[Tensor, Tensor]:
    """Each result that coins can give, by y = x + branch m / (1 - p), and its probability."""
    dropping = [n for n, p in enumerate(rates) if p > 0]
    results, chances = [], []
    for coins in itertools.product((0, 1), repeat=len(dropping)):
        model_ = copy.deepcopy(model).eval()
        chance = 1.0
        for n, keep in zip(dropping, coins, strict=True):
            host, name = droppers(model_)[n]
            factor = keep / (1 - rates[n])
            host._modules[name].register_forward_hook(lambda m, args, y, factor=factor: y * factor)
            chance *= 1 - rates[n] if keep else rates[n]
        results.append(last(model_, x[:1])[0])
        chances.append(chance)
    return torch.stack(results), torch.tensor(chances)


@pytest.mark.parametrize("make", [convnext, swin, vit], ids=lambda make: make.__name__)
def test_drop_path_of_this_package_draws_what_timm_draws(
    make: Callable[[], tuple[nn.Module, str, int]],
) -> None:
    torch.manual_seed(0)
    model, places, size = make()
    for module, name in droppers(model):
        assert isinstance(module._modules[name], nn.Identity)
    rates = [0.4 * i / (len(droppers(model)) - 1) for i in range(len(droppers(model)))]
    theirs, ours = copy.deepcopy(model), copy.deepcopy(model)
    for (host, name), rate in zip(droppers(theirs), rates, strict=True):
        host._modules[name] = timm.layers.DropPath(rate)
    example = torch.randn(1, 1, size, size)
    report = insert(ours, "drop_path", places, example=example, p=0.4)
    apply_depth_ramp(ours, report, DepthRampSpec(first=0.0, last=1.0), example.shape)
    assert [one.p for one in report] == pytest.approx(rates)
    assert [one.path.rpartition(".")[0].rpartition(".")[2] for one in report] == [
        name for _, name in droppers(model)
    ]
    batch = example.expand(1200, -1, -1, -1)
    wanted, chances = outcomes(model, example, rates)
    for network in (theirs.train(), ours.train()):
        distance = torch.cdist(last(network, batch), wanted)
        nearest, which = distance.min(1)
        assert nearest.max() < 1e-4 * wanted.abs().max()
        counts = torch.bincount(which, minlength=len(wanted)) / len(batch)
        error = (chances * (1 - chances) / len(batch)).sqrt()
        assert ((counts - chances).abs() < 4 * error).all()


@pytest.mark.parametrize(
    ("name", "arguments", "own"),
    [
        ("smp.UPerNet", CONVNEXT, "encoder.3.residual and 3 more"),
        ("smp.UPerNet", {**SWIN, "img_size": 64, "window_size": 2}, "encoder.3.residual.0 and 7"),
    ],
    ids=["convnext", "swin"],
)
def test_both_rates_at_once_are_told(name: str, arguments: dict[str, Any], own: str) -> None:
    example = torch.rand(1, 1, 64, 64)
    arguments = {"decoder_channels": 8, **arguments}
    report = insert(
        network(name, **arguments, drop_path_rate=0.2), "drop_path", example=example, p=0.1
    )
    assert report.note.startswith(own)
    assert report.note.endswith(" by a DropPath of its own; both rates act.")
    alone = network(name, **{**arguments, "drop_path_rate": 0.0})
    assert insert(alone, "drop_path", example=example, p=0.1).note == ""


def test_in_dpt_residual_means_the_decoder_too_and_a_path_the_transformer_alone() -> None:
    example = torch.rand(1, 1, 64, 64)
    model = network("smp.DPT", **VIT, **DPT, dynamic_img_size=True, drop_path_rate=0.1)
    everywhere = insert(copy.deepcopy(model), "drop_path", example=example)
    assert sum("decoder.fusion_blocks" in one.path for one in everywhere) == 8
    report = insert(model, "drop_path", "path:*.blocks.*.drop_path?", example=example)
    assert [one.path for one in report] == [
        f"network.encoder.model.blocks.{i}.drop_path{k}.regularizer"
        for i in range(12)
        for k in (1, 2)
    ]
    assert "drop_path1 and 21 more: the network drops these branches" in report.note
    model.train()(torch.rand(2, 1, 64, 64)).mean().backward()


# Weights of a classifier


@pytest.mark.parametrize(
    ("name", "model", "arguments", "more"),
    [
        ("smp.UPerNet", "convnext_atto", CONVNEXT, {}),
        ("smp.UPerNet", "swin_tiny_patch4_window7_224", SWIN, {"strict_img_size": False}),
        ("smp.DPT", "vit_tiny_patch16_224", {**VIT, **DPT}, {"dynamic_img_size": True}),
    ],
    ids=["convnext", "swin", "vit"],
)
def test_the_weights_of_a_classifier_become_those_of_the_encoder(
    name: str, model: str, arguments: dict[str, Any], more: dict[str, Any], tmp_path: Path
) -> None:
    decoder = ("encoder_name", *DPT)
    own = {key: value for key, value in arguments.items() if key not in decoder}
    classifier = timm.create_model(model, num_classes=3, **own).eval()
    with torch.no_grad():  # layer scale and zeros at the start would hide the rest
        for weight in classifier.parameters():
            weight.normal_(std=0.2)
    path = tmp_path / "weights.safetensors"
    save_file({key: value.contiguous() for key, value in classifier.state_dict().items()}, path)
    segmenter = network(name, channels=3, **arguments, **more).eval()
    with pytest.raises(MedsegError, match="pretrained_strict=false"):
        load_pretrained(segmenter, path)
    report = load_pretrained(segmenter, path, strict=False)
    assert report.part == "encoder"
    assert all("head" in key or "norm" in key for key in report.left_out)
    assert all("head" in key for key in report.new)
    x = torch.randn(2, 3, 224, 224)
    found = segmenter.network.encoder(x)
    found = found[0][-1] if isinstance(found, tuple) else found[-1]
    expected = classifier.forward_intermediates(x, norm=False, intermediates_only=True)[-1]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_positions_of_another_size_are_interpolated_and_named(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    own = {key: value for key, value in VIT.items() if key != "encoder_name"}
    classifier = timm.create_model("vit_tiny_patch16_224", **own)
    save_file(classifier.state_dict(), path)
    segmenter = network("smp.DPT", 3, **VIT, **DPT, img_size=64)
    report = load_pretrained(segmenter, path, strict=False)
    name = "network.encoder.model.pos_embed"
    assert report.resized == (name,)
    wanted = timm.layers.resample_abs_pos_embed(classifier.pos_embed, [4, 4], [14, 14])
    torch.testing.assert_close(segmenter.state_dict()[name], wanted)

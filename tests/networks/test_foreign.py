"""Networks of MONAI and segmentation-models-pytorch are built by name, and never silently wrong."""

from __future__ import annotations

import copy
import os
import socket
from typing import Any

import pytest
import torch

from medseg_reg.config_network import FOREIGN_NAMES, ForeignSpec
from medseg_reg.errors import MedsegError
from medseg_reg.networks.build import Network, build_network, check_input_size
from medseg_reg.networks.foreign import FOREIGN, ForeignNetwork, offline
from medseg_reg.networks.foreign_check import check_foreign
from tests.networks.small_foreign import SIZES, SMALL

FAST = ("monai.UNet", "monai.BasicUNet", "monai.AttentionUnet", "monai.DynUNet", "smp.Unet")
every_network = pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in SMALL]
)


def build(name: str, in_channels: int = 1, classes: int = 2, **more: Any) -> Network:
    if FOREIGN[name].needs:
        pytest.importorskip(FOREIGN[name].needs)
    torch.manual_seed(0)
    arguments = {**SMALL[name], **more}
    return build_network(
        in_channels=in_channels, classes=classes, head="softmax", name=name, **arguments
    )


def example(name: str, batch: int = 2, channels: int = 1) -> torch.Tensor:
    size = SIZES.get(name, (45, 50))
    return torch.rand(batch, channels, *size, generator=torch.Generator().manual_seed(1))


def refusal(name: str, **arguments: Any) -> str:
    with pytest.raises(ValueError) as error:
        check_foreign(name, arguments)
    return str(error.value)


def test_every_name_of_the_configuration_is_built_here() -> None:
    assert set(FOREIGN_NAMES) == set(FOREIGN) == set(SMALL)


@every_network
def test_its_arguments_pass_the_check(name: str) -> None:
    if FOREIGN[name].needs:
        pytest.importorskip(FOREIGN[name].needs)
    spec = ForeignSpec(name=name, **SMALL[name])
    assert spec.arguments == SMALL[name]


@pytest.mark.parametrize("name", ["monai.BasicUNet", "smp.Unet"])
def test_any_channels_and_classes_work(name: str) -> None:
    network = build(name, in_channels=3, classes=4).eval()
    assert network(example(name, channels=3)).shape[1] == 4


def test_deep_supervision_becomes_a_list_with_the_finest_first() -> None:
    network, x = build("monai.DynUNet"), example("monai.DynUNet")
    output = network(x)
    assert isinstance(output, list)
    assert len(output) == 2
    inner = network.network.eval()(torch.nn.functional.pad(x, (0, 2, 0, 3), mode="replicate"))
    assert torch.allclose(output[0], inner[..., :45, :50], atol=1e-5)


def test_a_network_can_be_copied_after_a_step_of_deep_supervision() -> None:
    network, x = build("monai.DynUNet"), example("monai.DynUNet")
    expected = [one.detach() for one in network(x)]
    found = copy.deepcopy(network)(x)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_sizes_are_padded_to_the_strides_of_each_axis() -> None:
    network = build("monai.AttentionUnet")
    assert isinstance(network, ForeignNetwork)
    assert network.factor == 8
    assert network.eval()(torch.rand(1, 1, 7, 9)).shape == (1, 2, 7, 9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "name", ["monai.BasicUNet", pytest.param("smp.Unet", marks=pytest.mark.slow)]
)
def test_it_is_exported_in_evaluation_mode(name: str) -> None:
    network, x = build(name).eval(), example(name)
    assert torch.allclose(torch.export.export(network, (x,)).module()(x), network(x), atol=1e-5)


def test_the_same_seed_builds_the_same_weights() -> None:
    one, other = build("monai.UNet").state_dict(), build("monai.UNet").state_dict()
    assert all(torch.equal(value, other[key]) for key, value in one.items())


# Arguments


def test_a_mistyped_argument_is_refused_with_the_nearest() -> None:
    said = refusal("monai.UNet", chanels=[4, 8], strides=[2])
    assert "no argument 'chanels'. Did you mean 'channels'?" in said
    assert "adn_ordering" in said


def test_what_segmentation_models_would_swallow_is_refused() -> None:
    said = refusal("smp.Unet", encoder_name="resnet18", drop_path_rate=0.2)
    assert "no argument 'drop_path_rate'" in said
    assert "The encoder resnet18 has no arguments; those of timm (tu-...) do" in said


def test_arguments_of_an_encoder_of_timm_are_its_own() -> None:
    arguments = {"encoder_name": "tu-convnext_atto", "encoder_depth": 4}
    arguments["decoder_channels"] = [16, 8, 8, 8]
    check_foreign("smp.Unet", {**arguments, "drop_path_rate": 0.2})
    assert "drop_pth_rate" in refusal("smp.Unet", **arguments, drop_pth_rate=0.2)


@pytest.mark.parametrize(
    ("name", "arguments", "idle"),
    [
        ("monai.SegResNet", {"num_groups": 4}, "num_groups"),
        (
            "monai.DynUNet",
            {**SMALL["monai.DynUNet"], "deep_supervision": False, "deep_supr_num": 2},
            "deep_supr_num",
        ),
        ("monai.UNet", {"channels": [4, 8], "strides": [2], "adn_ordering": "NA"}, "adn_ordering"),
    ],
)
def test_an_argument_that_changes_nothing_is_refused(
    name: str, arguments: dict[str, Any], idle: str
) -> None:
    assert f"'{idle}' changes nothing beside the other arguments" in refusal(name, **arguments)


def test_an_argument_may_be_written_out_with_its_default() -> None:
    check_foreign("monai.SegResNet", {"num_groups": 8, "blocks_down": [1, 2, 2, 4]})


def test_an_argument_that_saves_memory_alone_is_allowed() -> None:
    pytest.importorskip("einops")
    check_foreign("monai.SwinUNETR", {**SMALL["monai.SwinUNETR"], "use_checkpoint": True})


@pytest.mark.parametrize(
    ("name", "argument", "why"),
    [
        ("monai.UNet", {"spatial_dims": 3}, "it is 2, the data are slices"),
        ("monai.UNet", {"out_channels": 3}, "network.head decide it"),
        ("smp.Unet", {"in_channels": 3}, "the data decide it"),
        ("smp.Unet", {"activation": "sigmoid"}, "returns logits"),
        ("smp.Unet", {"aux_params": {"classes": 2}}, "second output"),
        ("smp.Unet", {"encoder_name": "tu-resnet18", "pretrained_cfg": {}}, "of the encoder"),
        ("smp.Unet", {"encoder_name": "tu-resnet18", "checkpoint_path": "x"}, "of the encoder"),
    ],
)
def test_what_a_run_decides_is_not_given(name: str, argument: dict[str, Any], why: str) -> None:
    assert why in refusal(name, **argument)


def test_what_a_network_needs_is_named() -> None:
    assert "monai.UNet needs channels, strides" in refusal("monai.UNet")


def test_what_a_network_says_itself_is_passed_on() -> None:
    said = refusal("monai.UNet", channels=[4, 8], strides=[2], norm="BACH")
    assert "monai.UNet: By 'BACH', did you mean 'BATCH'?" in said
    said = refusal("smp.Unet", encoder_name="resnet18", encoder_depth=4)
    assert "Model depth is 4" in said


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("smp.FPN", {"encoder_name": "resnet18", "upsampling": 2}),
        ("smp.PSPNet", {"encoder_name": "resnet18", "encoder_depth": 2}),
        ("monai.SegResNet", {"use_conv_final": False}),
    ],
)
def test_logits_of_another_size_or_number_are_refused(name: str, arguments: dict[str, Any]) -> None:
    said = refusal(name, **arguments)
    assert "for images of 256x256; 2 of 256x256 are needed for two classes" in said
    assert "'upsampling' or 'use_conv_final'" in said


def test_an_upsampling_that_fits_the_depth_is_taken() -> None:
    check_foreign("smp.PSPNet", {"encoder_name": "resnet18", "encoder_depth": 2, "upsampling": 4})


@pytest.mark.parametrize(
    "encoder", ["resnet81", "tu-hf-hub:timm/resnet18", "tu-local-dir:/tmp/x", "tu-nothing"]
)
def test_an_encoder_is_one_of_the_installed_packages(encoder: str) -> None:
    assert f"no encoder '{encoder}'" in refusal("smp.Unet", encoder_name=encoder)


def test_a_name_of_pretrained_weights_is_no_local_file() -> None:
    said = refusal("smp.Unet", encoder_name="resnet18", encoder_weights="imagenet")
    assert "expected null or a local file" in said
    assert "Nothing is downloaded" in said


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "einops", None)
    assert "pip install einops" in refusal("monai.UNETR", img_size=64)


# Sizes


def test_a_size_that_a_network_was_not_made_for_is_refused_with_the_right_one() -> None:
    name = "smp.Unet"
    network = build(name, encoder_name="tu-swin_tiny_patch4_window7_224", img_size=128)
    check_input_size(network, 1, (120, 128), 2)
    with pytest.raises(MedsegError, match=r"64x64 cannot .* takes 128x128 alone: set data.image"):
        check_input_size(network, 1, (64, 64), 2)


def test_windows_of_maxvit_decide_what_images_are_padded_to() -> None:
    arguments = {"embed_dim": [4, 8, 8, 8], "depths": [1, 1, 1, 1], "stem_width": 8}
    arguments |= {"encoder_name": "tu-maxvit_tiny_tf_224", "transformer_dim_head": 4}
    arguments |= {"decoder_channels": [8, 8, 8, 8, 8]}
    # The smallest map, a 32nd of the image, is cut into windows of a 32nd of `img_size`.
    for size, factor in ((64, 64), (96, 96)):
        network = build("smp.Unet", **arguments, img_size=size).eval()
        assert network.factor == factor
        x = torch.rand(1, 1, size + 6, 50)
        padded = torch.nn.functional.pad(x, (0, factor - 50, 0, factor - 6), mode="replicate")
        assert torch.equal(network(x), network.network(padded)[..., : size + 6, :50])
    check_foreign("smp.Unet", {**arguments, "img_size": 128})
    assert build("smp.Unet", **arguments).factor == 224


@pytest.mark.parametrize("encoder", ["tu-swin_tiny_patch4_window7_224", "tu-convnext_atto"])
def test_a_decoder_that_reads_a_map_that_its_encoder_lacks_is_refused(encoder: str) -> None:
    with pytest.raises(MedsegError) as error:
        build("smp.FPN", encoder_name=encoder, encoder_depth=4, drop_path_rate=0.0)
    assert str(error.value) == (
        f"network: smp.FPN: the encoder {encoder} has no map at half the size of the image, which "
        "this decoder reads with encoder_depth 4. Use encoder_depth 5, or another encoder."
    )


def test_a_size_that_is_too_small_is_refused_with_one_that_works() -> None:
    network = build("smp.PAN")
    with pytest.raises(MedsegError, match=r"40x40 .*too small. Use at least 144x144") as error:
        check_input_size(network, 1, (40, 40), 2)
    assert "data.batch_size 2" in str(error.value)


def test_a_pooled_map_of_a_single_image_cannot_be_normalized() -> None:
    network = build("smp.DeepLabV3")
    check_input_size(network, 1, (64, 64), 2)
    with pytest.raises(MedsegError, match="data.batch_size 1: only one value for each channel"):
        check_input_size(network, 1, (64, 64), 1)


# Nothing is downloaded


def test_building_never_reaches_for_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for encoder in ("resnet18", "tu-resnet18.a1_in1k", "mit_b0"):
        build("smp.Unet", encoder_name=encoder)


def test_the_hub_is_offline_while_a_network_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with offline():
        assert constants.HF_HUB_OFFLINE
        assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert not constants.HF_HUB_OFFLINE
    assert "HF_HUB_OFFLINE" not in os.environ

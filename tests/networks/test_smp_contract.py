"""Networks of segmentation-models-pytorch keep the contract of networks.

Logits and places are those of the versions in constraints.txt.
"""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from tests.networks.foreign_contract import ANY, ForeignContract
from tests.networks.small_foreign import SIZES

# Only one value gives logits of the size of the image; any other is refused.
TO_SIZE = {"upsampling"}


@pytest.mark.slow
class SmpContract(ForeignContract):
    """What most networks of segmentation-models-pytorch have in common."""

    factor = 32
    size = (45, 50)
    sizes = ANY


class TestSmpUnet(SmpContract):
    name = "smp.Unet"
    changes: ClassVar[dict[str, Any]] = {
        "encoder_name": "mobilenet_v2",
        "encoder_depth": {"encoder_depth": 4, "decoder_channels": [32, 16, 8, 8]},
        "decoder_use_norm": "identity",
        "decoder_channels": [64, 32, 16, 8, 8],
        "decoder_attention_type": "scse",
        "decoder_interpolation": "bilinear",
    }
    places: ClassVar[dict[str, int]] = {
        "input": 1,
        "after_norm": 19,
        "after_block": 14,
        "between_convs": 13,
        "residual": 8,
        "skip": 4,
        "head": 1,
    }
    golden = (0.22376, 0.90576, 1.45342, 0.17075, -0.06967)


class TestSmpUnetPlusPlus(SmpContract):
    name = "smp.UnetPlusPlus"
    changes = TestSmpUnet.changes
    places: ClassVar[dict[str, int]] = {
        "input": 1,
        "after_norm": 31,
        "after_block": 20,
        "between_convs": 19,
        "residual": 8,
        "skip": 10,
        "head": 1,
    }
    golden = (-0.3992, -0.54726, -0.44662, 0.78073, 0.01463)


class TestSmpFPN(SmpContract):
    name = "smp.FPN"
    idle: ClassVar[set[str]] = TO_SIZE | {"encoder_depth"}  # ConvNeXt has no map at half the size
    changes: ClassVar[dict[str, Any]] = {
        "encoder_name": "tu-convnext_femto",
        "decoder_pyramid_channels": 64,
        "decoder_segmentation_channels": 64,
        "decoder_merge_policy": "cat",
        "decoder_dropout": 0.5,
        "decoder_interpolation": "bilinear",
    }
    places: ClassVar[dict[str, int]] = {
        "input": 1,
        "between_convs": 12,
        "residual": 12,
        "after_block": 19,
        "skip": 3,
        "after_norm": 7,
        "head": 1,
    }
    golden = (0.54114, 1.63969, 1.77184, 0.27497, 0.2178)


class TestSmpMAnet(SmpContract):
    name = "smp.MAnet"
    changes: ClassVar[dict[str, Any]] = {
        "encoder_name": "mobilenet_v2",
        "encoder_depth": {"encoder_depth": 4, "decoder_channels": [16, 8, 8, 8]},
        "decoder_use_norm": "identity",
        "decoder_channels": [24, 8, 8, 8, 4],
        "decoder_pab_channels": 32,
        "decoder_interpolation": "bilinear",
    }
    places: ClassVar[dict[str, int]] = {
        "input": 1,
        "after_norm": 23,
        "between_convs": 16,
        "after_block": 12,
        "residual": 4,
        "skip": 4,
        "head": 1,
    }
    golden = (-0.00052, -0.09108, -0.24426, -0.10352, -0.86101)


class TestSmpLinknet(SmpContract):
    name = "smp.Linknet"
    changes: ClassVar[dict[str, Any]] = {
        "encoder_name": "mobilenet_v2",
        "encoder_depth": 4,
        "decoder_use_norm": "identity",
    }
    places: ClassVar[dict[str, int]] = {
        "input": 1,
        "after_norm": 24,
        "after_block": 19,
        "between_convs": 13,
        "residual": 8,
        "skip": 4,
        "head": 1,
    }
    golden = (0.7892, 0.97165, -0.0452, 1.17165, 1.89781)


class TestSmpPSPNet(SmpContract):
    name = "smp.PSPNet"
    factor = 8
    # The pyramid reads the third map of the encoder.
    unused = ("network.encoder.layer3.*", "network.encoder.layer4.*")
    idle = TO_SIZE
    changes: ClassVar[dict[str, Any]] = {
        "encoder_name": "mobilenet_v2",
        "encoder_depth": {"encoder_depth": 2, "upsampling": 4},
        "psp_out_channels": 64,
        "decoder_use_norm": "identity",
        "psp_dropout": 0.5,
    }
    places: ClassVar[dict[str, int]] = {
        "input": 1,
        "after_norm": 9,
        "after_block": 9,
        "between_convs": 4,
        "residual": 4,
        "skip": 3,
        "head": 1,
    }
    golden = (0.21334, 0.49299, 0.61371, -1.27138, -1.37024)


class TestSmpPAN(SmpContract):
    name = "smp.PAN"
    factor = 16
    size = (250, 255)
    sizes = ((129, 131), (160, 150))
    dynamic = False
    idle = TO_SIZE
    changes: ClassVar[dict[str, Any]] = {
        "encoder_name": "mobilenet_v2",
        "encoder_depth": 4,
        "encoder_output_stride": 32,
        "decoder_channels": 16,
        "decoder_interpolation": "nearest",
    }
    places: ClassVar[dict[str, int]] = {
        "input": 1,
        "after_norm": 15,
        "after_block": 12,
        "between_convs": 7,
        "residual": 4,
        "skip": 2,
        "head": 1,
    }
    golden = (-1.11409, 1.40097, 1.46337, -4.93018, -5.08471)


class TestSmpDeepLabV3(SmpContract):
    name = "smp.DeepLabV3"
    factor = 8
    idle = TO_SIZE
    changes: ClassVar[dict[str, Any]] = {
        "encoder_name": "mobilenet_v2",
        "encoder_depth": 4,
        "encoder_output_stride": 16,
        "decoder_channels": 16,
        "decoder_atrous_rates": [6, 12, 18],
        "decoder_aspp_separable": True,
        "decoder_aspp_dropout": 0.1,
    }
    places: ClassVar[dict[str, int]] = {
        "input": 1,
        "after_norm": 15,
        "after_block": 14,
        "between_convs": 9,
        "residual": 8,
        "head": 1,
    }
    golden = (-0.01202, 0.1983, 0.20587, -0.68578, -0.75839)


class TestSmpDeepLabV3Plus(SmpContract):
    name = "smp.DeepLabV3Plus"
    factor = 16
    size = (125, 126)
    idle = TO_SIZE
    changes: ClassVar[dict[str, Any]] = {
        "encoder_name": "mobilenet_v2",
        "encoder_depth": 4,
        "encoder_output_stride": 8,
        "decoder_channels": 16,
        "decoder_atrous_rates": [6, 12, 18],
        "decoder_aspp_separable": False,
        "decoder_aspp_dropout": 0.1,
    }
    places: ClassVar[dict[str, int]] = {
        "input": 1,
        "after_norm": 17,
        "after_block": 16,
        "between_convs": 9,
        "residual": 8,
        "skip": 1,
        "head": 1,
    }
    golden = (-0.15739, 0.04749, 0.05675, 0.02235, 0.01859)


class TestSmpUPerNet(SmpContract):
    name = "smp.UPerNet"
    size = SIZES[name]
    sizes = ((33, 40), (64, 64))
    dynamic = False
    idle = TO_SIZE
    changes: ClassVar[dict[str, Any]] = {
        "encoder_name": "resnet18",
        "encoder_depth": 4,
        "decoder_channels": 12,
        "decoder_use_norm": "identity",
    }
    places: ClassVar[dict[str, int]] = {
        "input": 1,
        "tokens": 4,
        "block_residual": 4,
        "attention": 4,
        "attention_head": 4,
        "residual": 8,
        "after_norm": 12,
        "after_block": 12,
        "skip": 3,
        "head": 1,
    }
    golden = (0.22802, 0.74926, 0.89024, 0.16724, 0.15746)


class TestSmpSegformer(SmpContract):
    name = "smp.Segformer"
    idle = TO_SIZE
    changes: ClassVar[dict[str, Any]] = {
        "encoder_name": "resnet18",
        "encoder_depth": 4,
        "decoder_segmentation_channels": 64,
    }
    places: ClassVar[dict[str, int]] = {
        "input": 1,
        "tokens": 1,
        "block_residual": 8,
        "attention": 8,
        "attention_head": 8,
        "residual": 8,
        "after_norm": 1,
        "after_block": 1,
        "head": 1,
    }
    golden = (-0.33783, 0.43099, 0.4523, -0.94307, -1.04989)


class TestSmpDPT(SmpContract):
    name = "smp.DPT"
    dynamic = False
    unused = ("network.encoder.model.norm.*", "network.encoder.model.head.*")
    changes: ClassVar[dict[str, Any]] = {
        "encoder_name": "tu-vit_small_patch16_224",
        "encoder_depth": {"encoder_depth": 3, "decoder_intermediate_channels": [8, 8, 8]},
        "encoder_output_indices": [1, 3, 5, 7],
        "decoder_readout": "ignore",
        "decoder_intermediate_channels": [8, 8, 8, 12],
        "decoder_fusion_channels": 8,
    }
    places: ClassVar[dict[str, int]] = {
        "input": 1,
        "tokens": 1,
        "attention": 12,
        "block_residual": 12,
        "attention_head": 12,
        "residual": 32,
        "between_convs": 12,
        "after_norm": 9,
        "after_block": 9,
        "skip": 1,
        "head": 1,
    }
    golden = (0.72916, 1.47841, 1.66831, 1.12635, 1.49337)

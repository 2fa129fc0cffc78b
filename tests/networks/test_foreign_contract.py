"""Networks of MONAI and segmentation-models-pytorch keep the contract of networks.

Logits and places are those of the versions in constraints.txt.
"""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from tests.networks.foreign_contract import ForeignContract
from tests.networks.small_foreign import SIZES

SMALLER = ((8, 8), (17, 33), (40, 45))
# Only one value gives logits of the size of the image; any other is refused.
TO_SIZE = {"upsampling"}
ANY = ((1, 1), (8, 8), (17, 33), (40, 45))


class TestMonaiUNet(ForeignContract):
    name = "monai.UNet"
    sizes = SMALLER
    changes: ClassVar[dict[str, Any]] = {
        "channels": [4, 8, 12],
        "strides": [2, 1],
        "kernel_size": 5,
        "up_kernel_size": 5,
        "num_res_units": 1,
        "act": "relu",
        "norm": "batch",
        "dropout": 0.5,
        "bias": False,
        "adn_ordering": "NA",
    }
    base: ClassVar[dict[str, Any]] = {"dropout": 0.2}
    places: ClassVar[dict[str, int]] = {
        "input": 1,
        "after_norm": 9,
        "between_convs": 4,
        "residual": 5,
        "after_block": 7,
        "head": 1,
    }
    golden = (-0.04469, -0.47505, -0.31892, 0.79366, -0.30124)


@pytest.mark.slow
class TestMonaiBasicUNet(ForeignContract):
    name = "monai.BasicUNet"
    factor = 16
    size = (30, 26)
    sizes = SMALLER[1:]
    broken = "isinstance"
    changes: ClassVar[dict[str, Any]] = {
        "features": [4, 4, 6, 6, 8, 6],
        "act": "relu",
        "norm": "batch",
        "bias": False,
        "dropout": 0.5,
        "upsample": "nontrainable",
    }
    places: ClassVar[dict[str, int]] = {
        "input": 1,
        "after_norm": 18,
        "between_convs": 9,
        "after_block": 9,
        "skip": 4,
        "head": 1,
    }
    golden = (-0.26711, -0.80191, -0.61609, 0.30951, 0.5519)


@pytest.mark.slow
class TestMonaiAttentionUnet(ForeignContract):
    name = "monai.AttentionUnet"
    factor = 8
    sizes = ANY
    changes: ClassVar[dict[str, Any]] = {
        "channels": [4, 8, 12],
        "strides": [2, 1],
        "kernel_size": 5,
        "up_kernel_size": 5,
        "dropout": 0.5,
    }
    places: ClassVar[dict[str, int]] = {
        "input": 1,
        "after_norm": 10,
        "between_convs": 3,
        "after_block": 7,
        "gate": 2,
        "skip": 2,
        "head": 1,
    }
    golden = (-0.10926, -0.31973, -0.20842, 0.06232, 0.09471)


class TestMonaiDynUNet(ForeignContract):
    name = "monai.DynUNet"
    arguments: ClassVar[dict[str, Any]] = {
        "kernel_size": [3, 3, 3, 3],
        "strides": [1, 2, 2, 2],
        "upsample_kernel_size": [2, 2, 2],
        "filters": [4, 6, 8, 8],
        "deep_supervision": True,
    }
    factor = 8
    size = (29, 26)
    sizes = SMALLER[1:]
    changes: ClassVar[dict[str, Any]] = {
        "kernel_size": [3, 5, 3, 3],
        "strides": {"strides": [1, 2, 2, 4], "upsample_kernel_size": [2, 2, 4]},
        "upsample_kernel_size": {"strides": [1, 2, 4, 2], "upsample_kernel_size": [2, 4, 2]},
        "filters": [4, 6, 8, 12],
        "dropout": 0.5,
        "norm_name": "batch",
        "act_name": "relu",
        "deep_supervision": False,
        "deep_supr_num": 2,
        "res_block": True,
        "trans_bias": True,
    }
    places: ClassVar[dict[str, int]] = {
        "input": 1,
        "after_norm": 14,
        "between_convs": 7,
        "after_block": 7,
        "skip": 3,
        "head": 1,
    }
    golden = (0.14401, 0.33267, 0.08758, 0.38981, -0.16378)


@pytest.mark.slow
class TestMonaiSegResNet(ForeignContract):
    name = "monai.SegResNet"
    factor = 2
    sizes = ANY
    # Names of the time before `norm`; without a last convolution there are no logits.
    idle: ClassVar[set[str]] = {"norm_name", "num_groups", "use_conv_final"}
    changes: ClassVar[dict[str, Any]] = {
        "init_filters": 16,
        "dropout_prob": 0.5,
        "act": "leakyrelu",
        "norm": "instance",
        "blocks_down": [1, 2],
        "blocks_up": [2],
        "upsample_mode": "deconv",
    }
    places: ClassVar[dict[str, int]] = {
        "input": 1,
        "after_norm": 7,
        "between_convs": 5,
        "residual": 3,
        "after_block": 3,
        "head": 1,
    }
    golden = (0.04636, 0.33852, 0.07745, 0.71857, 0.21644)


@pytest.mark.slow
class TestMonaiUNETR(ForeignContract):
    name = "monai.UNETR"
    factor = 16
    size = (40, 45)
    sizes = ((33, 48), (41, 46))
    dynamic = False
    unused = ("network.vit.blocks.*.norm_cross_attn.*",)
    idle: ClassVar[set[str]] = {"img_size", "save_attn"}  # the one size; nothing that is seen
    changes: ClassVar[dict[str, Any]] = {
        "feature_size": 6,
        "hidden_size": 24,
        "mlp_dim": 24,
        "num_heads": 4,
        "proj_type": "perceptron",
        "norm_name": "batch",
        "conv_block": False,
        "res_block": False,
        "dropout_rate": 0.5,
        "qkv_bias": True,
    }
    places: ClassVar[dict[str, int]] = {
        "input": 1,
        "tokens": 1,
        "attention": 12,
        "block_residual": 12,
        "attention_head": 12,
        "residual": 32,
        "after_norm": 8,
        "between_convs": 8,
        "after_block": 8,
        "skip": 4,
        "head": 1,
    }
    golden = (0.1655, 0.89082, 0.64878, 0.52492, -0.16713)


@pytest.mark.slow
class TestMonaiSwinUNETR(ForeignContract):
    name = "monai.SwinUNETR"
    factor = 32
    size = (45, 50)
    sizes = SMALLER[1:]
    broken = "[Dd]ata-dependent"
    dynamic = False
    # What counts only beside `use_hyena`, which needs another package.
    idle: ClassVar[set[str]] = {
        "use_hyena",
        "hyena_stages",
        "hyena_kernel_size",
        "hyena_kernel_mlp_dim",
        "hyena_kernel_layers",
        "hyena_mask_max_attenuation",
        "hyena_fft_padding",
        "hyena_grid_type",
        "hyena_use_chunked_fft",
        "hyena_use_fft_short_conv",
        "hyena_omega_0",
        "hyena_l_cache",
        "hyena_short_conv_fft_chunks",
        "patch_size",  # its decoder fits to 2 alone
        "downsample",  # both kinds are one in 2-D
        "norm_layer",  # a class, which no configuration can give
    }
    changes: ClassVar[dict[str, Any]] = {
        "depths": [1, 2, 1, 1],
        "num_heads": [1, 2, 1, 1],
        "window_size": 3,
        "qkv_bias": False,
        "mlp_ratio": 2.0,
        "feature_size": 24,
        "norm_name": "batch",
        "drop_rate": 0.5,
        "attn_drop_rate": 0.5,
        "dropout_path_rate": 0.5,
        "normalize": False,
        "patch_norm": True,
        "use_v2": True,
    }
    places: ClassVar[dict[str, int]] = {
        "input": 1,
        "tokens": 4,
        "block_residual": 4,
        "attention": 4,
        "attention_head": 4,
        "residual": 14,
        "after_norm": 10,
        "between_convs": 10,
        "after_block": 10,
        "skip": 5,
        "head": 1,
    }
    golden = (-0.03643, 0.13321, -0.29371, -0.01023, 0.50832)


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
    dark = ("network.decoder.blocks.2.SE_hl.*",)
    changes: ClassVar[dict[str, Any]] = {
        "encoder_name": "resnet18",
        "encoder_depth": {"encoder_depth": 4, "decoder_channels": [32, 16, 8, 8]},
        "decoder_use_norm": "identity",
        "decoder_channels": [64, 32, 16, 8, 8],
        "decoder_pab_channels": 32,
        "decoder_interpolation": "bilinear",
    }
    places: ClassVar[dict[str, int]] = {
        "input": 1,
        "after_norm": 53,
        "between_convs": 49,
        "after_block": 27,
        "residual": 10,
        "skip": 4,
        "head": 1,
    }
    golden = (-0.15195, -0.53481, -1.14593, 0.15415, -0.48008)


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
    dark = ("network.decoder.fpa.down3.2.conv.bias",)
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
        "after_norm": 19,
        "after_block": 16,
        "between_convs": 11,
        "residual": 8,
        "skip": 2,
        "head": 1,
    }
    golden = (-0.45351, 1.39667, 1.45937, -1.93753, -1.88429)


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
    sizes = ((129, 131), (160, 160))
    dynamic = False
    idle = TO_SIZE
    changes: ClassVar[dict[str, Any]] = {
        "encoder_name": "tu-swin_small_patch4_window7_224",
        "encoder_depth": 4,
        "decoder_channels": 64,
        "decoder_use_norm": "identity",
    }
    places: ClassVar[dict[str, int]] = {
        "input": 1,
        "tokens": 4,
        "block_residual": 12,
        "attention": 12,
        "attention_head": 12,
        "residual": 24,
        "after_norm": 12,
        "after_block": 12,
        "skip": 3,
        "head": 1,
    }
    golden = (0.03417, 0.22133, 0.15568, -0.42954, -0.38932)


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

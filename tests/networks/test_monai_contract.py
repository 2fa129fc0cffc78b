"""Networks of MONAI keep the contract of networks.

Logits and places are those of the versions in constraints.txt.
"""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from tests.networks.foreign_contract import ANY, ForeignContract


class TestMonaiUNet(ForeignContract):
    name = "monai.UNet"
    sizes = ANY
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
    sizes = ANY
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
    sizes = ANY
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
    sizes = ANY
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

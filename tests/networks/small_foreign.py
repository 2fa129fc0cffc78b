"""Small foreign networks for tests: arguments, and sizes that are no multiple."""

from __future__ import annotations

from typing import Any

# As deep as it must be to halve five times, and narrow: wide decoders multiply its channels.
# Its branches would begin with 0, where no gradient gets into them.
RESNET = {
    "encoder_name": "tu-resnet18",
    "layers": [1, 1, 1, 1],
    "channels": [8, 8, 12, 16],
    "zero_init_last": False,
}

SMALL: dict[str, dict[str, Any]] = {
    "monai.UNet": {"channels": [4, 8, 8], "strides": [2, 2], "num_res_units": 2},
    "monai.BasicUNet": {"features": [4, 4, 6, 6, 8, 4]},
    "monai.AttentionUnet": {"channels": [4, 8, 8], "strides": [2, [2, 4]]},
    "monai.DynUNet": {
        "kernel_size": [3, 3, 3],
        "strides": [1, 2, 2],
        "upsample_kernel_size": [2, 2],
        "filters": [4, 6, 8],
        "deep_supervision": True,
    },
    "monai.SegResNet": {"blocks_down": [1, 1], "blocks_up": [1]},
    "monai.UNETR": {
        "img_size": 48,
        "feature_size": 4,
        "hidden_size": 16,
        "mlp_dim": 16,
        "num_heads": 2,
    },
    "monai.SwinUNETR": {"feature_size": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]},
    "smp.Unet": {"encoder_name": "resnet18"},
    "smp.UnetPlusPlus": {"encoder_name": "resnet18"},
    "smp.FPN": {"encoder_name": "tu-convnext_atto", "drop_path_rate": 0.1},
    # Wide enough that a gate of a 16th of the channels lets something through.
    "smp.MAnet": {
        **RESNET,
        "channels": [32, 64, 64, 96],
        "decoder_channels": [96, 64, 48, 16, 8],
    },
    "smp.Linknet": {"encoder_name": "resnet18"},
    "smp.PSPNet": {"encoder_name": "resnet18", "psp_out_channels": 32},
    "smp.PAN": {**RESNET, "decoder_channels": 8},
    "smp.DeepLabV3": {"encoder_name": "resnet18", "decoder_channels": 32},
    "smp.DeepLabV3Plus": {"encoder_name": "resnet18"},
    "smp.UPerNet": {
        "encoder_name": "tu-swin_tiny_patch4_window7_224",
        "img_size": 64,
        "window_size": 2,
        "embed_dim": 8,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 1, 2, 2],
        "decoder_channels": 8,
    },
    "smp.Segformer": {"encoder_name": "mit_b0"},
    "smp.DPT": {
        "encoder_name": "tu-vit_tiny_patch16_224",
        "decoder_fusion_channels": 16,
        "decoder_intermediate_channels": [8, 8, 8, 8],
        "dynamic_img_size": True,
    },
}
# Rows and columns of images, where not any will do.
SIZES = {"monai.UNETR": (40, 45), "smp.PAN": (130, 140), "smp.UPerNet": (60, 64)}

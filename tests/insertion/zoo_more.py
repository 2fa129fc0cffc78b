"""More networks of other packages; see `zoo`."""

from __future__ import annotations

from tests.insertion.zoo import (
    BASIC,
    RESNET,
    SMP_DECODER,
    U5,
    U5_DECODER,
    Case,
    monai,
    smp,
    timm,
    torchvision,
)

SLOW = {
    "BasicUNet-3d": Case(
        monai("BasicUNet", 3, 1, 2, **BASIC),
        (1, 32, 32, 32),
        {"between_convs": 9, "after_norm": 18, "after_block": 9, "skip": 4, "head": 1},
        {**U5, **U5_DECODER},
    ),
    # A 1x1 convolution and an interpolation are one up-sampling.
    "BasicUNet-interpolated": Case(
        monai("BasicUNet", 2, 1, 2, upsample="nontrainable", **BASIC),
        (1, 32, 32),
        {"between_convs": 9, "after_norm": 18, "after_block": 9, "skip": 4, "head": 1},
        {**U5, **U5_DECODER},
    ),
    "BasicUNetPlusPlus": Case(
        monai("BasicUNetPlusPlus", 2, 1, 2, **BASIC),
        (1, 32, 32),
        {"between_convs": 15, "after_norm": 30, "after_block": 15, "skip": 10, "head": 1},
        {**U5, "decoder.0": 4, "decoder.1": 3, "decoder.2": 2, "decoder.3": 1},
    ),
    # Normalization and activation come first: 12 blocks of two convolutions, and 4 blocks whose
    # first convolution follows a bare one (the first of all, and three of stride 2).
    "SegResNet": Case(
        monai("SegResNet", 2, init_filters=8),
        (1, 32, 32),
        {"between_convs": 16, "after_norm": 25, "after_block": 12, "residual": 12, "head": 1},
        {
            "encoder.0": 2,
            "encoder.1": 3,
            "encoder.2": 3,
            "bottleneck": 5,
            "decoder.0": 1,
            "decoder.1": 1,
            "decoder.2": 1,
        },
    ),
    # Five blocks on the skips, one of them without enlargement; four in the decoder. Twelve blocks
    # of the transformer, of two residual branches.
    "UNETR": Case(
        monai(
            "UNETR",
            1,
            2,
            (32, 32),
            feature_size=4,
            hidden_size=16,
            mlp_dim=32,
            num_heads=2,
            spatial_dims=2,
        ),
        (1, 32, 32),
        {
            "between_convs": 8,
            "after_norm": 8,
            "after_block": 8,
            "residual": 8 + 24,
            "skip": 4,
            "head": 1,
            "attention": 12,
            "attention_head": 12,
        },
        {"encoder.0": 1, "decoder.0": 1, "decoder.1": 2, "decoder.2": 3, "decoder.3": 1},
        "einops",
    ),
    # The four blocks of the transformer have one module for the ends of both residual branches.
    "SwinUNETR": Case(
        monai(
            "SwinUNETR",
            1,
            2,
            feature_size=12,
            spatial_dims=2,
            depths=(1, 1, 1, 1),
            num_heads=(1, 1, 1, 1),
        ),
        (1, 64, 64),
        {
            "between_convs": 10,
            "after_norm": 10,
            "after_block": 10,
            "residual": 10 + 4,
            "skip": 5,
            "head": 1,
            "attention": 4,
            "attention_head": 4,
        },
        {**U5, **SMP_DECODER},
        "einops",
    ),
    "smp-UnetPlusPlus": Case(
        smp("UnetPlusPlus"),
        (1, 64, 64),
        {
            "between_convs": 19,
            "after_norm": 31,
            "after_block": 20,
            "residual": 8,
            "skip": 10,
            "head": 1,
        },
        {**RESNET, "decoder.4": 1, "decoder.3": 2, "decoder.2": 3, "decoder.1": 4, "decoder.0": 1},
        "segmentation_models_pytorch",
    ),
    # The decoder has seven convolutions, none directly behind another.
    "smp-FPN": Case(
        smp("FPN"),
        (1, 64, 64),
        {
            "between_convs": 8,
            "after_norm": 16,
            "after_block": 16,
            "residual": 8,
            "skip": 3,
            "head": 1,
        },
        RESNET,
        "segmentation_models_pytorch",
    ),
    # Output stride 16: two stages at the bottom. One pair in the decoder: the projection of the
    # pyramid, and the separable convolution behind it.
    "smp-DeepLabV3Plus": Case(
        smp("DeepLabV3Plus"),
        (1, 64, 64),
        {
            "between_convs": 9,
            "after_norm": 17,
            "after_block": 16,
            "residual": 8,
            "skip": 1,
            "head": 1,
        },
        {"encoder.2": 2, "encoder.3": 2, "bottleneck": 5},
        "segmentation_models_pytorch",
    ),
    # 16 blocks, each with a place before its projection; 15 expand first; the stem.
    "smp-Unet-efficientnet": Case(
        smp("Unet", "efficientnet-b0"),
        (1, 64, 64),
        {
            "between_convs": 37,
            "after_norm": 42,
            "after_block": 21,
            "residual": 9,
            "skip": 4,
            "head": 1,
        },
        {
            "encoder.1": 3,
            "encoder.2": 4,
            "encoder.3": 4,
            "encoder.4": 12,
            "bottleneck": 9,
            **SMP_DECODER,
        },
        "segmentation_models_pytorch",
    ),
    # Stages of 2, 2 and 6 blocks, whose two 1x1 convolutions have an activation between.
    "smp-Unet-convnext": Case(
        smp("Unet", "tu-convnext_atto", encoder_depth=4, decoder_channels=(32, 16, 16, 8)),
        (1, 64, 64),
        {
            "between_convs": 14,
            "after_norm": 8,
            "after_block": 14,
            "residual": 10,
            "skip": 2,
            "head": 1,
        },
        {
            "encoder.2": 2,
            "encoder.3": 2,
            "bottleneck": 6,
            **{f"decoder.{i}": 1 for i in range(4)},
        },
        "segmentation_models_pytorch",
    ),
    # Each block of the decoder gets squeeze-and-excitation of pixels, a gate: 5 behind it, 4
    # before it, where there is a skip connection.
    "smp-Unet-attention": Case(
        smp("Unet", decoder_attention_type="scse"),
        (1, 64, 64),
        {
            "between_convs": 13,
            "after_norm": 19,
            "after_block": 14,
            "residual": 8,
            "skip": 4,
            "gate": 9,
            "head": 1,
        },
        {**RESNET, **SMP_DECODER},
        "segmentation_models_pytorch",
    ),
    "timm-resnet18": Case(
        timm("resnet18"),
        (1, 64, 64),
        {"between_convs": 8, "after_norm": 9, "after_block": 9, "residual": 8},
        RESNET,
        "timm",
    ),
    # Two places in each of 16 blocks, the strided convolutions inside included.
    "timm-resnet50": Case(
        timm("resnet50"),
        (1, 64, 64),
        {"between_convs": 32, "after_norm": 33, "after_block": 17, "residual": 16},
        {"encoder.2": 7, "encoder.3": 8, "encoder.4": 12, "bottleneck": 5},
        "timm",
    ),
    "timm-convnext-features": Case(
        timm("convnext_atto", features_only=True),
        (1, 64, 64),
        {"between_convs": 12, "after_block": 12, "residual": 12},
        {"encoder.2": 2, "encoder.3": 2, "encoder.4": 6, "bottleneck": 2},
        "timm",
    ),
    # Normalization and activation are one module.
    "timm-efficientnet": Case(
        timm("efficientnet_b0"),
        (1, 64, 64),
        {"between_convs": 32, "after_block": 15, "residual": 9},
        {"encoder.1": 3, "encoder.2": 4, "encoder.3": 4, "encoder.4": 12, "bottleneck": 9},
        "timm",
    ),
    "timm-vit": Case(
        timm("vit_tiny_patch16_224", img_size=64),
        (1, 64, 64),
        {"residual": 24, "attention": 12, "attention_head": 12},
        {},
        "timm",
    ),
    "torchvision-resnet18": Case(
        torchvision("resnet18"),
        (3, 64, 64),
        {"between_convs": 8, "after_norm": 9, "after_block": 9, "residual": 8},
        RESNET,
        "torchvision",
    ),
    # Its blocks have one convolution and two linear layers on channels-last maps.
    "torchvision-convnext": Case(
        torchvision("convnext_tiny"),
        (3, 64, 64),
        {"after_block": 18, "residual": 18},
        {},
        "torchvision",
    ),
    # 58 layers: normalization, activation, convolution, twice.
    "torchvision-densenet121": Case(
        torchvision("densenet121"),
        (3, 64, 64),
        {"between_convs": 58, "after_norm": 121, "after_block": 59},
        {"encoder.2": 6, "encoder.3": 12, "encoder.4": 24, "bottleneck": 16},
        "torchvision",
    ),
    "torchvision-vgg11": Case(
        torchvision("vgg11_bn"),
        (3, 64, 64),
        {"between_convs": 3, "after_norm": 8, "after_block": 5},
        {"encoder.2": 1, "encoder.3": 1, "encoder.4": 1},
        "torchvision",
    ),
}

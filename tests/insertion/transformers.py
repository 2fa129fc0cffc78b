"""Transformers of MONAI, timm and segmentation-models-pytorch, small, for the tests of tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tests.insertion.zoo import Case, monai, smp, timm

UNETR = {"feature_size": 4, "hidden_size": 24, "mlp_dim": 32, "num_heads": 3, "spatial_dims": 2}
VIT = {"embed_dim": 24, "num_heads": 3, "depth": 3}
SWIN = {"feature_size": 12, "spatial_dims": 2, "depths": (2, 2, 1, 1), "num_heads": (2, 3, 3, 3)}
TIMM_SWIN = {"embed_dim": 12, "depths": (2, 2), "num_heads": (2, 3), "window_size": 4}
DPT = {"decoder_fusion_channels": 16, "decoder_intermediate_channels": (8, 8, 8, 8)}


@dataclass
class Transformer(Case):
    """A transformer.

    Attributes:
        heads: of its attentions, in order.
        fused: whether torch's fused function computes them.
        global_attention: whether each token attends to all.
    """

    heads: list[int] = field(default_factory=list)
    fused: bool = False
    global_attention: bool = True

    def network(self) -> nn.Module:
        network = super().network()
        for module in network.modules():  # weights that are 0 at first would hide differences
            for name, weight in module.named_parameters(recurse=False):
                if name in ("cls_token", "position_embeddings", "relative_position_bias_table"):
                    nn.init.normal_(weight, std=0.02)
        return network


def unfused(make: Any) -> Any:
    """Build a network of timm whose attentions compute their weights."""

    def built() -> nn.Module:
        network = make()
        for module in network.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        return network

    return built


TIMM_VIT = timm("vit_tiny_patch16_224", img_size=64, num_classes=4, **VIT)

TRANSFORMERS = {
    "UNETR": Transformer(
        monai("UNETR", 1, 2, (48, 32), **UNETR), (1, 48, 32), {}, needs="einops", heads=[3] * 12
    ),
    "ViT": Transformer(
        monai("ViT", 1, (48, 48), (16, 16), 24, 32, 3, 3, spatial_dims=2, classification=True),
        (1, 48, 48),
        {},
        needs="einops",
        heads=[3] * 3,
    ),
    "SwinUNETR": Transformer(
        monai("SwinUNETR", 1, 2, **SWIN),
        (1, 64, 96),
        {},
        needs="einops",
        heads=[2, 2, 3, 3, 3, 3],
        global_attention=False,
    ),
    "timm-vit-fused": Transformer(
        TIMM_VIT, (1, 64, 64), {}, needs="timm", heads=[3] * 3, fused=True
    ),
    "timm-vit": Transformer(unfused(TIMM_VIT), (1, 64, 64), {}, needs="timm", heads=[3] * 3),
    "timm-swin": Transformer(
        timm(
            "swin_tiny_patch4_window7_224",
            img_size=40,
            num_classes=4,
            drop_path_rate=0.0,
            **TIMM_SWIN,
        ),
        (1, 40, 40),
        {},
        needs="timm",
        heads=[2, 2, 3, 3],
        global_attention=False,
    ),
    "DPT": Transformer(
        smp("DPT", "tu-vit_tiny_patch16_224", dynamic_img_size=True, **DPT),
        (1, 64, 64),
        {},
        needs="segmentation_models_pytorch",
        heads=[3] * 12,
        fused=True,
    ),
    "Segformer": Transformer(
        smp("Segformer", "mit_b0", decoder_segmentation_channels=16),
        (1, 64, 96),
        {},
        needs="segmentation_models_pytorch",
        heads=[1, 1, 2, 2, 5, 5, 8, 8],
        global_attention=False,
    ),
}


def outputs(network: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Return every tensor that a network gives."""
    found = torch.utils._pytree.tree_leaves(network(x))
    return [one for one in found if isinstance(one, torch.Tensor)]


def drawn(network: nn.Module, x: torch.Tensor, seed: int) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return outputs(network, x)


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

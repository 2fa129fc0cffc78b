"""Transformers of MONAI, timm and segmentation-models-pytorch, small, for the tests of tokens."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from medseg_reg.insertion import find_places, insert
from medseg_reg.regularizers import Regularizer
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


METHODS = {
    "drop_key": "attention",
    "drop_head": "attention_head",
    "drop_path": "residual",
    "guided_key_dropout": "attention",
    "guided_residual_dropout": "block_residual",
}
# Blocks run on fewer tokens.
SEQUENCES = ("patch_dropout", "token_merging")

TIMM_VIT = timm("vit_tiny_patch16_224", img_size=64, num_classes=4, **VIT)

# Of a ViT as narrow as the others, of which the depth is given.
SMP_DPT = smp(
    "DPT", "tu-vit_tiny_patch16_224", dynamic_img_size=True, embed_dim=24, num_heads=3, **DPT
)

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
        SMP_DPT,
        (1, 64, 64),
        {},
        needs="segmentation_models_pytorch",
        heads=[3] * 12,
        fused=True,
    ),
    "DPT-unfused": Transformer(
        unfused(SMP_DPT),
        (1, 64, 64),
        {},
        needs="segmentation_models_pytorch",
        heads=[3] * 12,
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


def unfit(case: Transformer, name: str) -> str:
    """Why a method has no place in a network; that it says so itself is tested elsewhere."""
    guided = name.startswith("guided")
    if guided and case.fused:
        return "the attention is fused"
    if name in ("guided_residual_dropout", *SEQUENCES) and not case.global_attention:
        return "no attention over all tokens"
    if case is TRANSFORMERS["DPT-unfused"] and not guided:
        return "as in DPT"
    return ""


def suits(case: Transformer, name: str) -> None:
    """Skips a method that a network has no place for."""
    if why := unfit(case, name):
        pytest.skip(why)


def filled(
    case: Transformer, name: str, p: float = 0.5, **more: Any
) -> tuple[nn.Module, nn.Module]:
    """A network with layers, and the plain one."""
    suits(case, name)
    network = case.network()
    plain = copy.deepcopy(network)
    insert(network, name, METHODS.get(name, "tokens"), example=case.example(), p=p, **more)
    return network, plain


def blocks(network: nn.Module, x: torch.Tensor) -> list[str]:
    """The paths of the blocks around the attentions."""
    places = [one for one in find_places(network, x) if one.kind == "tokens"]
    return [path for place in places for path in place.chain]


def shapes(network: nn.Module, x: torch.Tensor, inside: Collection[str] = ()) -> dict[str, Any]:
    """The shapes of what each module gives in a pass, without layers and what is inside of some."""
    seen: dict[str, list[torch.Size]] = {}

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found = torch.utils._pytree.tree_leaves(output)
            seen.setdefault(path, []).extend(y.shape for y in found if hasattr(y, "shape"))

        return hook

    handles = [
        module.register_forward_hook(note(path))
        for path, module in network.named_modules()
        if not isinstance(module, Regularizer)
        and not any(path.startswith(f"{one}.") for one in inside)
    ]
    network(x)
    for handle in handles:
        handle.remove()
    return seen


class Recomputed(nn.Module):
    """A module whose activations are computed again on the way back."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self.part, *args, use_reentrant=False, **kwargs)


def recompute(network: nn.Module, paths: Collection[str]) -> None:
    """Let modules of a network compute their activations again."""
    for path in paths:
        parent, _, child = path.rpartition(".")
        network.get_submodule(parent)._modules[child] = Recomputed(network.get_submodule(path))

"""Vision transformers of timm that say which classes a slice shows; DeiT's distillation token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from medseg_reg.errors import MedsegError, nearest

# Said by the data or by the run; `pretrained` and its kin would download.
TAKEN = (
    *("num_classes", "in_chans", "img_size", "features_only", "cache_dir"),
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path"),
)
_MODULES = ("vision_transformer", "deit")


def check_classifier(name: str, arguments: dict[str, Any]) -> None:
    """Refuse a name that is no vision transformer of timm, and arguments that are not free.

    Raises:
        ValueError: names what is wrong, and a name near it.
    """
    import timm

    known = [model for module in _MODULES for model in timm.list_models(module=module)]
    if name.partition(".")[0] not in known:
        raise ValueError(
            f"timm has no vision transformer {name!r}.{nearest(name, known)} One is "
            "'deit_tiny_patch16_224', and 'deit_tiny_distilled_patch16_224' with a distillation "
            "token"
        )
    if odd := sorted(set(arguments) & set(TAKEN)):
        raise ValueError(
            f"{', '.join(odd)}: is said by the data or the run. Weights come from a local file, "
            "`pretrained`; the size from data.image.size"
        )


def build_classifier(
    name: str, channels: int, classes: int, size: Sequence[int], **arguments: Any
) -> Any:
    """Build a vision transformer of timm with one logit for each class, and new weights.

    One with a distillation token, a second learned token with positions and a head of its own,
    returns the logits of both heads in training, (class token's, distillation token's), and their
    mean in evaluation.

    Args:
        name: in timm, such as `deit_tiny_distilled_patch16_224`; nothing is downloaded.
        channels: of the images.
        classes: logits.
        size: rows and columns of the images, multiples of those of a patch.
        arguments: timm's own, such as `drop_path_rate`, `depth`, `embed_dim`, `num_heads`.

    Returns:
        timm's VisionTransformer or VisionTransformerDistilled, with its names of the weights.

    Raises:
        MedsegError: there is no such transformer, or an argument or the size does not fit.

    Paper:
        H. Touvron et al., "Training data-efficient image transformers & distillation through
        attention" (DeiT), ICML 2021, arXiv:2012.12877.

    >>> import torch
    >>> network = build_classifier("deit_tiny_distilled_patch16_224", 1, 2, (32, 48), depth=1)
    >>> logits, taught = network(torch.rand(3, 1, 32, 48))
    >>> logits.shape, taught.shape, network.eval()(torch.rand(3, 1, 32, 48)).shape
    (torch.Size([3, 2]), torch.Size([3, 2]), torch.Size([3, 2]))
    """
    import timm
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    try:
        check_classifier(name, arguments)
        network: Any = timm.create_model(
            name,
            pretrained=False,
            num_classes=classes,
            in_chans=channels,
            img_size=tuple(size),
            **arguments,
        )
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        text = " ".join(str(error).split())[:300].rstrip(".")
        raise MedsegError(f"network: {name}: {text}.") from None
    if type(network) not in (VisionTransformer, VisionTransformerDistilled):
        raise MedsegError(
            f"network: {name} is a {type(network).__name__}, no plain vision transformer. Use one "
            "such as deit_tiny_patch16_224."
        )
    patch = network.patch_embed.patch_size
    if any(side % one for side, one in zip(size, patch, strict=True)):
        near = [max(1, round(side / one)) * one for side, one in zip(size, patch, strict=True)]
        raise MedsegError(
            f"network: {name} divides an image into patches of {patch[0]}x{patch[1]}, which does "
            f"not go into {size[0]}x{size[1]}. Set data.image.size={near}."
        )
    if has_distillation_token(network):
        network.set_distilled_training(True)
    return network


def has_distillation_token(network: Any) -> bool:
    """Whether a classifier has a second learned token with a head of its own."""
    return hasattr(network, "dist_token")


def both_logits(output: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the logits for the labels, and those for the teacher: the same without a token."""
    return (output, output) if isinstance(output, Tensor) else output

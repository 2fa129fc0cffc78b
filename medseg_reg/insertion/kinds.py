"""What a module or a function does to a map, told by its class or its name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import activation, batchnorm, conv, dropout, padding, pooling

from medseg_reg.regularizers import Regularizer

CONV, LINEAR, NORM, NORM_ACT, ACT, DROPOUT = "conv", "linear", "norm", "norm_act", "act", "dropout"
POOL, UP, PAD, CROP, IDENTITY, POINTWISE = "pool", "up", "pad", "crop", "identity", "pointwise"
CAT, ADD, MUL, REDUCE, LAYOUT, OTHER = "cat", "add", "mul", "reduce", "layout", "other"
ENTER, EXIT, INPUT = "enter", "exit", "input"
FUSED_ATTENTION = "scaled_dot_product_attention"

# These keep the map: whatever follows a convolution through them is still that convolution's map.
TRANSPARENT = {NORM, NORM_ACT, ACT, DROPOUT, PAD, CROP, IDENTITY, POINTWISE}

_ACTIVATIONS = tuple(
    getattr(activation, name)
    for name in activation.__all__
    if name not in ("MultiheadAttention", "GLU")
)
_POOLS = tuple(
    getattr(pooling, name) for name in pooling.__all__ if not name.startswith("MaxUnpool")
)
_PADS = tuple(getattr(padding, name) for name in padding.__all__)
# Subclasses count as what they derive from, like timm's BatchNormAct2d or Conv2dSame.
_MODULES: tuple[tuple[str, tuple[type[nn.Module], ...]], ...] = (
    (CONV, (conv._ConvNd,)),
    (LINEAR, (nn.Linear, nn.Bilinear)),
    (NORM, (batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, nn.RMSNorm)),
    (DROPOUT, (dropout._DropoutNd,)),
    (POOL, _POOLS),
    (UP, (nn.Upsample, nn.PixelShuffle)),
    (PAD, _PADS),
    (IDENTITY, (nn.Identity,)),
    (ACT, _ACTIVATIONS),
)

_FUNCTIONS = (
    (CONV, r"conv(_transpose)?[123]d|convolution"),
    (LINEAR, r"linear|matmul|mm|bmm|einsum|baddbmm|addmm|scaled_dot_product_attention"),
    (NORM, r"(batch|instance|group|layer|rms|local_response)_norm"),
    (
        ACT,
        r"(leaky_|r|p)?relu6?|[gsc]?elu|silu|mish|(log|hard)?_?sigmoid|(hard)?tanh|softplus|"
        r"softsign|hardswish|(hard|soft)shrink|threshold|(log_)?softmax|clamp(_min|_max)?",
    ),
    (DROPOUT, r"(feature_)?(alpha_)?dropout[123]?d?"),
    (POOL, r"(adaptive_)?(max|avg|lp)_pool[123]d(_with_indices)?|fractional_max_pool[23]d"),
    (UP, r"interpolate|upsample(_nearest|_bilinear)?|pixel_shuffle"),
    (PAD, r"pad"),
    (CAT, r"cat|concat|concatenate|stack|hstack|dstack"),
    (ADD, r"i?add|radd|sub|isub|rsub"),
    (MUL, r"i?mul|rmul|multiply"),
    (REDUCE, r"mean|sum|amax|amin|max|min|std|var|var_mean|logsumexp"),
    (LAYOUT, r"permute|transpose|movedim|moveaxis|swapaxes|swapdims"),
    (IDENTITY, r"contiguous|clone|to|float|half|double|bfloat16|type|type_as|detach|view_as|alias"),
    (POINTWISE, r"i?div|rdiv|rtruediv|truediv|i?pow|sqrt|rsqrt|exp|log|neg|abs|square|erf|where"),
)
_FUNCTION_KINDS = tuple((kind, re.compile(pattern)) for kind, pattern in _FUNCTIONS)


def module_kind(module: nn.Module) -> str | None:
    """Return the kind of a module that is followed as a whole; None if one looks inside.

    A class of this package may say it by its attribute `acts_as`.
    """
    if isinstance(kind := getattr(type(module), "acts_as", None), str):
        return kind
    for kind, classes in _MODULES:
        if isinstance(module, classes):
            if kind == NORM and any(module_kind(child) == ACT for child in module.children()):
                return NORM_ACT
            return kind
    return None


def own_drop_path(module: nn.Module | None) -> str:
    """Say so where a network drops what goes through a module itself; empty if it does not.

    Timm, MONAI and segmentation-models-pytorch call the layer DropPath, torchvision
    StochasticDepth.
    """
    if module is None or not _path_rate(module):
        return ""
    name = type(module).__name__
    return f"the network drops these branches by a {name} of its own; both rates act"


def own_drop_paths(network: nn.Module) -> str:
    """Say how a network drops residual branches itself, wherever; empty if it does not."""
    found = [module for module in network.modules() if _path_rate(module)]
    if not found:
        return ""
    name, most = type(found[0]).__name__, max(map(_path_rate, found))
    return (
        f"it drops residual branches by itself in training ({len(found)} {name} at rates up to "
        f"{most:.3g}), whatever regularization has"
    )


def own_patch_dropout(network: nn.Module) -> str:
    """Say so where a network leaves out patches itself in training; empty if it does not.

    Timm calls the layers PatchDropout and PatchDropoutWithIndices. What is left is put together to
    a map by those who read it, as if nothing were missing.
    """
    for path, module in network.named_modules():
        named = type(module).__name__.startswith("PatchDropout")
        rate = float(getattr(module, "prob", None) or 0.0)
        if named and rate and not isinstance(module, Regularizer):
            return (
                f"'{path}' leaves out {rate:g} of the patches in training, so that maps made of "
                "the others are wrong: build it without, as with timm's patch_drop_rate=0"
            )
    return ""


def _path_rate(module: nn.Module) -> float:
    """Return the rate of a layer of another package that drops branches; 0 for any other."""
    name = {"DropPath": "drop_prob", "StochasticDepth": "p"}.get(type(module).__name__, "")
    other = not isinstance(module, Regularizer)
    return float(getattr(module, name, None) or 0.0) if other else 0.0


def function_name(function: Callable[..., Any]) -> str:
    """Return a function's name without the underscores of operators and in-place variants."""
    return str(getattr(function, "__name__", function)).strip("_")


def function_kind(name: str) -> str:
    """Return the kind of a torch function or tensor method by its bare name."""
    for kind, pattern in _FUNCTION_KINDS:
        if pattern.fullmatch(name):
            return kind
    return OTHER


def stride_of(kind: str, module: nn.Module | None, sizes: tuple[Any, Any]) -> float:
    """Return by how much a step shrinks its map along some axis; below 1 it enlarges it.

    A convolution says so itself: without padding it shrinks a small map, but is not strided.
    """
    if kind == CONV and isinstance(module, conv._ConvNd):
        widest = float(max(module.stride))
        return 1 / widest if module.transposed else widest
    before, after = sizes
    if len(before) != len(after) or not before or 0 in after:
        return 1.0
    ratios = [float(b) / float(a) for b, a in zip(before, after, strict=True)]
    return max(ratios) if max(ratios) > 1 else min(ratios)


def permutation(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[int, ...] | None:
    """Return the order of axes after a layout function, found on a map of distinct sizes."""
    tensor = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)), None)
    if tensor is None:
        return None
    probe = torch.empty(tuple(range(2, 2 + tensor.dim())), device="meta")

    def swap(value: Any) -> Any:
        return probe if value is tensor else value

    moved = function(*map(swap, args), **{key: swap(value) for key, value in kwargs.items()})
    return tuple(size - 2 for size in moved.shape)

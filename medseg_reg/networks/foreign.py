"""Networks of MONAI and of segmentation-models-pytorch, by name, for a run of this package.

Only what stands in `FOREIGN` is built; a name never makes anything else be imported. Nothing is
downloaded: weights come from a local file, see `pretrained`.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medseg_reg.networks.padding import crop, needs_two_pixels, pad_to_multiple

Arguments = Mapping[str, Any]

MONAI, SMP = "monai.networks.nets", "segmentation_models_pytorch"


@dataclass(frozen=True)
class Source:
    """Where a network comes from.

    Attributes:
        package: the module that has the class.
        factor: a number whose multiples the network takes as sizes, from arguments and network.
        needs: a further package without which the class cannot be made.
    """

    package: str
    factor: Callable[[Arguments, nn.Module], int]
    needs: str = ""


def _of_strides(arguments: Arguments, network: nn.Module) -> int:
    strides = arguments["strides"]
    axes = range(max((len(s) for s in strides if not isinstance(s, int)), default=1))
    return math.lcm(*(math.prod(s if isinstance(s, int) else s[a] for s in strides) for a in axes))


def _of_encoder(arguments: Arguments, network: nn.Module) -> int:
    # MaxViT cuts every map into windows and into a grid, the smallest map too.
    parts = (getattr(module, "partition_size", (1,)) for module in network.modules())
    windows = math.lcm(*(n for part in parts for n in part))
    return int(network.encoder.output_stride) * windows  # type: ignore[union-attr, arg-type]


def _of_tokens(arguments: Arguments, network: nn.Module) -> int:
    # DPT halves the map of tokens once more.
    return 2 * _of_encoder(arguments, network)


def _of_blocks(arguments: Arguments, network: nn.Module) -> int:
    return int(2 ** (len(arguments.get("blocks_down", range(4))) - 1))


# What an encoder of segmentation-models-pytorch itself can be given once it is built.
RATE = "drop_path_rate"

FOREIGN = {
    "monai.UNet": Source(MONAI, _of_strides),
    "monai.BasicUNet": Source(MONAI, lambda *_: 16),
    "monai.AttentionUnet": Source(MONAI, _of_strides),
    "monai.DynUNet": Source(MONAI, _of_strides),
    "monai.SegResNet": Source(MONAI, _of_blocks),
    "monai.UNETR": Source(MONAI, lambda *_: 16, needs="einops"),
    "monai.SwinUNETR": Source(
        MONAI, lambda arguments, _: int(arguments.get("patch_size", 2)) ** 5, needs="einops"
    ),
    **{
        f"smp.{name}": Source(SMP, _of_encoder)
        for name in (
            "Unet",
            "UnetPlusPlus",
            "FPN",
            "MAnet",
            "Linknet",
            "PSPNet",
            "PAN",
            "DeepLabV3",
            "DeepLabV3Plus",
            "UPerNet",
            "Segformer",
        )
    },
    "smp.DPT": Source(SMP, _of_tokens),
}


class ForeignNetwork(nn.Module):
    """A network of another package that takes images of any size and returns what ours do.

    Images are padded to a multiple of `factor` by repeating their border, and logits cropped.
    What a network returns in training for deep supervision becomes a list, the finest first.

    Args:
        name: its name in `FOREIGN`.
        network: the network.
        factor: sizes that it takes are multiples of this.
        size: the one size that it takes, if it does not take several.
    """

    def __init__(
        self, name: str, network: nn.Module, factor: int, size: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.name, self.factor, self.fixed = name, factor, size is not None
        # Else a size large enough for every network, and small enough to compute with.
        self.size = tuple(size or [-(-256 // factor) * factor] * 2)
        self.input = nn.Identity()  # where a layer on the image is hung
        self.network = network
        self.two_at_least = size is None and needs_two_pixels(network)
        # MONAI's DynUNet leaves the logits of its levels behind in a list, and what it began with.
        heads = getattr(network, "heads", None)
        self._heads = (heads, list(heads)) if isinstance(heads, list) else None

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Map images (B, C, H, W) to logits (B, K, H, W)."""
        size = x.shape[2:]
        # Exports take images from more than the factor on. Without the second rule the symbolic
        # expressions of their sizes are short, which decides how long an export takes.
        two = self.two_at_least and not torch.compiler.is_exporting()
        padded = pad_to_multiple(self.input(x), self.factor, two)
        logits: Tensor = self.network(padded)
        if self._heads is not None:  # else a copy of the network after a step is refused by torch
            self._heads[0][:] = self._heads[1]
        if logits.ndim == x.ndim + 1:  # MONAI's deep supervision: all levels in one tensor
            return [crop(one, size) for one in logits.unbind(dim=1)]
        return crop(logits, size)

    def extra_repr(self) -> str:
        """Name the network."""
        return f"{self.name}, factor={self.factor}"


def foreign_class(name: str) -> type[nn.Module]:
    """Return the class that a name stands for.

    Raises:
        ValueError: a package that it needs is not installed.
    """
    source = FOREIGN[name]
    for package in filter(None, (source.package.split(".")[0], source.needs)):
        try:
            importlib.import_module(package)
        except ImportError:
            pip = package.replace("_", "-")
            raise ValueError(f"{name} needs the package {pip}: pip install {pip}") from None
    cls: type[nn.Module] = getattr(importlib.import_module(source.package), name.split(".")[1])
    return cls


def build_foreign(
    name: str, in_channels: int, out_channels: int, arguments: Arguments
) -> ForeignNetwork:
    """Build a network with new weights.

    Args:
        name: one of `FOREIGN`.
        in_channels: channels of the images.
        out_channels: channels of the logits.
        arguments: the network's own; `encoder_weights` is not passed on, and what only a built
            encoder takes, see `later_arguments`, is set then.

    Raises:
        ValueError: the network cannot be built so; says what it says.
    """
    later = later_arguments(arguments.get("encoder_name", ""))
    left_out = ("encoder_weights", *later)
    own = {key: value for key, value in arguments.items() if key not in left_out}
    try:
        with offline(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = foreign_class(name)(**own, **given(name, in_channels, out_channels))
        if RATE in later and RATE in arguments:
            _set_path_rate(network, arguments[RATE])
        _require_channels(name, network, arguments)
        factor = FOREIGN[name].factor(arguments, network)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(f"{name}: {type(error).__name__}: {_line(error)}") from None
    except (AssertionError, ValueError) as error:
        raise ValueError(f"{name}: {_line(error)}") from None
    return ForeignNetwork(name, network, factor, fixed_size(name, network, arguments))


def later_arguments(encoder: str) -> tuple[str, ...]:
    """Return what an encoder takes once it is built, as encoders of timm take it at once.

    The mix vision transformers of segmentation-models-pytorch have a rate of stochastic depth, 0.1,
    and drop the argument for it in silence.
    """
    return (RATE,) if str(encoder).startswith("mit_") else ()


def _set_path_rate(network: nn.Module, rate: Any) -> None:
    """Let the rate of the branches of a mix vision transformer rise from 0 to another one."""
    number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
    if not number or not 0 <= rate < 1:
        raise ValueError(f"{RATE} is {rate!r}: expected a number from 0 to below 1")
    network.encoder.reset_drop_path(rate)  # type: ignore[operator, union-attr]


def _require_channels(name: str, network: nn.Module, arguments: Arguments) -> None:
    """Refuse a decoder that convolves the map that its encoder does not have.

    Encoders that begin at a quarter of the size have no channels at half the size. Most decoders go
    on without them, some fail with the first image.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == 0:
            depth = len(network.encoder.out_channels) - 1  # type: ignore[union-attr, arg-type]
            raise ValueError(
                f"the encoder {arguments['encoder_name']} has no map at half the size of the "
                f"image, which this decoder reads with encoder_depth {depth}. Use encoder_depth "
                "5, or another encoder"
            )


def given(name: str, in_channels: int, out_channels: int) -> dict[str, Any]:
    """Return the arguments that the data decide."""
    if name.startswith("smp."):
        return {"in_channels": in_channels, "classes": out_channels, "encoder_weights": None}
    return {"spatial_dims": 2, "in_channels": in_channels, "out_channels": out_channels}


def fixed_size(name: str, network: nn.Module, arguments: Arguments) -> list[int] | None:
    """Return the one size that a network takes, or None if it takes several."""
    if name == "monai.UNETR":
        size = arguments["img_size"]
        return [size] * 2 if isinstance(size, int) else list(size)
    for module in network.modules():
        size = getattr(module, "img_size", None)
        if size is not None and getattr(module, "strict_img_size", False):
            return [int(n) for n in size]
    return None


@contextmanager
def offline() -> Iterator[None]:
    """Forbid the Hugging Face hub to reach out, for one block."""
    before = os.environ.get("HF_HUB_OFFLINE")
    # The variable is read when the package is imported, the constant at each request.
    constants = sys.modules.get("huggingface_hub.constants")
    was = getattr(constants, "HF_HUB_OFFLINE", None)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if constants is not None:
        constants.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before
        if constants is not None:
            constants.HF_HUB_OFFLINE = was  # type: ignore[attr-defined]


def _line(error: BaseException) -> str:
    # A KeyError shows its text in quotes.
    said = error.args[0] if isinstance(error, KeyError) and error.args else error
    text = " ".join(str(said).split()).rstrip(".")
    return text if len(text) < 300 else f"{text[:300]}..."

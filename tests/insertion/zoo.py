"""Networks of other packages, small, with the places that reading their code says they have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn


@dataclass
class Case:
    """A network and its places.

    Attributes:
        make: builds it.
        shape: of an example.
        kinds: how many places of each kind, `input` (always one) left out.
        between: how many `between_convs` in each part.
        needs: a module that must be installed.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    kinds: dict[str, int]
    between: dict[str, int] = field(default_factory=dict)
    needs: str = "monai"

    def network(self) -> nn.Module:
        """Build it with reproducible weights."""
        pytest.importorskip(self.needs)
        torch.manual_seed(0)
        return self.make()

    def example(self, batch: int = 1) -> torch.Tensor:
        return torch.rand(batch, *self.shape, generator=torch.Generator().manual_seed(1))


def monai(name: str, *args: object, **kwargs: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        nets = pytest.importorskip("monai.networks.nets")
        return getattr(nets, name)(*args, **kwargs)

    return make


def smp(name: str, encoder: str = "resnet18", **kwargs: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        package = pytest.importorskip("segmentation_models_pytorch")
        return getattr(package, name)(encoder, encoder_weights=None, in_channels=1, **kwargs)

    return make


def timm(name: str, **kwargs: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        return pytest.importorskip("timm").create_model(name, in_chans=1, **kwargs)

    return make


def torchvision(name: str, **kwargs: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        return getattr(pytest.importorskip("torchvision.models"), name)(**kwargs)

    return make


# Four down-samplings: five encoder blocks and four decoder blocks of two convolutions.
U5 = dict.fromkeys(("encoder.0", "encoder.1", "encoder.2", "encoder.3", "bottleneck"), 1)
U5_DECODER = {f"decoder.{i}": 1 for i in range(4)}
# A resnet18 has two blocks of two convolutions on each of the levels 2 to 5.
RESNET = {"encoder.2": 2, "encoder.3": 2, "encoder.4": 2, "bottleneck": 2}
SMP_DECODER = {f"decoder.{i}": 1 for i in range(5)}
BASIC = {"features": (8, 8, 12, 12, 16, 8)}
DYN = (2, 1, 2, [3] * 4, [1, 2, 2, 2], [2, 2, 2])

FAST = {
    "BasicUNet": Case(
        monai("BasicUNet", 2, 1, 2, **BASIC),
        (1, 32, 32),
        {"between_convs": 9, "after_norm": 18, "after_block": 9, "skip": 4, "head": 1},
        {**U5, **U5_DECODER},
    ),
    # One convolution a level: only the last way down (stride 2) and the bottom (stride 1) are
    # two convolutions of one resolution. The last layer is the head.
    "UNet": Case(
        monai("UNet", 2, 1, 2, channels=(8, 12, 16), strides=(2, 2)),
        (1, 32, 32),
        {"between_convs": 1, "after_norm": 4, "after_block": 4, "head": 1},
        {"bottleneck": 1},
    ),
    # Residual units of two convolutions down (3), of one convolution behind a transposed one up
    # (2, of which the last is the head).
    "UNet-residual": Case(
        monai("UNet", 2, 1, 2, channels=(8, 12, 16), strides=(2, 2), num_res_units=2),
        (1, 32, 32),
        {"between_convs": 4, "after_norm": 9, "after_block": 7, "residual": 5, "head": 1},
        {"encoder.1": 1, "bottleneck": 2, "decoder.1": 1},
    ),
    "AttentionUnet": Case(
        monai("AttentionUnet", 2, 1, 2, channels=(8, 12, 16), strides=(2, 2)),
        (1, 32, 32),
        {
            "between_convs": 3,
            "after_norm": 10,
            "after_block": 7,
            "skip": 2,
            "gate": 2,
            "head": 1,
        },
        {"encoder.0": 1, "encoder.1": 1, "bottleneck": 1},
    ),
    "DynUNet": Case(
        monai("DynUNet", *DYN, filters=[8, 8, 12, 12]),
        (1, 32, 32),
        {"between_convs": 7, "after_norm": 14, "after_block": 7, "skip": 3, "head": 1},
        {**dict.fromkeys(("encoder.0", "encoder.1", "encoder.2", "bottleneck"), 1)}
        | {f"decoder.{i}": 1 for i in range(3)},
    ),
    # The decoder's blocks have no residuals.
    "DynUNet-residual": Case(
        monai("DynUNet", *DYN, filters=[8, 8, 12, 12], res_block=True),
        (1, 32, 32),
        {
            "between_convs": 7,
            "after_norm": 10,
            "after_block": 7,
            "residual": 4,
            "skip": 3,
            "head": 1,
        },
        {**dict.fromkeys(("encoder.0", "encoder.1", "encoder.2", "bottleneck"), 1)}
        | {f"decoder.{i}": 1 for i in range(3)},
    ),
    "smp-Unet": Case(
        smp("Unet"),
        (1, 64, 64),
        {
            "between_convs": 13,
            "after_norm": 19,
            "after_block": 14,
            "residual": 8,
            "skip": 4,
            "head": 1,
        },
        {**RESNET, **SMP_DECODER},
        "segmentation_models_pytorch",
    ),
}

"""The network, as written in a configuration: one of this package, or a foreign one by name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from medseg_reg.config_base import Closed, Positive
from medseg_reg.errors import nearest

Head = Literal["softmax", "sigmoid"]
# A tree of depth d has 2^d experts; 64 maps of full size for each class are enough.
TreeDepth = Annotated[int, Field(ge=0, le=6)]


def _no_switch(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("give the path of a local file; nothing is downloaded")
    return value


# Where other packages take true for a download.
LocalFile = Annotated[Path | None, BeforeValidator(_no_switch)]
# Keys of every network about the weights that it begins with.
PRETRAINED = ("pretrained", "pretrained_strict", "pretrained_unseen")
Upsampling = Literal["deconv", "nontrainable"]
ForeignName = Literal[
    "monai.UNet",
    "monai.BasicUNet",
    "monai.AttentionUnet",
    "monai.DynUNet",
    "monai.SegResNet",
    "monai.UNETR",
    "monai.SwinUNETR",
    "smp.Unet",
    "smp.UnetPlusPlus",
    "smp.FPN",
    "smp.MAnet",
    "smp.Linknet",
    "smp.PSPNet",
    "smp.PAN",
    "smp.DeepLabV3",
    "smp.DeepLabV3Plus",
    "smp.UPerNet",
    "smp.Segformer",
    "smp.DPT",
]


class ExpertsSpec(Closed):
    """Sparsely gated experts in the place of feed-forward blocks of a transformer.

    Attributes:
        count: experts in a block.
        every: 1 for every feed-forward block, 2 for every second one.
        top: experts that a token meets.
        capacity: room of an expert in training, as a multiple of its equal share of the tokens.
        balance: weight of the loss that keeps experts in balance.
        jitter: noise on what the router sees in training.
        exchange: whether, over several processes, tokens travel to the process of their expert.
    """

    count: Annotated[int, Field(ge=2, le=64)] = 4
    every: Positive = 2
    top: Annotated[int, Field(ge=1, le=2)] = 1
    capacity: Annotated[float, Field(gt=0)] = 1.0
    balance: Annotated[float, Field(ge=0)] = 0.01
    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.01
    exchange: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of `use_experts`."""
        return {"experts" if key == "count" else key: value for key, value in self}


class TokenSelectionSpec(Closed):
    """Tokens of a transformer that later blocks work on, chosen by predictors.

    Attributes:
        keep: share of the patches in the first stage; its square in the second, and so on.
        stages: equal parts of the blocks.
        first: blocks at the beginning that run on all tokens; null for a quarter of them.
        mode: whole blocks, or their feed-forward parts alone.
        weight: of the loss that holds the shares.
        temperature: of the relaxation that gives the gradient.
    """

    keep: Annotated[float, Field(gt=0, lt=1)] = 0.7
    stages: Positive = 3
    first: Annotated[int, Field(ge=0)] | None = None
    mode: Literal["block", "feed_forward"] = "block"
    weight: Annotated[float, Field(ge=0)] = 4.0
    temperature: Annotated[float, Field(gt=0)] = 1.0


class TokenLabelsSpec(Closed):
    """Tokens of a transformer that learn, beside the task, what their patches show.

    Attributes:
        weight: of the loss.
        taps: behind how many blocks: 1 for the last, 3 for the ends of three equal parts.
        foreground: how much more a patch full of foreground counts than one of background.
    """

    weight: Annotated[float, Field(ge=0)] = 0.5
    taps: Positive = 1
    foreground: Annotated[float, Field(gt=0)] = 1.0


class ReuseSpec(Closed):
    """A finished coarse run, whose answer for each image the network takes as further channels.

    Attributes:
        run: the coarse run.
        what: `probabilities` of all classes, or `logits`.
    """

    run: Path
    what: Literal["probabilities", "logits"] = "probabilities"


class UNetSpec(Closed):
    """U-Net."""

    name: Literal["unet"] = "unet"
    channels: tuple[Positive, ...] = Field((32, 64, 128, 256, 512), min_length=2)
    norm: Literal["batch", "instance"] = "batch"
    activation: Literal["relu", "leakyrelu", "prelu", "gelu", "swish"] = "relu"
    upsample: Upsampling = "deconv"
    head: Head = "softmax"
    tree_depth: TreeDepth = 0
    reuse: ReuseSpec | None = None
    pretrained: Path | None = None
    pretrained_strict: bool = True
    pretrained_unseen: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """The network's own arguments."""
        run = {"name", "head", "tree_depth", "reuse", *PRETRAINED}
        return {key: value for key, value in self if key not in run}

    @property
    def encoder_weights(self) -> Path | None:
        """A file for the encoder alone; `pretrained` finds out by itself what it is for."""
        return None


class AttentionUNetSpec(UNetSpec):
    """Attention U-Net."""

    name: Literal["attention_unet"]  # type: ignore[assignment]
    gate_full_resolution: bool = False

    @model_validator(mode="after")
    def _something_to_gate(self) -> AttentionUNetSpec:
        if len(self.channels) == 2 and not self.gate_full_resolution:
            raise ValueError(
                "two levels have one skip connection, which has no gate: give channels of three "
                "levels, or gate_full_resolution"
            )
        return self


class UNet3PlusSpec(UNetSpec):
    """UNet 3+."""

    name: Literal["unet3plus"]  # type: ignore[assignment]
    upsample: Upsampling = "nontrainable"
    cat_channels: Positive = 64
    deep_supervision: bool = False
    classification_guided: bool = False


class ForeignSpec(BaseModel):
    """A network of MONAI or segmentation-models-pytorch: its own arguments stand beside it.

    The packages are imported only where a configuration names one.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    name: ForeignName
    head: Head = "softmax"
    tree_depth: TreeDepth = 0
    experts: ExpertsSpec | None = None
    token_selection: TokenSelectionSpec | None = None
    token_labels: TokenLabelsSpec | None = None
    reuse: ReuseSpec | None = None
    pretrained: LocalFile = None
    pretrained_strict: bool = True
    pretrained_unseen: bool = False

    @model_validator(mode="after")
    def _can_be_built(self) -> ForeignSpec:
        from medseg_reg.networks.foreign_check import check_foreign

        if self.pretrained is not None and self.encoder_weights is not None:
            raise ValueError("pretrained and encoder_weights are both given; keep one")
        check_foreign(self.name, self.arguments)
        return self

    @property
    def arguments(self) -> dict[str, Any]:
        """The network's own arguments."""
        return dict(self.model_extra or {})

    @property
    def token_arguments(self) -> dict[str, Any]:
        """What is done to the tokens of the network, as arguments of `build_network`."""
        found: dict[str, Any] = {}
        if self.experts is not None:
            found["experts"] = self.experts.arguments
        if self.token_selection is not None:
            found["token_selection"] = dict(self.token_selection)
        if self.token_labels is not None:
            found["token_labels"] = dict(self.token_labels)
        return found

    @property
    def encoder_weights(self) -> Path | None:
        """A file for the encoder alone, as segmentation-models-pytorch calls it."""
        found = self.arguments.get("encoder_weights")
        return None if found is None else Path(found)


OWN: tuple[type[UNetSpec], ...] = (UNetSpec, AttentionUNetSpec, UNet3PlusSpec)
OWN_NAMES = ("unet", "attention_unet", "unet3plus")
FOREIGN_NAMES: tuple[str, ...] = get_args(ForeignName)


def _kind(data: Any) -> str:
    """Return the tag of what a configuration holds; without a name it is a U-Net."""
    name = data.get("name", "unet") if isinstance(data, dict) else getattr(data, "name", "unet")
    return "foreign" if name in FOREIGN_NAMES else str(name)


def _known(data: Any) -> Any:
    if _kind(data) not in (*OWN_NAMES, "foreign"):
        names = (*OWN_NAMES, *FOREIGN_NAMES)
        found = data["name"]
        raise ValueError(
            f"there is no network {found!r}.{nearest(str(found), names)} Known: {', '.join(names)}"
        )
    return data


NetworkSpec = Annotated[
    Annotated[UNetSpec, Tag("unet")]
    | Annotated[AttentionUNetSpec, Tag("attention_unet")]
    | Annotated[UNet3PlusSpec, Tag("unet3plus")]
    | Annotated[ForeignSpec, Tag("foreign")],
    Discriminator(_kind),
    BeforeValidator(_known),
]

"""The configuration of a pre-training without labels: a masked autoencoder.

It has the keys of a training that need no labels, and `masking`; see `medseg_reg.pretrain`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from medseg_reg.config import RunConfig, load_as
from medseg_reg.config_base import Closed, Positive
from medseg_reg.config_network import ForeignSpec
from medseg_reg.config_regularization import AugmentationSpec, PenaltySpec


class MaskingSpec(Closed):
    """What is hidden, and from what it is to be found again; the defaults are the published ones.

    Attributes:
        ratio: share of the patches that are hidden.
        normalize: whether the target of each patch is brought to mean 0 and variance 1.
        width: features of a token in the decoder.
        blocks: transformer blocks of the decoder.
        heads: of their attention.
    """

    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75
    normalize: bool = True
    width: Annotated[int, Field(ge=4, multiple_of=4)] = 512
    blocks: Positive = 8
    heads: Positive = 16

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> MaskingSpec:
        if self.width % self.heads:
            raise ValueError(
                f"width {self.width} cannot be shared by {self.heads} heads; give a multiple of it"
            )
        return self


class TransformerSpec(ForeignSpec):
    """A network whose encoder is one sequence of tokens, so that a part of it can be hidden."""

    name: Literal["monai.UNETR", "smp.DPT"]

    @model_validator(mode="after")
    def _plain_blocks(self) -> TransformerSpec:
        for key in ("experts", "token_selection", "token_labels", "reuse"):
            if getattr(self, key) is not None:
                raise ValueError(f"{key} is for the training with labels; leave it out here")
        return self


class PretrainingOptimizationSpec(Closed):
    """Regularization through the optimization procedure."""

    gradient_clip: Annotated[float, Field(gt=0)] | None = None


class PretrainingRegularizationSpec(Closed):
    """Of the five groups of regularization those that need no labels."""

    data: tuple[AugmentationSpec, ...] = ()
    penalty: PenaltySpec = PenaltySpec()
    optimization: PretrainingOptimizationSpec = PretrainingOptimizationSpec()


class PretrainingConfig(RunConfig):
    """A pre-training: the encoder of a network learns to fill in hidden patches."""

    network: TransformerSpec
    regularization: PretrainingRegularizationSpec = PretrainingRegularizationSpec()  # type: ignore[assignment]
    masking: MaskingSpec = MaskingSpec()


def load_pretraining(path: Path, overrides: Sequence[str] = ()) -> PretrainingConfig:
    """Read the configuration of a pre-training, as `load_config` does that of a training."""
    return load_as(PretrainingConfig, path, overrides)

"""The configuration of a slice classifier: which classes does a slice show?

It has the keys of a training that are not about pixels, and `presence`; see `medseg_reg.classify`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from medseg_reg.config import RunConfig, load_as
from medseg_reg.config_base import Closed, Positive
from medseg_reg.config_network import LocalFile
from medseg_reg.config_regularization import AugmentationSpec, DistillationSpec, PenaltySpec


class PresenceSpec(Closed):
    """What it means that a slice shows a class, and how that is learned and judged.

    Attributes:
        pixels: the fewest pixels of a class that count.
        balance: whether slices with a class weigh as much, together, as those without it.
        sensitivity: the share of slices with a class that are to be found; the threshold is the
            highest that reaches it on the validation slices.
    """

    pixels: Positive = 1
    balance: bool = True
    sensitivity: Annotated[float, Field(gt=0, le=1)] = 0.95


class ClassifierSpec(BaseModel):
    """A vision transformer of timm by name: its own arguments stand beside it."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = "deit_tiny_patch16_224"
    pretrained: LocalFile = None
    pretrained_strict: bool = True
    pretrained_unseen: bool = False

    @model_validator(mode="after")
    def _known(self) -> ClassifierSpec:
        from medseg_reg.networks.slice_classifier import check_classifier

        check_classifier(self.name, self.arguments)
        return self

    @property
    def arguments(self) -> dict[str, Any]:
        """The network's own arguments."""
        return dict(self.model_extra or {})

    @property
    def encoder_weights(self) -> Path | None:
        """There is no file for a part of it."""
        return None


class ClassificationErrorSpec(Closed):
    """The error function: a binary cross-entropy for each class, and a teacher."""

    distillation: DistillationSpec | None = None


class ClassificationOptimizationSpec(Closed):
    """Regularization through the optimization procedure."""

    gradient_clip: Annotated[float, Field(gt=0)] | None = None
    select: Literal["best", "last"] = "best"


class ClassificationRegularizationSpec(Closed):
    """Of the five groups of regularization those of a classifier; rates are timm's arguments."""

    data: tuple[AugmentationSpec, ...] = ()
    error: ClassificationErrorSpec = ClassificationErrorSpec()
    penalty: PenaltySpec = PenaltySpec()
    optimization: ClassificationOptimizationSpec = ClassificationOptimizationSpec()


class ClassificationEvaluationSpec(Closed):
    """How a trained classifier is judged."""

    confidence: float = Field(0.95, gt=0, lt=1)
    resamples: int = Field(10_000, ge=100)
    batch_size: Positive = 8


class ClassificationConfig(RunConfig):
    """A classifier of slices is trained with labels made from masks, and judged."""

    network: ClassifierSpec = Field(default_factory=ClassifierSpec)  # type: ignore[assignment]
    regularization: ClassificationRegularizationSpec = ClassificationRegularizationSpec()  # type: ignore[assignment]
    presence: PresenceSpec = PresenceSpec()
    evaluation: ClassificationEvaluationSpec = ClassificationEvaluationSpec()

    @model_validator(mode="after")
    def _one_size(self) -> ClassificationConfig:
        if self.data.image.size is None:
            raise ValueError(
                "a vision transformer is made for one size of the image: give data.image.size, as "
                "[224, 224]"
            )
        return self


def load_classification(path: Path, overrides: Sequence[str] = ()) -> ClassificationConfig:
    """Read the configuration of a classifier, as `load_config` does that of a training."""
    return load_as(ClassificationConfig, path, overrides)

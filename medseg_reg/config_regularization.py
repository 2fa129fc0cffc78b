"""The five groups of regularization, as written in a configuration."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from medseg_reg.config_base import Closed, Fraction, Positive
from medseg_reg.data.augment import check_augmentation
from medseg_reg.regularizers import build, regularizer_class, regularizer_names
from medseg_reg.regularizers.base import check_choice

Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
RateScheduleName = Literal["constant", "linear", "cosine", "v_shape"]


# Terms of the error function.
TERMS = ("ce", "dice", "ssim", "focal", "iou", "tversky", "ms_ssim", "boundary")


class AugmentationSpec(BaseModel):
    """One albumentations transform: its name, and its own arguments beside it."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @model_validator(mode="after")
    def _known(self) -> AugmentationSpec:
        check_augmentation(self.name, self.arguments)
        return self

    @property
    def arguments(self) -> dict[str, Any]:
        """The transform's own arguments."""
        return dict(self.model_extra or {})


class RateScheduleSpec(Closed):
    """How the rate of a layer changes over the training, as a factor on its `p`.

    Attributes:
        name: `constant`; `linear` or `cosine`, a rise from `start` to 1; `v_shape`, a fall from 1
            to 0 and a rise back to 1.
        start: the first factor of a rise.
        duration: the share of the training over which a rise goes; 1 is held after it.
        turn: the share of the training after which `v_shape` is 0.
    """

    name: RateScheduleName = "constant"
    start: Annotated[float, Field(ge=0, lt=1)] = 0.0
    duration: Annotated[float, Field(gt=0, le=1)] = 1.0
    turn: Annotated[float, Field(gt=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _keys_have_a_meaning(self) -> RateScheduleSpec:
        rises, turns = ("linear", "cosine"), ("v_shape",)
        for key, owners in {"start": rises, "duration": rises, "turn": turns}.items():
            default = type(self).model_fields[key].default
            if getattr(self, key) != default and self.name not in owners:
                raise ValueError(
                    f"'{key}' belongs to {' and '.join(owners)}, the schedule is '{self.name}'"
                )
        return self


class DepthRampSpec(Closed):
    """A ramp of the rate over the places of one entry, in the order of the data flow.

    Attributes:
        first: factor on `p` at the first place.
        last: factor on `p` at the last place; those between lie evenly spaced.
    """

    first: Share = 0.0
    last: Share = 1.0

    @model_validator(mode="after")
    def _something_is_left(self) -> DepthRampSpec:
        if self.first == self.last == 0:
            raise ValueError("first and last are 0, so nothing would be dropped anywhere")
        return self


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _as_schedule(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _as_ramp(value: Any) -> Any:
    return ({} if value else None) if isinstance(value, bool) else value


def _defaults(owner: Callable[..., Any]) -> dict[str, Any]:
    """Return the parameters of a class that have defaults, as a configuration would hold them."""
    found = {
        key: one.default
        for key, one in inspect.signature(owner).parameters.items()
        if one.default is not one.empty
    }
    return {key: list(one) if isinstance(one, tuple) else one for key, one in found.items()}


class LayerSpec(BaseModel):
    """One regularizer layer: its name, its places, its own parameters (`p` first) beside them.

    Where no places are given, they are the `default_places` of the layer's class. Parameters that
    are left out stand there with the defaults of the class, so that a layer written short and the
    same layer written out are equal.
    """

    # Infinite parameters stay numbers where a layer is written by itself too.
    model_config = ConfigDict(extra="allow", frozen=True, ser_json_inf_nan="constants")

    name: str
    places: Annotated[
        tuple[str, ...],
        Field(min_length=1),
        BeforeValidator(_as_tuple, json_schema_input_type=str | tuple[str, ...]),
    ] = Field(default_factory=tuple)
    schedule: Annotated[
        RateScheduleSpec,
        BeforeValidator(_as_schedule, json_schema_input_type=RateScheduleName | RateScheduleSpec),
    ] = RateScheduleSpec()
    depth_ramp: Annotated[
        DepthRampSpec | None,
        BeforeValidator(_as_ramp, json_schema_input_type=bool | DepthRampSpec | None),
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_class(cls, data: Any) -> Any:
        # An unknown name is left to `_can_be_built`, which says what is wrong with it.
        if not isinstance(data, dict) or data.get("name") not in regularizer_names():
            return data
        owner = regularizer_class(data["name"])
        defaults = _defaults(owner)
        # k: 2 and the default 2.0 are one number, also to who compares what is written.
        floats = {
            key: float(value)
            for key, value in data.items()
            if type(value) is int and isinstance(defaults.get(key), float)
        }
        return {"places": owner.default_places, **defaults, **data, **floats}

    @model_validator(mode="after")
    def _can_be_built(self) -> LayerSpec:
        for key in self.parameters:
            check_choice(key, f"parameter of {self.name}", self._keys())
        try:
            build(self.name, **self.parameters)
        except TypeError as error:
            raise ValueError(f"{self.name}: {error}") from None
        return self

    def _keys(self) -> Sequence[str]:
        """Return the layer's own parameters and those of every layer, to suggest from both."""
        own = inspect.signature(regularizer_class(self.name)).parameters
        return [*own, *type(self).model_fields]

    @property
    def parameters(self) -> dict[str, Any]:
        """The layer's own parameters."""
        return dict(self.model_extra or {})


class MixTokenSpec(Closed):
    """A box of patches of each image, and its labels, come from another image of the batch.

    Attributes:
        p: share of the batches that are mixed.
        alpha: of the Beta distribution of the area that stays.
        patch: side of a patch in pixels; null for the first patches of the transformer.
    """

    p: Share = 1.0
    alpha: float = Field(1.0, gt=0)
    patch: Positive | None = None


class DistillationSpec(Closed):
    """A teacher, of which the network learns beside the labels.

    Attributes:
        teacher: a finished run.
        kind: `soft`, the divergence of the classes; `hard`, the loss for the teacher's labels.
        temperature: of the soft kind.
        weight: share of the teacher; the labels have the rest.
    """

    teacher: Path
    kind: Literal["soft", "hard"] = "soft"
    temperature: float = Field(1.0, gt=0)
    weight: Share = 0.5

    @model_validator(mode="after")
    def _temperature_has_a_meaning(self) -> DistillationSpec:
        if self.kind == "hard" and self.temperature != 1:
            raise ValueError("'temperature' belongs to kind 'soft', this is 'hard'")
        return self


class ErrorSpec(Closed):
    """The error function: weights of its terms, of the classes and of the outputs.

    Attributes:
        focal_gamma: how strongly `focal` leaves out easy pixels.
        tversky_alpha: weight of false positives in `tversky`.
        tversky_beta: weight of false negatives in `tversky`.
        tversky_gamma: of the focal Tversky loss; 1 is the plain one.
        class_weights: of the classes in `ce` and `focal`, the background first.
        region_weights: of the classes in the other terms, which leave the background out.
        supervision: weights of the outputs of a network with deep supervision.
        distillation: a teacher, of which the network learns too.
    """

    ce: NotNegative = 1.0
    dice: NotNegative = 0.0
    ssim: NotNegative = 0.0
    focal: NotNegative = 0.0
    iou: NotNegative = 0.0
    tversky: NotNegative = 0.0
    ms_ssim: NotNegative = 0.0
    boundary: NotNegative = 0.0
    class_weights: tuple[NotNegative, ...] | None = None
    region_weights: tuple[NotNegative, ...] | None = None
    label_smoothing: Fraction = 0.0
    focal_gamma: NotNegative = 2.0
    tversky_alpha: NotNegative = 0.3
    tversky_beta: NotNegative = 0.7
    tversky_gamma: float = Field(1.0, gt=0)
    supervision: Literal["equal", "halving"] | tuple[NotNegative, ...] = "equal"
    distillation: DistillationSpec | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of `MixedLoss`."""
        return {key: value for key, value in self if key != "distillation"}

    @model_validator(mode="after")
    def _something_to_minimise(self) -> ErrorSpec:
        if not any(getattr(self, term) for term in TERMS):
            raise ValueError(f"all weights are 0; give at least one of {', '.join(TERMS)} a weight")
        if self.class_weights is not None and not any(self.class_weights):
            raise ValueError("class_weights are all 0; give at least one class a weight")
        if self.region_weights is not None and not any(self.region_weights[1:]):
            raise ValueError(
                "region_weights are 0 for all classes but the background; give one of them a weight"
            )
        if not isinstance(self.supervision, str) and not any(self.supervision):
            raise ValueError("supervision: all weights are 0; give at least one output a weight")
        return self

    @model_validator(mode="after")
    def _keys_have_a_meaning(self) -> ErrorSpec:
        owners: dict[str, tuple[str, ...]]
        owners = {"label_smoothing": ("ce",), "focal_gamma": ("focal",)}
        owners |= dict.fromkeys(("tversky_alpha", "tversky_beta", "tversky_gamma"), ("tversky",))
        owners["class_weights"] = ("ce", "focal")
        owners["region_weights"] = tuple(term for term in TERMS if term not in ("ce", "focal"))
        for key, terms in owners.items():
            default = type(self).model_fields[key].default
            if getattr(self, key) != default and not any(getattr(self, t) for t in terms):
                raise ValueError(
                    f"'{key}' belongs to {', '.join(terms)}; none of them has a weight"
                )
        if self.tversky and not self.tversky_alpha + self.tversky_beta:
            raise ValueError("tversky_alpha and tversky_beta are both 0; give one of them a weight")
        return self


class PenaltySpec(Closed):
    """Penalties on the weights w of convolutions and linear layers.

    Biases, normalization layers, layer scale, and the tables and tokens of transformers (positions,
    relative position bias, class token) are exempt.

    Attributes:
        weight_decay: with `adam` and `sgd` an L2 penalty: weight_decay * w is added to the
            gradient, so Adam scales it like the rest. With `adamw` it is decoupled: each step
            takes lr * weight_decay * w off the weights (Loshchilov & Hutter, ICLR 2019).
        l1: l1 * sum |w| is added to the loss.
    """

    weight_decay: float = Field(0.0, ge=0)
    l1: float = Field(0.0, ge=0)


class EarlyStoppingSpec(Closed):
    """Stop when a validation score has not improved for `patience` epochs."""

    monitor: Literal["val_dice", "val_iou", "val_loss"] = "val_dice"
    patience: Positive = 10
    min_delta: float = Field(0.0, ge=0)


class OptimizationSpec(Closed):
    """Regularization through the optimization procedure."""

    early_stopping: EarlyStoppingSpec | None = None
    gradient_clip: Annotated[float, Field(gt=0)] | None = None
    select: Literal["best", "last"] = "best"


class RegularizationSpec(Closed):
    """The five groups of regularization (Kukacka, Golkov, Cremers, arXiv:1710.10686, 2017)."""

    data: tuple[AugmentationSpec, ...] = ()
    mix_token: MixTokenSpec | None = None
    architecture: tuple[LayerSpec, ...] = ()
    error: ErrorSpec = ErrorSpec()
    penalty: PenaltySpec = PenaltySpec()
    optimization: OptimizationSpec = OptimizationSpec()

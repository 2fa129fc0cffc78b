"""The typed, closed configuration of a training run.

    python -m medseg_reg.config --schema > schema.json     # JSON Schema, for editors
    python -m medseg_reg.config configs/demo.yaml seed=1   # check a file, print it resolved

A configuration is data: reading one never imports or runs code. Unknown keys are errors.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from medseg_reg.config_base import Closed, Fraction, Positive
from medseg_reg.config_file import (
    Origins,
    explain,
    origins,
    read_yaml,
    with_overrides,
    write_yaml,
)
from medseg_reg.config_network import ForeignSpec, NetworkSpec, UNet3PlusSpec, UNetSpec
from medseg_reg.config_regularization import RegularizationSpec
from medseg_reg.data.preprocessing import ImageSpec
from medseg_reg.data.sampling import SamplingSpec
from medseg_reg.data.splits import SplitSpec
from medseg_reg.errors import MedsegError, run_main

# Keys that the configuration of one command alone has.
_OWN_KEYS = {"masking": "pre-training", "presence": "classification"}


def kind_of(content: Any) -> str:
    """Return for what the content of a configuration is: one of these, or a training."""
    keys = content if isinstance(content, dict) else {}
    return next((kind for key, kind in _OWN_KEYS.items() if key in keys), "training")


class PhantomSpec(Closed):
    """A generated data set, for a first run without data: made where the store is missing."""

    cases: int = Field(12, ge=3)
    size: int = Field(96, ge=64, multiple_of=8)
    slices: int = Field(24, ge=16)
    seed: int = Field(0, ge=0)


class DataSpec(Closed):
    """Which data are trained on, and how they reach the network."""

    store: Path
    phantom: PhantomSpec | None = None
    image: ImageSpec = ImageSpec()
    split: SplitSpec
    sampling: SamplingSpec = SamplingSpec()
    ignore_label: int | None = Field(None, ge=1, le=255)
    batch_size: Positive = 8
    workers: int = Field(0, ge=0)
    resident: Literal["auto"] | bool = "auto"


class OptimizerSpec(Closed):
    """The optimizer; its defaults are those of the published protocol."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = Field(1e-3, gt=0)
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    momentum: Fraction = 0.9
    nesterov: bool = True


class ScheduleSpec(Closed):
    """The learning rate over the training, as a factor on `optimizer.lr`."""

    name: Literal["constant", "cosine", "polynomial", "step"] = "constant"
    warmup_epochs: float = Field(0.0, ge=0)
    power: float = Field(0.9, gt=0)
    final_factor: float = Field(0.0, ge=0, le=1)
    milestones: tuple[Positive, ...] = ()
    gamma: float = Field(0.1, gt=0, le=1)

    @model_validator(mode="after")
    def _steps_have_milestones(self) -> ScheduleSpec:
        if (self.name == "step") != bool(self.milestones):
            raise ValueError("milestones (epochs) belong to the schedule 'step', and it needs them")
        return self


class TrainingSpec(Closed):
    """How long, on what, and how exactly the network is trained."""

    epochs: Positive = 30
    precision: Literal["auto", "32", "bf16", "16"] = "auto"
    accumulate: Positive = 1
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    compile: bool | Literal["reduce-overhead", "max-autotune"] = False
    keep_memory: bool = True
    deterministic: bool = False
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    devices: Positive = 1
    num_nodes: Positive = 1
    validate_every: Positive = 1
    checkpoint_minutes: Annotated[float, Field(gt=0)] | None = 30.0
    progress: bool = True

    @model_validator(mode="before")
    @classmethod
    def _older_switch(cls, content: Any) -> Any:
        # A run directory of before has the switch that `memory_format` replaced; both are refused.
        if not isinstance(content, dict) or "memory_format" in content:
            return content
        if isinstance(last := content.get("channels_last"), bool):
            content = {key: content[key] for key in content if key != "channels_last"}
            content["memory_format"] = "channels_last" if last else "contiguous"
        return content

    @field_validator(
        "precision",
        mode="before",
        json_schema_input_type=Literal["auto", "32", "bf16", "16", 32, 16],
    )
    @classmethod
    def _number_as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value


class EvaluationSpec(Closed):
    """How a trained network is judged."""

    empty: Literal["one", "zero", "nan"] = "one"
    metrics: tuple[Literal["surface", "calibration"], ...] = ("surface", "calibration")
    missing: Literal["diagonal", "nan"] = "diagonal"
    tolerance: float = Field(2.0, ge=0)
    bins: Positive = 15
    confidence: float = Field(0.95, gt=0, lt=1)
    resamples: int = Field(10_000, ge=100)
    batch_size: Positive = 8


class RunConfig(Closed):
    """What every run has, with labels or without.

    `{seed}` and `{name}` in `run` stand for the values of those keys.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    run: str = "runs/{name}"
    seed: int = Field(0, ge=0, lt=2**32)
    data: DataSpec
    network: NetworkSpec = UNetSpec()
    regularization: RegularizationSpec = RegularizationSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    training: TrainingSpec = TrainingSpec()

    @model_validator(mode="after")
    def _epochs_are_validated(self) -> RunConfig:
        if self.training.validate_every > self.training.epochs:
            raise ValueError(
                f"training.validate_every is {self.training.validate_every}, but training.epochs "
                f"is {self.training.epochs}: no epoch would be validated"
            )
        return self

    @property
    def run_path(self) -> Path:
        """The run directory."""
        return Path(self.run.replace("{seed}", str(self.seed)).replace("{name}", self.name))

    def to_yaml(self) -> str:
        """Return the resolved configuration, every default written out."""
        return write_yaml(self.model_dump(mode="json"))


class Config(RunConfig):
    """A whole run: a network is trained with labels, and judged."""

    evaluation: EvaluationSpec = EvaluationSpec()

    @model_validator(mode="after")
    def _batches_can_be_mixed(self) -> Config:
        if self.regularization.mix_token is not None and self.data.batch_size < 2:
            raise ValueError(
                "regularization.mix_token mixes images of a batch, and data.batch_size is "
                f"{self.data.batch_size}; give at least 2"
            )
        return self

    @model_validator(mode="after")
    def _outputs_have_weights(self) -> Config:
        weights, network = self.regularization.error.supervision, self.network
        if isinstance(network, ForeignSpec):
            return self
        deep = isinstance(network, UNet3PlusSpec) and network.deep_supervision
        if isinstance(weights, str):
            if weights != "equal" and not deep:
                raise ValueError(
                    f"regularization.error.supervision is {weights!r}, which changes nothing: the "
                    "network has 1 output (no deep_supervision)"
                )
            return self
        outputs = len(network.channels) if deep else 1
        if len(weights) != outputs:
            raise ValueError(
                f"regularization.error.supervision has {len(weights)} weights, the network has "
                f"{outputs} outputs" + ("" if deep else " (no deep_supervision)")
            )
        return self


SomeConfig = TypeVar("SomeConfig", bound=RunConfig)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file and apply overrides such as `training.epochs=3`.

    Raises:
        MedsegError: the file is missing, is not YAML, or a key or value is wrong; the message
            names the file, the line, the key, what was found, and the nearest right key.
    """
    return load_as(Config, path, overrides)


def load_as(model: type[SomeConfig], path: Path, overrides: Sequence[str] = ()) -> SomeConfig:
    """Read a configuration of some kind, as `load_config` does."""
    content, lines = read_yaml(path)
    content = with_overrides(content, overrides)
    return parse_as(model, content, str(path), origins(path, lines, overrides))


def parse_config(content: Any, origin: str, places: Origins | None = None) -> Config:
    """Validate the content of a configuration; `origin` names it in errors."""
    return parse_as(Config, content, origin, places)


def parse_as(
    model: type[SomeConfig], content: Any, origin: str, places: Origins | None = None
) -> SomeConfig:
    """Validate the content of a configuration of some kind; `origin` names it in errors."""
    if not isinstance(content, dict):
        raise MedsegError(f"{origin}: holds no configuration, but {type(content).__name__}.")
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise MedsegError(explain(error, model, origin, places or {})) from None


def main(arguments: Sequence[str]) -> None:
    """Print the JSON Schema, or check a configuration and print it resolved."""
    if list(arguments) == ["--schema"]:
        json.dump(Config.model_json_schema(), sys.stdout, indent=2)
        print()
        return
    usage = "usage: python -m medseg_reg.config --schema | FILE [key.sub=value ...]"
    if list(arguments) in (["--help"], ["-h"]):
        print(f"{usage}\n\n{(main.__doc__ or '').strip()}")
        return
    if not arguments or arguments[0].startswith("-"):
        raise MedsegError(usage)
    path, overrides = Path(arguments[0]), arguments[1:]
    print(_load_any(path, overrides).to_yaml(), end="")


def _load_any(path: Path, overrides: Sequence[str]) -> RunConfig:
    """Read the configuration of whichever command a file is for."""
    kind = kind_of(read_yaml(path)[0])
    if kind == "pre-training":
        from medseg_reg.config_pretraining import load_pretraining

        return load_pretraining(path, overrides)
    if kind == "classification":
        from medseg_reg.config_classification import load_classification

        return load_classification(path, overrides)
    return load_config(path, overrides)


if __name__ == "__main__":
    run_main(main)

"""The typed, closed configuration of a study: which runs there are, and how they are run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from medseg_reg.config_base import Closed, Fraction, Positive
from medseg_reg.config_file import explain, origins, read_yaml, with_overrides, write_yaml
from medseg_reg.config_regularization import LayerSpec
from medseg_reg.errors import MedsegError
from medseg_reg.study.idle_keys import require_no_idle_grids, require_no_idle_keys
from medseg_reg.study.method_grid import expand_methods

Seed = Annotated[int, Field(ge=0, lt=2**32)]
Rate = Annotated[float, Field(gt=0, lt=1)]
Metric = Literal[
    "dice",
    "iou",
    "precision",
    "recall",
    "volume_difference",
    "volume_difference_ml",
    "hd95",
    "assd",
    "surface_dice",
    "ece",
]
METRICS: tuple[Metric, ...] = (
    *("dice", "iou", "precision", "recall", "volume_difference", "hd95", "assd"),
    *("surface_dice", "ece"),
)
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Named = Annotated[str, Field(pattern=NAME)]


Spec = TypeVar("Spec", bound="ManyRuns")


def _as_dataset(value: Any) -> Any:
    return {"config": value} if isinstance(value, str) else value


def _as_method(value: Any) -> Any:
    """Return what a list of layers, or the name of a file with a method, stands for."""
    if isinstance(value, str):
        try:
            value = read_yaml(Path(value))[0]
        except MedsegError as error:
            raise ValueError(str(error)) from None
    if value is None:
        raise ValueError("nothing stands there; a method without regularizer is written `[]`")
    return {"architecture": value} if isinstance(value, list) else value


def _own_network() -> dict[str, dict[str, Any]]:
    return {"unet": {}}


def _as_nothing(value: Any) -> Any:
    return {} if value is None else value


def as_seeds(value: Any) -> Any:
    """Return the seeds that a number stands for.

    >>> as_seeds(3), as_seeds([5, 7])
    ([0, 1, 2], [5, 7])
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        return value
    if isinstance(value, str) or value < 1:
        raise ValueError("give a number of seeds, 1 or more, or a list such as [0, 1]")
    return list(range(value))


class DatasetSpec(Closed):
    """A data set: a configuration of a run, and what is changed in it.

    Attributes:
        config: a file as in configs/; without one, `overrides` hold everything that is needed.
        overrides: keys as `training.epochs`, and their values; not those that the study sets.
        networks: those of the study's networks that are trained on these data; all by default.
    """

    config: Path | None = None
    overrides: dict[str, Any] = Field(default_factory=dict)
    networks: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _something_to_train_on(self) -> DatasetSpec:
        if self.config is None and not self.overrides:
            raise ValueError("give a config, such as configs/hippocampus.yaml, or overrides")
        return self


class MethodSpec(Closed):
    """A method: the regularizer layers, and what else it changes in the regularization.

    In the file of a study it may be a list of layers alone, or the name of a file, such as the
    `method.yaml` of a search, that holds one or the other.

    Attributes:
        architecture: as `regularization.architecture` of a run, instead of that of the data set.
        overrides: keys below `regularization`, and their values. Others would give a method
            another budget than its rivals.
    """

    architecture: tuple[LayerSpec, ...] = ()
    overrides: dict[str, Any] = Field(default_factory=dict)

    @field_validator("overrides")
    @classmethod
    def _budgets_stay_equal(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in value:
            if not key.startswith("regularization.") or key.startswith(
                "regularization.architecture"
            ):
                raise ValueError(
                    f"{key}: a method may change keys below regularization alone, so that all "
                    "methods have equal budgets; its layers stand in 'architecture'"
                )
        return value

    @property
    def is_baseline(self) -> bool:
        """Whether this method adds nothing at all."""
        return not self.architecture and not self.overrides


class BudgetSpec(Closed):
    """What every run of the study gets; what is left out is as the data set's file has it."""

    epochs: Positive | None = None
    batch_size: Positive | None = None


class CoadaptationSpec(Closed):
    """How trained networks are tested for co-adaptation, and how far they over-fit.

    Attributes:
        part: the part of the split whose cases are taken for feature maps set to zero and for the
            correlation of feature maps; gaps are between `train` and `val`.
        rates: shares of the feature maps before the output layer that are set to zero.
        draws: how often the feature maps are drawn for each rate.
        seed: of the draws.
    """

    part: Literal["test", "val"] = "test"
    rates: tuple[Fraction, ...] = Field((0.0, 0.1, 0.2, 0.3, 0.4, 0.5), min_length=1)
    draws: Positive = 10
    seed: Seed = 0


class ManyRuns(Closed):
    """What goes through many runs, several at a time. `{name}` in `run` stands for the name.

    Attributes:
        name: of the whole.
        run: its directory.
        workers: runs at a time, where there are no GPUs.
        threads: CPU threads of each run.
        gpus: how many GPUs are used; 0 trains on the CPU.
        runs_per_gpu: runs at a time on each GPU.
    """

    name: Named
    run: str
    workers: Positive = 1
    threads: Positive = 1
    gpus: int = Field(0, ge=0)
    runs_per_gpu: Positive = 1

    @property
    def directory(self) -> Path:
        """The directory of the whole."""
        return Path(self.run.replace("{name}", self.name))

    @property
    def at_a_time(self) -> int:
        """How many runs go on at a time."""
        return self.gpus * self.runs_per_gpu if self.gpus else self.workers


class StudySpec(ManyRuns):
    """A whole study. `{name}` in `run` stands for the study's name.

    Attributes:
        datasets: by name.
        networks: by name, each with keys of the group `network`, laid over those of the data set;
            empty is the data set's own network.
        methods: by name; one of them, `baseline`, has no regularizer. In a file, one with a `grid`
            stands for several; see `expand_methods`.
        baseline: what the others are compared with.
        seeds: a list, or a number n for 0 ... n-1.
        folds: cross-validation with so many folds, instead of the data set's split, of which only
            `seed` and `train_frames` stay.
        splits: seeds of the draw of the split (`data.split.seed`); all seeds run on each.
        budget: equal for all runs.
        equal_rates: the share that every layer of every method shall drop; see `equal_rates`.
        overrides: keys and values for all runs; what the rest of the study sets is refused here.
        threads: see `ManyRuns`, as the other attributes; half of the cores by default.
        metrics: the scores in results.csv, as far as a run has them.
        coadaptation: whether and how that is tested.
    """

    run: str = "runs/studies/{name}"
    datasets: dict[Named, Annotated[DatasetSpec, BeforeValidator(_as_dataset)]] = Field(
        min_length=1
    )
    networks: dict[Named, Annotated[dict[str, Any], BeforeValidator(_as_nothing)]] = Field(
        default_factory=_own_network, min_length=1
    )
    methods: dict[Named, Annotated[MethodSpec, BeforeValidator(_as_method)]] = Field(min_length=1)
    baseline: str = "none"
    seeds: Annotated[tuple[Seed, ...], BeforeValidator(as_seeds)] = Field((0,), min_length=1)
    folds: Annotated[int, Field(ge=2)] | None = None
    splits: tuple[Seed, ...] = ()
    budget: BudgetSpec = BudgetSpec()
    equal_rates: Rate | None = None
    overrides: dict[str, Any] = Field(default_factory=dict)
    threads: Positive = Field(default_factory=lambda: max(1, (os.cpu_count() or 1) // 2))
    metrics: tuple[Metric, ...] = Field(METRICS, min_length=1)
    coadaptation: CoadaptationSpec | None = None

    @field_validator("methods", mode="before")
    @classmethod
    def _grids_are_written_out(cls, value: Any) -> Any:
        return expand_methods(value) if isinstance(value, dict) else value

    @model_validator(mode="before")
    @classmethod
    def _rates_are_given_once(cls, content: Any) -> Any:
        # As it is written: read, the methods stand in the place of their grids.
        require_no_idle_grids(content)
        return content

    @model_validator(mode="after")
    def _there_is_a_baseline(self) -> StudySpec:
        found = self.methods.get(self.baseline)
        if found is None:
            raise ValueError(
                f"no method is the baseline '{self.baseline}'. Add `{self.baseline}: []` to "
                "methods, or name another method without regularizer as 'baseline'"
            )
        if not found.is_baseline:
            raise ValueError(
                f"the baseline '{self.baseline}' has a regularizer; a baseline has none: "
                f"`{self.baseline}: []`"
            )
        return self

    @model_validator(mode="after")
    def _names_are_known(self) -> StudySpec:
        for name, data in self.datasets.items():
            for network in data.networks or ():
                if network not in self.networks:
                    raise ValueError(
                        f"datasets.{name}.networks has '{network}', which is none of the networks "
                        f"{', '.join(self.networks)}"
                    )
        for key in ("seeds", "splits"):
            values = getattr(self, key)
            if len(set(values)) != len(values):
                raise ValueError(f"{key}: one number stands there twice")
        if self.folds is not None and self.splits:
            raise ValueError("folds and splits are both given; keep one")
        return self

    @model_validator(mode="after")
    def _the_headline_is_there(self) -> StudySpec:
        if "dice" not in self.metrics:
            raise ValueError("metrics: DICE is the headline of the report; add 'dice'")
        return self

    @model_validator(mode="after")
    def _runs_keep_their_places(self) -> StudySpec:
        # Set by the grid for each run; given here, they would silently do nothing.
        groups = [self.overrides, *(one.overrides for one in self.datasets.values())]
        for key in (key for group in groups for key in group):
            if key in ("run", "seed", "name"):
                raise ValueError(f"overrides: '{key}' is set for each run by the study itself")
        require_no_idle_keys(self)
        return self

    def to_yaml(self) -> str:
        """Return the resolved study, every default written out."""
        return write_yaml(self.model_dump(mode="json"))


def load_study(path: Path, overrides: Sequence[str] = ()) -> StudySpec:
    """Read a study file and apply overrides such as `workers=2`; errors as of `read_spec`."""
    return read_spec(StudySpec, "study", path, overrides)


def read_spec(model: type[Spec], what: str, path: Path, overrides: Sequence[str]) -> Spec:
    """Read a file that describes many runs.

    Args:
        model: of the file.
        what: the word for it in errors.
        path: the file.
        overrides: such as `workers=2`.

    Raises:
        MedsegError: the file is missing, is not YAML, or a key or value is wrong; the message
            names the file, the line, the key, what was found, and the nearest right key.
    """
    content, lines = read_yaml(path)
    content = with_overrides(content, overrides)
    if not isinstance(content, dict):
        found = "is empty" if content is None else f"holds no {what}, but {type(content).__name__}"
        raise MedsegError(f"{path}: {found}.")
    try:
        return model.model_validate(content)
    except ValidationError as error:
        places = origins(path, lines, overrides)
        raise MedsegError(explain(error, model, str(path), places)) from None

"""The typed, closed configuration of a search: which parameters, which values, how many trials."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from medseg_reg.config_base import Closed, Positive
from medseg_reg.study.grid import flow
from medseg_reg.study.idle_keys import is_below, leaves
from medseg_reg.study.samplers import SAMPLERS, ControllerSpec, EvolutionSpec
from medseg_reg.study.spec import ManyRuns, Seed, as_seeds, read_spec

_OTHER_CASES = "it decides what is validated on, so the scores could not be compared"
_OTHER_SCORE = "it decides how the score is taken, so the scores could not be compared"
_NO_MATTER = "it says how a training is carried out, not what is trained"
# No hyper-parameters: the highest score would say nothing about the value.
NOT_SEARCHED = {
    "name": "it is a name",
    **dict.fromkeys(("data.store", "data.phantom", "data.split", "data.image"), _OTHER_CASES),
    **dict.fromkeys(
        (
            *("evaluation", "data.ignore_label"),
            *("training.validate_every", "regularization.optimization.select"),
        ),
        _OTHER_SCORE,
    ),
    **dict.fromkeys(("data.workers", "data.resident"), _NO_MATTER),
    **dict.fromkeys(
        (
            *("training.accelerator", "training.devices", "training.num_nodes"),
            *("training.compile", "training.keep_memory", "training.deterministic"),
            *("training.memory_format", "training.checkpoint_minutes", "training.progress"),
        ),
        _NO_MATTER,
    ),
}


class RangeSpec(Closed):
    """The values between two numbers, for `optuna`."""

    low: float
    high: float
    log: bool = False
    integer: bool = False

    @model_validator(mode="after")
    def _low_is_lower(self) -> RangeSpec:
        if self.low >= self.high or (self.log and self.low <= 0):
            raise ValueError("low must be below high, and above 0 where log is on")
        return self


class ChoiceSpec(Closed):
    """A list of values."""

    values: tuple[Any, ...]

    @field_validator("values")
    @classmethod
    def _each_stands_there_once(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if not values:
            raise ValueError("the list is empty; give at least one value")
        written = [flow(value) for value in values]
        if twice := [one for number, one in enumerate(written) if one in written[:number]]:
            raise ValueError(f"{twice[0]} stands there twice")
        return values


def _as_mapping(value: Any) -> Any:
    if isinstance(value, list):
        return {"values": value}
    if not isinstance(value, dict | ChoiceSpec | RangeSpec):
        raise ValueError("give a list of values, or a range as {low: 0.1, high: 0.5}")
    return value


def _kind(value: Any) -> str:
    listed = isinstance(value, ChoiceSpec) or (isinstance(value, dict) and "values" in value)
    return "list" if listed else "range"


Parameter = Annotated[
    Annotated[ChoiceSpec, Tag("list")] | Annotated[RangeSpec, Tag("range")],
    Discriminator(_kind),
    BeforeValidator(_as_mapping),
]


class SearchSpec(ManyRuns):
    """A search. `{name}` in `run` stands for its name.

    Attributes:
        config: the configuration of a run, as in configs/.
        overrides: what is changed in it for all trials; not `seed` and `run`, nor what is
            searched.
        parameters: keys of a run's configuration, each with a list of values or a range. Keys
            that change what is validated on, or how, and those that do not change what is
            trained, are refused.
        method: `grid` tries all combinations of the lists; the others draw `trials`: `optuna`
            (tree-structured Parzen estimator; Bergstra et al., NeurIPS 2011) from lists and
            ranges, and `controller` (AutoDropout's policy gradient), `random` and `evolution`
            (regularized evolution) from lists.
        trials: how many are drawn; refused beside `grid`, as the next two.
        together: how many trials go on at a time. With `optuna` one is drawn when the scores of all
            but the `together - 1` before it are known; the other methods draw a round of so many
            when the scores of all before are known. By default as many as `workers`, or the
            GPUs, have room for. For a cluster, say how many.
        sampler_seed: of the draws.
        controller: settings of `controller`; may stand beside the three that draw from lists, so
            that one file serves them all. Likewise the next.
        evolution: settings of `evolution`.
        monitor: the validation score, at the epoch whose weights the run keeps.
        seeds: of the trainings of each trial.

    The other attributes are those of `ManyRuns`.
    """

    run: str = "runs/searches/{name}"
    config: Path
    overrides: dict[str, Any] = Field(default_factory=dict)
    parameters: dict[str, Parameter] = Field(min_length=1)
    method: Literal["grid", "optuna", "controller", "random", "evolution"] = "grid"
    trials: Positive = 20
    together: Positive | None = None
    sampler_seed: Seed = 0
    controller: ControllerSpec = ControllerSpec()
    evolution: EvolutionSpec = EvolutionSpec()
    monitor: Literal["val_dice", "val_iou"] = "val_dice"
    seeds: Annotated[tuple[Seed, ...], BeforeValidator(as_seeds)] = Field((0,), min_length=1)

    @model_validator(mode="after")
    def _only_optuna_takes_ranges(self) -> SearchSpec:
        ranges = [key for key, one in self.parameters.items() if isinstance(one, RangeSpec)]
        if self.method != "optuna" and ranges:
            who = "a grid" if self.method == "grid" else f"method: {self.method}"
            raise ValueError(f"{ranges[0]} is a range: {who} needs lists, or set method: optuna")
        return self

    @model_validator(mode="after")
    def _evolution_gets_beyond_its_first_population(self) -> SearchSpec:
        if self.method == "evolution" and self.trials <= self.evolution.population:
            raise ValueError(
                f"{self.trials} trials and a population of {self.evolution.population}: all would "
                "be drawn at random. Take more trials, or a smaller evolution.population"
            )
        return self

    @model_validator(mode="after")
    def _no_key_does_nothing(self) -> SearchSpec:
        for place in ("parameters", "overrides"):
            for key, hint in (("seed", "List them in 'seeds'"), ("run", "Set 'run' of the search")):
                if key in getattr(self, place):
                    raise ValueError(
                        f"{place}: '{key}' is set for each run by the search itself. {hint}"
                    )
        for key in ("trials", "together", "sampler_seed"):
            if self.method == "grid" and key in self.model_fields_set:
                raise ValueError(
                    f"{key} does nothing with method: grid, which tries all combinations. "
                    "Leave it out, or set method: optuna"
                )
        for key in ("controller", "evolution"):
            if self.method not in SAMPLERS and key in self.model_fields_set:
                raise ValueError(
                    f"{key} does nothing with method: {self.method}. Leave it out, or set "
                    f"method: {key}"
                )
        for key in leaves(self.overrides):
            if any(is_below(key, one) for one in self.parameters):
                raise ValueError(f"overrides: '{key}' would do nothing: it is searched")
        return self

    @model_validator(mode="after")
    def _only_parameters_are_searched(self) -> SearchSpec:
        for name, parameter in self.parameters.items():
            for key in _keys(name, parameter):
                for group, why in NOT_SEARCHED.items():
                    if is_below(key, group) or is_below(group, key):
                        raise ValueError(
                            f"parameters: '{key}' is no parameter to be searched: {why}. Set it in "
                            "'overrides'"
                        )
        return self

    @model_validator(mode="after")
    def _seeds_differ(self) -> SearchSpec:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds: one number stands there twice")
        return self

    @property
    def lists(self) -> dict[str, tuple[Any, ...]]:
        """The values of the parameters that have lists."""
        found = self.parameters.items()
        return {key: one.values for key, one in found if isinstance(one, ChoiceSpec)}

    @property
    def trials_at_a_time(self) -> int:
        """How many trials go on at a time, where they are drawn."""
        return self.together or math.ceil(self.at_a_time / len(self.seeds))


def _keys(name: str, parameter: ChoiceSpec | RangeSpec) -> Iterator[str]:
    """Go through all keys that a parameter sets; a value may be a whole group."""
    values = parameter.values if isinstance(parameter, ChoiceSpec) else (parameter.low,)
    for value in values:
        yield from leaves({name: value})


def load_search(path: Path, overrides: Sequence[str] = ()) -> SearchSpec:
    """Read the file of a search; errors name the file, the line and the key."""
    return read_spec(SearchSpec, "search", path, overrides)

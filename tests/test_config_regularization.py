"""Schedules and ramps of layers, and penalties, are read as written or refused with a mend."""

from __future__ import annotations

import inspect
import json
from typing import Any

import jsonschema
import pytest
import yaml

from medseg_reg.config import Config, parse_config
from medseg_reg.config_file import write_yaml
from medseg_reg.config_regularization import DepthRampSpec, LayerSpec, RateScheduleSpec
from medseg_reg.errors import MedsegError
from medseg_reg.regularizers import build, regularizer_class, regularizer_names
from tests.test_config import content, load, refusal


def layers(text: str, *overrides: str) -> tuple[LayerSpec, ...]:
    """Read one layer, written as the inside of braces, and some overrides."""
    text = f"regularization: {{architecture: [{{name: dropout, p: 0.2{text}}}]}}"
    return load(text, *overrides).regularization.architecture


def test_a_layer_keeps_its_rate_by_default() -> None:
    (layer,) = layers("")
    assert layer.schedule == RateScheduleSpec(name="constant")
    assert layer.depth_ramp is None
    assert layer.parameters == {"p": 0.2}


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        (", schedule: linear", {"name": "linear"}),
        (", schedule: {name: linear}", {"name": "linear"}),
        (", schedule: {name: cosine, start: 0.1, duration: 0.3}",
         {"name": "cosine", "start": 0.1, "duration": 0.3}),
        (", schedule: {name: v_shape, turn: 0.5}", {"name": "v_shape", "turn": 0.5}),
        (", schedule: v_shape", {"name": "v_shape", "turn": 0.1}),
    ],
)  # fmt: skip
def test_a_schedule_is_a_name_or_a_group(text: str, schedule: dict[str, Any]) -> None:
    (layer,) = layers(text)
    assert layer.schedule == RateScheduleSpec(**schedule)
    assert layer.parameters == {"p": 0.2}


@pytest.mark.parametrize(
    ("text", "ramp"),
    [
        ("{}", {"first": 0.0, "last": 1.0}),
        ("{first: 1, last: 0}", {"first": 1.0, "last": 0.0}),
        ("{first: 0.5}", {"first": 0.5, "last": 1.0}),
    ],
)
def test_a_depth_ramp_has_two_ends(text: str, ramp: dict[str, float]) -> None:
    assert layers(f", depth_ramp: {text}")[0].depth_ramp == DepthRampSpec(**ramp)


def test_schedules_ramps_and_penalties_are_read_back_as_written() -> None:
    config = load(
        "regularization:\n"
        "  architecture:\n"
        "    - {name: dropout, schedule: {name: cosine, duration: 0.3}, depth_ramp: {first: 0.2}}\n"
        "    - {name: dropout, places: head, schedule: v_shape}\n"
        "  penalty: {l1: 1e-5, weight_decay: 1e-4}\n"
    )
    assert parse_config(yaml.safe_load(config.to_yaml()), "again") == config


def test_overrides_reach_into_a_schedule() -> None:
    key = "regularization.architecture.0.schedule"
    assert layers("", f"{key}=linear")[0].schedule.name == "linear"
    (layer,) = layers("", f"{key}.name=linear", f"{key}.duration=0.5")
    assert layer.schedule == RateScheduleSpec(name="linear", duration=0.5)


@pytest.mark.parametrize(
    ("text", "key", "message"),
    [
        (", schedule: lineer", "schedule.name", "Did you mean 'linear'"),
        (", schedule: {name: v_shpe}", "schedule.name", "Did you mean 'v_shape'"),
        (", schedule: {nam: linear}", "schedule.nam", "Did you mean 'name'"),
        (
            ", schedule: {name: linear, durtion: 1}",
            "schedule.durtion",
            "Did you mean 'duration'? Known here: name, start, duration, turn.",
        ),
        (", schedule: {name: linear, duration: 0}", "schedule.duration", "greater than 0"),
        (", schedule: {name: linear, duration: 1.5}", "schedule.duration", "less than or equal"),
        (", schedule: {name: linear, start: 1}", "schedule.start", "less than 1"),
        (", schedule: {name: linear, start: -1}", "schedule.start", "greater than or equal to 0"),
        (", schedule: {name: linear, start: .nan}", "schedule.start", "finite"),
        (", schedule: {name: v_shape, turn: 1}", "schedule.turn", "less than 1"),
        (
            ", schedule: {duration: 0.5}",
            "schedule",
            "'duration' belongs to linear and cosine, the schedule is 'constant'",
        ),
        (", schedule: {name: linear, turn: 0.5}", "schedule", "'turn' belongs to v_shape"),
        (", schedule: {name: v_shape, start: 0.5}", "schedule", "'start' belongs to linear and"),
        (", schedule: 3", "schedule", "valid dictionary"),
        (", schedule: null", "schedule", "valid dictionary"),
        (", depth_ramp: {firts: 1}", "depth_ramp.firts", "Did you mean 'first'"),
        (", depth_ramp: {last: 1.5}", "depth_ramp.last", "less than or equal to 1"),
        (", depth_ramp: {first: yes}", "depth_ramp.first", "a switch is no number"),
        (", depth_ramp: {last: 0}", "depth_ramp", "nothing would be dropped"),
        (", depth_ramp: 0.5", "depth_ramp", "valid dictionary"),
    ],
)
def test_a_wrong_schedule_or_ramp_is_named(text: str, key: str, message: str) -> None:
    with pytest.raises(MedsegError) as error:
        layers(text)
    assert f"'regularization.architecture.0.{key}'" in str(error.value)
    assert message in str(error.value)
    assert "pydantic" not in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("schedul", "schedule"), ("depth_rmp", "depth_ramp"), ("plces", "places")],
)
def test_a_misspelt_key_of_any_layer_is_not_taken_for_a_parameter(wrong: str, right: str) -> None:
    with pytest.raises(
        MedsegError, match=f"parameter of dropout '{wrong}'; did you mean '{right}'"
    ):
        layers(f", {wrong}: linear")


@pytest.mark.parametrize("name", regularizer_names())
def test_a_layer_written_short_has_the_defaults_of_its_class(name: str) -> None:
    short = LayerSpec(name=name)
    assert repr(build(name, **short.parameters)) == repr(build(name))
    signature = inspect.signature(regularizer_class(name)).parameters
    assert list(short.parameters) == list(signature)
    # Read back from what is written, and written out, it is the same layer.
    written = parse_config(
        yaml.safe_load(write_yaml(content(regularization={"architecture": [short.model_dump()]}))),
        "again",
    )
    assert written.regularization.architecture == (short,)


def test_a_whole_number_is_the_number_that_it_is_a_default_of() -> None:
    written = LayerSpec(name="heuristic_dropout", k=2, bins=10)
    assert repr(written) == repr(LayerSpec(name="heuristic_dropout"))


def test_no_layer_has_a_parameter_that_the_configuration_keeps_for_itself() -> None:
    for name in regularizer_names():
        own = inspect.signature(regularizer_class(name)).parameters
        assert not set(own) & set(LayerSpec.model_fields), name


@pytest.mark.parametrize("key", ["weight_decay", "l1"])
def test_a_penalty_is_not_negative(key: str) -> None:
    said = refusal(f"regularization: {{penalty: {{{key}: -1}}}}")
    assert f"'regularization.penalty.{key}': input should be greater than or equal to 0" in said


def test_the_schema_knows_both_ways_to_write_a_schedule() -> None:
    schema = json.loads(json.dumps(Config.model_json_schema()))
    validator = jsonschema.Draft202012Validator(schema)

    def problems(layer: dict[str, Any]) -> list[Any]:
        group = {"architecture": [{"name": "dropout", **layer}]}
        return list(validator.iter_errors(content(regularization=group)))

    for right in (
        {"schedule": "linear"},
        {"schedule": {"name": "v_shape", "turn": 0.3}, "depth_ramp": {"first": 0.1}},
        {"depth_ramp": None},
    ):
        assert not problems(right), right
    for wrong in (
        {"schedule": "linar"},
        {"schedule": {"name": "linear", "durtion": 1}},
        {"schedule": {"turn": 2}},
        {"depth_ramp": {"firts": 1}},
        {"depth_ramp": 0.5},
    ):
        assert problems(wrong), wrong


def test_a_ramp_that_is_just_asked_for_is_the_default_one() -> None:
    assert layers(", depth_ramp: true")[0].depth_ramp == DepthRampSpec()
    assert layers(", depth_ramp: false")[0].depth_ramp is None

"""An override takes the place of one value, or says what is wrong with it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_reg.errors import MedsegError
from tests.test_config import load, refusal


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seed=7", "seed", 7),
        ("training.epochs=3", "training.epochs", 3),
        ("optimizer.lr=1e-4", "optimizer.lr", 1e-4),
        ("network.channels=[8, 16]", "network.channels", (8, 16)),
        ("network.channels.1=64", "network.channels", (4, 64, 16)),
        ("regularization.architecture=[]", "regularization.architecture", ()),
        ("training.checkpoint_minutes=null", "training.checkpoint_minutes", None),
        ("training.checkpoint_minutes=", "training.checkpoint_minutes", None),
        ("training.deterministic=true", "training.deterministic", True),
        ("run=a=b", "run", "a=b"),
        ("data.image={size: [64, 32]}", "data.image.size", (64, 32)),
        ("data.image.size=[64, 32]", "data.image.size", (64, 32)),
    ],
)
def test_an_override_takes_the_place_of_a_value(override: str, key: str, value: Any) -> None:
    text = (
        "network: {channels: [4, 8, 16]}\n"
        "regularization: {architecture: [{name: dropout, p: 0.1}]}\n"
    )
    found: Any = load(text, override)
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


def test_an_override_reaches_into_a_list_of_layers_and_leaves_the_rest() -> None:
    text = (
        "regularization: {architecture: [{name: dropout, p: 0.1},"
        " {name: heuristic_dropout, p: 0.1, k: 2}]}"
    )
    layers = load(text, "regularization.architecture.1.p=0.4").regularization.architecture
    assert layers[0].parameters == {"p": 0.1}
    assert layers[1].parameters["p"] == 0.4
    assert layers[1].parameters["k"] == 2


def test_the_last_override_counts() -> None:
    assert load("seed: 1", "seed=2", "seed=3").seed == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "override 'seed': expected key.sub=value, as in seed=1"),
        ("=3", "expected key.sub=value"),
        ("sead=3", "unknown key 'sead'. Did you mean 'seed'"),
        ("training.epoch=3", "unknown key 'training.epoch'. Did you mean 'epochs'"),
        ("network.channels.3=9", "'3' is not an index of a list of 3 entries"),
        ("network.channels.last=9", "'last' is not an index"),
        ("network.channels.-1=9", "'-1' is not an index"),
        ("name.x=1", "'x' lies below a single value"),
        ("seed=[", "override 'seed=[':1: is not valid YAML"),
        ("name=2020-13-45", "override 'name=2020-13-45': is not valid YAML: month"),
        ("training={epochs: 1, epochs: 2}", "'epochs' is given a second time"),
        ("seed=!!python/name:os.system", "is not valid YAML"),
        ("name=" + "[" * 3000, "nested too deeply"),
        ("seed=one", "'seed': input should be a valid integer"),
    ],
)
def test_a_wrong_override_says_what_is_wrong(override: str, message: str) -> None:
    said = refusal("network: {channels: [4, 8, 16]}", override)
    assert message in said
    assert len(said) < 400


@given(st.text(max_size=40))
@settings(max_examples=150, deadline=None)
def test_no_override_whatever_crashes_the_reader(text: str) -> None:
    try:
        load("", text)
    except MedsegError:
        return
    assert "=" in text

"""The closed registry: right names build, wrong ones say what was meant."""

import inspect
import sys

import pytest
import torch

from medseg_reg.regularizers import (
    Dropout,
    HeuristicDropout,
    Regularizer,
    build,
    register,
    regularizer_class,
    regularizer_names,
)


def test_the_registry_holds_the_published_names() -> None:
    assert set(regularizer_names()) >= {
        "heuristic_dropout",
        "corrdrop_spatial",
        "corrdrop_channel",
        "input_dropout",
        "dropout",
        "spatial_dropout",
    }
    assert list(regularizer_names()) == sorted(regularizer_names())


@pytest.mark.parametrize("name", regularizer_names())
def test_every_name_builds_with_defaults_and_shows_them(name: str) -> None:
    layer = build(name)
    assert type(layer) is regularizer_class(name)
    assert repr(layer).startswith(f"{type(layer).__name__}(p=")


def test_parameters_reach_the_class() -> None:
    layer = build("heuristic_dropout", p=0.2, k=3, mask="zero")
    assert isinstance(layer, HeuristicDropout)
    assert (layer.p, layer.k, layer.mask) == (0.2, 3.0, "zero")


@pytest.mark.parametrize("name", regularizer_names())
def test_the_functions_take_their_switches_in_one_order(name: str) -> None:
    rule = getattr(sys.modules[regularizer_class(name).__module__], name, None)
    if rule is None:
        assert name in {"dropout", "input_dropout"}, "a method has a function beside its module"
        return
    parameters = inspect.signature(rule).parameters
    positional = [n for n, q in parameters.items() if q.kind is q.POSITIONAL_OR_KEYWORD]
    assert positional[0] == "x"
    assert positional[-1] == "training"
    assert parameters["training"].default is True
    assert "faithful" not in positional


def test_an_unknown_name_gets_the_nearest_and_the_list() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'heuristic_dropout'\?.*choices: .*input_"):
        build("heuristc_dropout")
    with pytest.raises(ValueError, match=r"unknown regularizer 'zzz' \(choices: "):
        regularizer_class("zzz")


def test_an_unknown_parameter_gets_the_nearest_and_the_list() -> None:
    with pytest.raises(ValueError, match=r"'blocksize'; did you mean 'block_size'\?.*temperature"):
        build("corrdrop_spatial", blocksize=7)


@pytest.mark.parametrize("name", ["Dropout2", "drop out", "9lives", ""])
def test_a_name_is_a_lower_case_identifier(name: str) -> None:
    with pytest.raises(ValueError, match="lower_case identifier"):
        register(name)


def test_a_taken_name_and_a_foreign_class_are_refused() -> None:
    with pytest.raises(ValueError, match="already registered for Dropout"):
        register("dropout")(type("Other", (Regularizer,), {}))
    assert regularizer_class("dropout") is Dropout
    with pytest.raises(ValueError, match="not a subclass of Regularizer"):
        register("linear")(torch.nn.Linear)  # type: ignore[type-var]
    assert "linear" not in regularizer_names()


def test_a_class_without_its_rule_says_so() -> None:
    with pytest.raises(NotImplementedError, match=r"Regularizer must define regularize"):
        Regularizer(0.5)(torch.ones(1, 1, 1))

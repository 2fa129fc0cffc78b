"""What cannot be inserted is an error that says what to do, and changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from medseg_reg.errors import MedsegError
from medseg_reg.insertion import insert, inserted
from medseg_reg.regularizers import Dropout, HeuristicDropout, Regularizer
from tests.insertion.small import IMAGE, net


def modules(network: nn.Module) -> list[str]:
    return [name for name, _ in network.named_modules()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dropuot", "head"), "did you mean 'dropout'"),
        (("dropout", "heads"), "no place matches 'heads'. Did you mean 'head'"),
        (("dropout", ["head", "nowhere"]), r"Places: after_block \(5\), after_norm \(5\)"),
        (("dropout", "1"), "no place matches '1'"),
        (("dropout", []), "no places are given"),
        (("dropout", "path:up2"), "no module that runs matches 'path:up2'. Did you mean 'up[01]'"),
        (("dropout", ["head", "path:nowhere"]), "no module that runs matches"),
        ((nn.Dropout, "head"), "expected the name of a regularizer, or a Regularizer; got <class"),
        ((nn.Dropout(), "head"), "got Dropout"),
        ((7, "head"), "got 7"),
    ],
)
def test_a_wrong_name_is_an_error_that_changes_nothing(
    arguments: tuple[Any, Any], message: str
) -> None:
    network = net()
    before = modules(network)
    with pytest.raises(MedsegError, match=message):
        insert(network, *arguments, example=IMAGE)
    assert modules(network) == before


@pytest.mark.parametrize(
    ("regularizer", "parameters", "message"),
    [
        ("dropout", {"p": 1.5}, r"'dropout': Dropout: p is the share of units"),
        ("dropout", {"q": 0.5}, "unknown parameter of dropout 'q'"),
        (Dropout, {"p": -1}, "Dropout: p is the share"),
        (HeuristicDropout, {"q": 1}, "HeuristicDropout: .*unexpected keyword argument 'q'"),
        (Dropout(0.5), {"p": 0.2}, "a ready layer has its parameters; p were given"),
    ],
)
def test_a_wrong_parameter_is_an_error_that_changes_nothing(
    regularizer: Any, parameters: dict[str, Any], message: str
) -> None:
    network = net()
    before = modules(network)
    with pytest.raises(MedsegError, match=message):
        insert(network, regularizer, "head", example=IMAGE, **parameters)
    assert modules(network) == before


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (torch.rand(1, 1, 18, 16), r"\(1, 1, 18, 16\): RuntimeError: Sizes.*runs with 20x16: pad"),
        (torch.rand(1, 3, 16, 16), r"\(1, 3, 16, 16\): RuntimeError: Given groups=1"),
        (torch.rand(1, 16, 16), r"If the batch axis is missing, give example\[None\]"),
        (torch.rand(16, 16), r"expected a floating-point batch of images .*got torch.float32 \(16"),
        (torch.zeros(1, 1, 16, 16, dtype=torch.uint8), "got torch.uint8"),
        ({"y": IMAGE}, "TypeError: .*unexpected keyword argument 'y'"),
        ((), "got no tensor"),
    ],
)
def test_an_example_that_does_not_fit_is_an_error(example: Any, message: str) -> None:
    network = net()
    before = modules(network)
    with pytest.raises(MedsegError, match=message):
        insert(network, "dropout", "head", example=example)
    assert modules(network) == before
    assert all(module.training for module in network.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


class Broken(Regularizer):
    """Fails on maps smaller than 8 pixels."""

    def regularize(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] < 8:
            raise ArithmeticError("too small")
        return x * 2


def test_a_layer_that_fails_leaves_the_network_as_it_was() -> None:
    network = net()
    insert(network, "dropout", "head", example=IMAGE)
    before, state = repr(network), torch.get_rng_state()
    with pytest.raises(ArithmeticError, match="too small"):
        insert(network, Broken(0.5), "between_convs", example=IMAGE)
    assert repr(network) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert [one.place for one in inserted(network)] == ["head"]
    assert all(module.training for module in network.modules())


def test_a_compiled_network_is_an_error() -> None:
    network = net()
    with pytest.raises(MedsegError, match="is compiled. Insert first, then compile."):
        insert(torch.compile(network, backend="eager"), "dropout", "head", example=IMAGE)
    network.up0.compile(backend="eager")
    with pytest.raises(MedsegError, match=r"'up0' \(Up\) is compiled"):
        insert(network, "dropout", "head", example=IMAGE)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:FutureWarning")
def test_a_scripted_module_is_an_error() -> None:
    network = net()
    network.a = torch.jit.script(network.a)
    with pytest.raises(MedsegError, match="'a' is a scripted module"):
        insert(network, "dropout", "head", example=IMAGE)

"""Layers go into networks of other packages, at the places that their code has."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from medseg_reg.insertion import find_places, insert, inserted, remove
from tests.insertion.zoo import FAST, Case
from tests.insertion.zoo_more import SLOW

ALL = [
    *(pytest.param(case, id=name) for name, case in FAST.items()),
    *(pytest.param(case, id=name, marks=pytest.mark.slow) for name, case in SLOW.items()),
]
every_network = pytest.mark.parametrize("case", ALL)
with_places = pytest.mark.parametrize("case", [one for one in ALL if one.values[0].kinds])


def outputs(network: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    result = network(x)
    return [result] if isinstance(result, torch.Tensor) else list(result)


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def hooks(network: nn.Module) -> list[Any]:
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
    return [hook for m in network.modules() for name in names for hook in getattr(m, name)]


def everywhere(case: Case) -> list[str]:
    """The kinds of places of a network, without what sees the last map, or no map at all."""
    return [kind for kind in case.kinds if kind not in ("head", "attention")]


@every_network
def test_the_places_are_those_of_the_architecture(case: Case) -> None:
    network = case.network()
    places = find_places(network, case.example())
    # These two take layers of their own, in test_attention.py, test_patch_dropout.py and
    # test_token_merging.py.
    kinds = [one.kind for one in places if one.kind not in ("block_residual", "tokens")]
    assert Counter(kinds) == {"input": 1, **case.kinds}
    parts = Counter(
        place.name.split(".between_convs")[0] for place in places if place.kind == "between_convs"
    )
    assert parts == case.between
    assert len({place.name for place in places}) == len(places)
    sizes = {place.kind: place.map_size for place in places}
    assert sizes["input"] == case.shape
    assert all(place.tokens or len(place.map_size) == len(case.shape) for place in places)
    for place in places:
        network.get_submodule(place.path)


@every_network
def test_looking_for_places_changes_nothing(case: Case) -> None:
    network = case.network().train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    text, random = repr(network), torch.get_rng_state()
    find_places(network, case.example())
    assert torch.equal(torch.get_rng_state(), random)
    assert repr(network) == text
    assert all(module.training for module in network.modules())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not hooks(network)


@with_places
def test_a_filled_network_evaluates_as_before_and_trains_otherwise(case: Case) -> None:
    network, x = case.network(), case.example(2)
    plain = copy.deepcopy(network)
    report = insert(network, "spatial_dropout", everywhere(case), example=x[:1], p=0.3)
    assert len(report) == sum(case.kinds[kind] for kind in everywhere(case))
    # torchvision's ConvNeXt drops branches by itself, from the first, and MONAI's SwinUNETR has
    # wrong positions on maps below its window; nothing else is odd anywhere.
    drops = any(type(m).__name__ == "StochasticDepth" and m.p > 0 for m in plain.modules())
    windows = type(plain).__name__ == "SwinUNETR"
    assert bool(report.note) == (drops or windows)
    assert not drops or "by a StochasticDepth of its own; both rates act" in report.note
    assert not windows or "take the first of the relative positions" in report.note
    assert list(network.state_dict()) == list(plain.state_dict())
    network.load_state_dict(plain.state_dict())
    plain.load_state_dict(network.state_dict())
    with torch.no_grad():
        assert same(outputs(network.eval(), x), outputs(plain.eval(), x))
    network.train()
    torch.manual_seed(0)
    first = outputs(network, x)
    torch.manual_seed(1)
    assert not same(first, outputs(network, x))
    for one in (network, plain.train()):
        sum(y.square().mean() for y in outputs(one, x)).backward()
    got = {name: parameter.grad for name, parameter in network.named_parameters()}
    for name, parameter in plain.named_parameters():
        assert (parameter.grad is None) == (got[name] is None), name
        assert got[name] is None or got[name].isfinite().all(), name


@with_places
def test_copies_draw_alike_and_are_freed_again(case: Case) -> None:
    network, x = case.network(), case.example(2)
    before = repr(network)
    insert(network, "spatial_dropout", everywhere(case), example=x[:1], p=0.3)
    drawn = []
    for one in (network, copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        torch.manual_seed(3)
        with torch.no_grad():
            drawn.append(outputs(one.eval().train(), x))
        count = len(inserted(one))
        assert len(remove(one)) == count > 0
        assert repr(one) == before
        assert not hooks(one)
        assert not inserted(one)
    assert same(drawn[0], drawn[1])
    assert same(drawn[0], drawn[2])

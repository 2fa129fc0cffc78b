"""Every regularizer goes into every kind of network, trains there, and vanishes in evaluation."""

from __future__ import annotations

import copy

import pytest
import torch

from medseg_reg.insertion import insert, remove
from medseg_reg.regularizers import regularizer_class, regularizer_names
from tests.insertion.zoo import FAST, Case
from tests.insertion.zoo_more import SLOW

IN_EACH_RUN = ("BasicUNet", "DynUNet-residual")
NETWORKS = {name: case for name, case in {**FAST, **SLOW}.items() if case.kinds}
# Each method in each network takes a quarter of an hour: these meet every one of both.
PAIRS = [
    pytest.param(NETWORKS[network], method, id=f"{network}-{method}", marks=marks)
    for i, network in enumerate(NETWORKS)
    for j, method in enumerate(regularizer_names())
    for marks in ([() if network in IN_EACH_RUN else pytest.mark.slow])
    if network in IN_EACH_RUN or (i + j) % 5 == 0
]


def place_for(name: str, case: Case) -> str:
    """Return the layer's own place where the network has it, else the ends of its blocks."""
    cls = regularizer_class(name)
    own, known = cls.default_places[0], {"input", *case.kinds}
    if own not in known and (own == "residual" or cls.place_kinds):
        pytest.skip(f"the network has no place {own}")
    if own not in known and "after_block" not in known:
        pytest.skip("the network has no maps but its input")
    return own if own in known else "after_block"


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_a_method_trains_in_a_network_and_vanishes_in_evaluation(case: Case, name: str) -> None:
    axes = len(case.shape) - 1
    if axes not in regularizer_class(name).spatial_dims:
        pytest.skip(f"{name} is not for {axes} spatial axes")
    place = place_for(name, case)
    network, x = case.network(), case.example(2)
    plain = copy.deepcopy(network).eval()
    report = insert(network, name, place, example=x[:1], p=0.5)
    assert len(report) > 0
    assert list(network.state_dict()) == list(plain.state_dict())
    result = network.train()(x)
    outputs = [result] if isinstance(result, torch.Tensor) else list(result)
    sum(y.square().mean() for y in outputs).backward()
    grads = [p.grad for p in network.parameters() if p.grad is not None]
    assert grads
    assert all(grad.isfinite().all() for grad in grads)
    assert len(remove(network)) == len(report)
    network.load_state_dict(plain.state_dict())
    insert(network, name, place, example=x[:1], p=0.5)
    with torch.no_grad():
        ours, theirs = network.eval()(x), plain(x)
    if isinstance(ours, torch.Tensor):
        ours, theirs = [ours], [theirs]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

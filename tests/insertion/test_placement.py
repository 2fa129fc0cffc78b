"""Regularizers go where a pattern says, never unnoticed, and are measured without a trace."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from medseg_reg.errors import MedsegError
from medseg_reg.insertion import Placement, Slot, measure, place, slots
from medseg_reg.networks import UNet


def network(**more: Any) -> UNet:
    torch.manual_seed(0)
    return UNet(2, 1, 2, channels=(8, 12, 16), **more)


def filled(net: nn.Module) -> dict[str, list[str]]:
    return {
        name: [type(m).__name__ for m in slot] for name, slot in slots(net).items() if len(slot)
    }


@pytest.mark.parametrize(
    ("patterns", "places"),
    [
        (["input"], ["input"]),
        (["encoder.1.between_convs"], ["encoder.1.between_convs"]),
        (
            ["bottleneck.*"],
            [f"bottleneck.{p}" for p in ("between_convs", "after_norm", "after_block")],
        ),
        (["encoder.*.after_block"], ["encoder.0.after_block", "encoder.1.after_block"]),
        (["bottleneck"], ["bottleneck.after_block"]),
        (["encoder.1"], ["encoder.1.after_block"]),
        (["decoder"], ["decoder.0.after_block", "decoder.1.after_block"]),
        (["skip"], ["skip.0", "skip.1"]),
        (["skip.0"], ["skip.0"]),
        (["skip.?"], ["skip.0", "skip.1"]),
        (["skip.[!0]"], ["skip.1"]),
        (["head", "head", "he*"], ["head"]),
        (
            ["between_convs"],
            [
                f"{part}.between_convs"
                for part in ("encoder.0", "encoder.1", "bottleneck", "decoder.0", "decoder.1")
            ],
        ),
    ],
)
def test_a_pattern_fills_the_places_that_it_names_once(
    patterns: list[str], places: list[str]
) -> None:
    net = network()
    placements = place(net, "dropout", patterns, {"p": 0.3})
    assert sorted(p.place for p in placements) == sorted(places)
    assert filled(net) == {name: ["Dropout"] for name in slots(net) if name in places}
    for placement in placements:
        layer = net.get_submodule(placement.path)
        assert (type(layer).__name__, layer.p) == (placement.regularizer, placement.p)
        assert placement.p == 0.3


def test_a_star_alone_fills_every_place() -> None:
    net = network()
    assert len(place(net, "dropout", ["*"], {})) == len(slots(net)) == len(filled(net))


def test_every_place_gets_a_layer_of_its_own() -> None:
    net = network()
    placements = place(net, "dropout", ["between_convs"], {})
    assert len({id(net.get_submodule(p.path)) for p in placements}) == len(placements)


def test_a_second_regularizer_comes_after_the_first() -> None:
    net = network()
    first = place(net, "dropout", ["head"], {})
    second = place(net, "spatial_dropout", ["head"], {})
    assert filled(net) == {"head": ["Dropout", "SpatialDropout"]}
    assert [first[0].path, second[0].path] == ["head.0", "head.1"]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["betwen_convs"], "no place matches 'betwen_convs'. Did you mean 'between_convs'"),
        (["encodr.0.after_norm"], "Did you mean 'encoder.0.after_norm'"),
        (["bottlenec"], "Did you mean 'bottleneck'"),
        (["skips"], "Did you mean 'skip'"),
        (
            ["1"],
            r"matches '1'\. Places: after_block \(5\), after_norm \(5\), between_convs \(5\), "
            r"head, input, skip \(2\); in full",
        ),
        (["encoder."], "no place matches 'encoder.'"),
        (["encoder.7"], "Did you mean 'encoder.[01]'"),
        (["between_convs", "nowhere"], "no place matches 'nowhere'"),
        (["encoder.7.*"], "no place matches"),
        (["Input"], "no place matches 'Input'. Did you mean 'input'"),
        ([""], "no place matches ''"),
        ([], "no places are given"),
    ],
)
def test_a_pattern_without_a_place_is_an_error_that_changes_nothing(
    patterns: list[str], message: str
) -> None:
    net = network()
    with pytest.raises(MedsegError, match=message):
        place(net, "dropout", patterns, {})
    assert not filled(net)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("dropuot", {}, "did you mean 'dropout'"),
        ("dropout", {"q": 0.1}, "unknown parameter of dropout 'q'"),
        ("dropout", {"p": 1.5}, r"'dropout': Dropout: p is the share of units to drop"),
        ("heuristic_dropout", {"mask": "zeros"}, "'heuristic_dropout': .*zero"),
        ("corrdrop_spatial", {"block_size": "big"}, "block_size must be a whole number"),
    ],
)
def test_a_wrong_regularizer_is_an_error_that_changes_nothing(
    name: str, parameters: dict[str, Any], message: str
) -> None:
    net = network()
    before = repr(net)
    with pytest.raises(MedsegError, match=message):
        place(net, name, ["head", "between_convs"], parameters)
    assert repr(net) == before


def test_a_network_without_places_says_that_nothing_matches() -> None:
    with pytest.raises(MedsegError, match="no place matches"):
        place(nn.Sequential(nn.Conv2d(1, 1, 1)), "dropout", ["*"], {})


# Measuring


@pytest.mark.parametrize("name", ["dropout", "spatial_dropout", "corrdrop_spatial"])
def test_the_measured_rate_is_near_the_rate_asked_for(name: str) -> None:
    net = network()
    placements = place(net, name, ["between_convs"], {"p": 0.25})
    measure(net, torch.rand(1, 1, 64, 48), placements, draws=24)
    assert [p.map_size for p in placements] == [
        (8, 64, 48),
        (12, 32, 24),
        (16, 16, 12),
        (8, 64, 48),
        (12, 32, 24),
    ]
    for placement in placements:
        assert placement.measured_rate == pytest.approx(0.25, abs=0.08)


def test_the_measured_rate_is_the_mean_over_the_draws() -> None:
    rates = []
    for draws in (1, 400):
        net = network()
        placements = place(net, "spatial_dropout", ["input"], {"p": 0.25})
        measure(net, torch.rand(1, 1, 8, 8) + 1, placements, draws)
        rates.append(placements[0].measured_rate)
    assert rates[0] in (0.0, 1.0)
    assert rates[1] == pytest.approx(0.25, abs=0.07)


def test_a_rate_of_zero_is_measured_as_zero() -> None:
    net = network()
    placements = place(net, "dropout", ["head"], {"p": 0.0})
    measure(net, torch.rand(1, 1, 8, 8), placements)
    assert placements[0].measured_rate == 0.0


def test_measuring_leaves_no_trace() -> None:
    net = network()
    placements = place(net, "heuristic_dropout", ["*"], {"p": 0.3, "selection": "sampled"})
    net(torch.rand(4, 1, 16, 16))  # running statistics other than 0 and 1
    net.train()
    net.encoder[0].eval()
    modes = {name: module.training for name, module in net.named_modules()}
    state = {key: value.clone() for key, value in net.state_dict().items()}
    torch.manual_seed(9)
    random = torch.get_rng_state()
    measure(net, torch.rand(1, 1, 16, 16, generator=torch.Generator()), placements)
    assert torch.equal(torch.get_rng_state(), random)
    assert {name: module.training for name, module in net.named_modules()} == modes
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())


def test_measuring_does_not_seed_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    net, seeded = network(), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    measure(net, torch.rand(1, 1, 8, 8), place(net, "dropout", ["head"], {}))
    assert not seeded


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_measuring_on_a_gpu_leaves_its_generator_as_it_was() -> None:
    net = network().cuda()
    placements = place(net, "dropout", ["head"], {"p": 0.4})
    rates = []
    for seed in (1, 2):
        torch.cuda.manual_seed(seed)
        before = torch.cuda.get_rng_state()
        measure(net, torch.ones(1, 1, 32, 32, device="cuda"), placements)
        assert torch.equal(torch.cuda.get_rng_state(), before)
        rates.append(placements[0].measured_rate)
    assert rates[0] == rates[1] == pytest.approx(0.4, abs=0.05)


def test_measuring_gives_the_same_whatever_was_drawn_before() -> None:
    rates = []
    for seed in (1, 2):
        net = network()
        placements = place(net, "dropout", ["input", "head"], {"p": 0.4})
        torch.manual_seed(seed)
        measure(net, torch.ones(1, 1, 16, 16), placements)
        rates.append([p.measured_rate for p in placements])
    assert rates[0] == rates[1]


class Partial(nn.Module):
    """Has a place that its forward pass leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = Slot(), Slot()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def test_a_place_that_the_network_never_reaches_is_an_error() -> None:
    net = Partial()
    placements = place(net, "dropout", ["used", "unused"], {})
    with pytest.raises(MedsegError, match="Dropout at 'unused' was never reached"):
        measure(net, torch.ones(1, 1, 4), placements)


@pytest.mark.parametrize("failure", ["forward", "path"])
def test_a_failed_measurement_leaves_no_trace_either(failure: str) -> None:
    net = network()
    placements = place(net, "dropout", ["head"], {})
    if failure == "path":
        placements.append(Placement("head", "head.7", "Dropout", 0.5))
    random = torch.get_rng_state()
    with pytest.raises((RuntimeError, AttributeError)):
        measure(net, torch.rand(1, 5, 8, 8, generator=torch.Generator()), placements)
    assert all(module.training for module in net.modules())
    assert not any(module._forward_hooks for module in net.modules())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_report_is_plain_json() -> None:
    net = network()
    placements = place(net, "dropout", ["head"], {"p": 0.4})
    measure(net, torch.ones(1, 1, 8, 8), placements)
    report = json.loads(json.dumps(placements[0].as_dict(), allow_nan=False))
    assert report["place"] == "head"
    assert report["path"] == "head.0"
    assert report["regularizer"] == "Dropout"
    assert report["p"] == 0.4
    assert report["map_size"] == [8, 8, 8]
    assert 0.3 < report["measured_rate"] < 0.5


def test_a_slot_is_the_identity_while_it_is_empty() -> None:
    x = torch.ones(1, 1, 2)
    assert Slot()(x) is x

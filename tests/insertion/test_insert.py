"""Inserting: what can be named, what is reported, and that errors change nothing."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

from medseg_reg.errors import MedsegError
from medseg_reg.insertion import (
    Placement,
    PlacementReport,
    Slot,
    find_places,
    insert,
    inserted,
    remove,
)
from medseg_reg.networks import UNet
from medseg_reg.regularizers import (
    Dropout,
    Regularizer,
    SpatialDropout,
    regularizer_class,
    regularizer_names,
)
from tests.insertion.small import IMAGE, block, net

PARTS = ("encoder.0", "encoder.1", "bottleneck", "decoder.1", "decoder.0")


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("between_convs", [f"{part}.between_convs" for part in PARTS]),
        ("encoder.1.between_convs", ["encoder.1.between_convs"]),
        ("encoder.*.between_convs", ["encoder.0.between_convs", "encoder.1.between_convs"]),
        ("encoder", ["encoder.0.after_block", "encoder.1.after_block"]),
        ("decoder.1", ["decoder.1.after_block"]),
        ("bottleneck", ["bottleneck.after_block"]),
        ("skip", ["skip.1", "skip.0"]),
        ("skip.0", ["skip.0"]),
        (["input", "head", "inp*"], ["input", "head"]),
        ("path:up?.up", ["path:up1.up", "path:up0.up"]),
        (["path:a", "head", "input"], ["input", "head", "path:a"]),
        ("path:pool", ["path:pool"]),
    ],
)
def test_a_pattern_names_places(patterns: Any, expected: list[str]) -> None:
    network = net()
    report = insert(network, "dropout", patterns, example=IMAGE, p=0.3)
    assert [one.place for one in report] == expected
    assert sorted(one.place for one in inserted(network)) == sorted(expected)
    for one in report:
        layer = network.get_submodule(one.path)
        assert (type(layer).__name__, layer.p) == (one.regularizer, one.p) == ("Dropout", 0.3)


def test_a_number_tells_places_of_one_name_apart() -> None:
    network = nn.Sequential(block(1, 4), block(4, 4), nn.Conv2d(4, 2, 1))
    pair = ["encoder.0.after_norm.0", "encoder.0.after_norm.1"]
    for pattern in ("encoder.0.after_norm", "after_norm", "*.after_norm", "encoder.?.after_norm"):
        report = insert(network, "dropout", pattern, example=IMAGE)
        assert [one.place for one in report] == pair
        remove(network)
    assert [one.place for one in insert(network, "dropout", pair[1], example=IMAGE)] == pair[1:]


def test_without_places_a_layer_goes_where_its_class_says() -> None:
    for name, kind in (("dropout", "between_convs"), ("input_dropout", "input")):
        report = insert(net(), name, example=IMAGE)
        assert {one.place.rsplit(".", 1)[-1] for one in report} == {kind}


def test_a_layer_behind_a_container_goes_to_its_last_module() -> None:
    network = net()
    assert insert(network, "dropout", "path:a", example=IMAGE)[0].path == "a.4.regularizer"
    network.train()
    y = network.a(torch.ones(1, 1, 16, 16))
    assert network.a[4].regularizer.training
    assert (y == 0).float().mean() > 0.4


def test_a_module_that_runs_twice_gets_one_layer_for_both_by_its_path() -> None:
    network = net()
    (one,) = insert(network, "dropout", "path:pool", example=IMAGE)
    calls: list[int] = []
    network.get_submodule(one.path).register_forward_hook(lambda *_: calls.append(1))
    network(IMAGE)
    assert (one.path, len(calls)) == ("pool.regularizer", 2)


@pytest.mark.parametrize("regularizer", ["spatial_dropout", SpatialDropout, SpatialDropout(0.25)])
def test_a_regularizer_is_a_name_a_class_or_a_layer(regularizer: Any) -> None:
    network = net()
    parameters = {} if isinstance(regularizer, Regularizer) else {"p": 0.25}
    report = insert(network, regularizer, ["skip", "head"], example=IMAGE, **parameters)
    layers = [network.get_submodule(one.path) for one in report]
    assert [repr(layer) for layer in layers] == ["SpatialDropout(p=0.25)"] * 3
    assert len({id(layer) for layer in (*layers, regularizer)}) == 4


@pytest.mark.parametrize("name", regularizer_names())
def test_every_regularizer_of_maps_can_be_inserted(name: str) -> None:
    network = net()
    wanted = regularizer_class(name).place_kinds
    if wanted:
        with pytest.raises(MedsegError, match=f"places of the kind {wanted[0]}"):
            insert(network, name, "head", example=torch.rand(2, 1, 32, 32))
        return
    places = "input" if name in ("input_dropout", "cutout") else ["between_convs", "bottleneck"]
    report = insert(network, name, places, example=torch.rand(2, 1, 32, 32))
    assert all(one.measured_rate is not None for one in report)
    network.train()(torch.rand(2, 1, 32, 32))


def test_calls_add_up_and_later_layers_come_behind() -> None:
    network = net()
    insert(network, "dropout", ["head", "encoder.0"], example=IMAGE)
    insert(network, "spatial_dropout", ["head", "encoder.0"], example=IMAGE)
    order: list[str] = []
    for _, module in network.named_modules():
        if isinstance(module, Regularizer):
            module.register_forward_hook(lambda m, a, o: order.append(type(m).__name__))
    network(IMAGE)
    assert order == ["Dropout", "SpatialDropout"] * 2


def test_a_new_layer_has_the_mode_of_the_network() -> None:
    network = net().eval()
    expected = network(IMAGE)
    insert(network, "dropout", ["between_convs", "skip"], example=IMAGE)
    assert torch.equal(network(IMAGE), expected)
    assert not any(module.training for module in network.modules())
    assert all(module.training for module in network.train().modules())


def test_a_name_that_is_taken_is_left_alone() -> None:
    network = net()
    network.last.regularizer = nn.Identity()
    network.up0.regularizer = "text"
    report = insert(network, "dropout", ["head", "skip.0"], example=IMAGE)
    assert [one.path for one in report] == ["up0.regularizer_1", "last.regularizer_1"]
    remove(network)
    assert isinstance(network.last.regularizer, nn.Identity)
    assert network.up0.regularizer == "text"


# What is reported


def test_the_report_says_what_is_where() -> None:
    report = insert(net(), "dropout", ["input", "bottleneck"], example=IMAGE, p=0.25)
    first, second = json.loads(report.to_json())
    assert (first["place"], first["path"]) == ("input", "a.0.regularizer")
    assert (second["place"], second["path"]) == ("bottleneck.after_block", "c.4.regularizer")
    assert (first["map_size"], second["map_size"]) == ([1, 16, 16], [8, 4, 4])
    assert (second["regularizer"], second["p"]) == ("Dropout", 0.25)
    assert second["measured_rate"] == pytest.approx(0.25, abs=0.1)
    lines = str(report).splitlines()
    assert len(lines) == 3
    starts = [
        [line.index(word) for word in words]
        for line, words in zip(
            lines,
            (("p ", "map", "module"), ("0.25", "1x16x16", "a.0"), ("0.25", "8x4x4", "c.4")),
            strict=True,
        )
    ]
    assert starts[0] == starts[1] == starts[2]
    assert report[0] == Placement(**{**first, "map_size": (1, 16, 16)})


def test_an_empty_report_is_a_heading() -> None:
    assert str(PlacementReport()).split() == [
        "place",
        "regularizer",
        "p",
        "map",
        "measured",
        "rate",
        "module",
    ]


def test_a_place_is_printed_with_its_module() -> None:
    shown = {place.name: str(place) for place in find_places(net(), IMAGE)}
    assert shown["skip.1"] == "skip.1 (6x8x8): argument 1 of 'up1'"
    assert shown["encoder.0.after_norm"] == "encoder.0.after_norm (4x16x16): output of 'a.1'"


# Taking out


def test_a_selection_can_be_taken_out() -> None:
    network = net()
    before, places = repr(network), ["between_convs", "skip", "head"]
    insert(network, "dropout", places, example=IMAGE)
    insert(network, "heuristic_dropout", "between_convs", example=IMAGE)
    assert len(inserted(network)) == 5 + 2 + 1 + 5
    assert [one.place for one in remove(network, places="skip.*")] == ["skip.1", "skip.0"]
    taken = remove(network, "dropout", places=["encoder.*", "decoder.0.between_convs"])
    assert {one.place for one in taken} == {
        f"{part}.between_convs" for part in ("encoder.0", "encoder.1", "decoder.0")
    }
    assert {one.regularizer for one in taken} == {"Dropout"}
    assert len(remove(network, "HeuristicDropout")) == 5
    assert {one.place for one in inserted(network)} == {
        "bottleneck.between_convs",
        "decoder.1.between_convs",
        "head",
    }
    assert len(remove(network)) == 3
    assert repr(network) == before
    assert len(remove(network)) == 0


def test_taking_out_what_is_not_there_is_an_error() -> None:
    network = net()
    insert(network, "dropout", "head", example=IMAGE)
    with pytest.raises(MedsegError, match="no 'spatial_dropout' was inserted. Inserted: Dropout"):
        remove(network, "spatial_dropout")
    with pytest.raises(MedsegError, match="remove: no place matches 'skip'. Places: head;"):
        remove(network, places="skip")
    assert len(inserted(network)) == 1


def test_layers_of_the_network_itself_are_not_taken_out() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), Dropout(0.5), nn.ReLU(), nn.Conv2d(4, 2, 1))
    insert(network, "dropout", "head", example=IMAGE)
    remove(network)
    assert isinstance(network[1], Dropout)
    assert not inserted(network)


# Networks with slots


def test_a_network_with_slots_is_filled_there() -> None:
    torch.manual_seed(0)
    network = UNet(2, 1, 2, channels=(4, 6, 8))
    plain = copy.deepcopy(network).eval()
    report = insert(network, "dropout", ["between_convs", "skip"], example=IMAGE, p=0.4)
    assert [one.path for one in report if one.place == "skip.0"] == ["skip.0.0"]
    assert len(report) == 5 + 2
    assert [one.map_size for one in report][:2] == [(4, 16, 16), (6, 8, 8)]
    assert inserted(network).as_dicts()[0]["place"] == "encoder.0.between_convs"
    assert torch.equal(network.eval()(IMAGE), plain(IMAGE))
    insert(network, "spatial_dropout", "skip.0", example=IMAGE)
    assert not network.skip[0][1].training
    assert [one.path for one in remove(network, "dropout", "skip.0")] == ["skip.0.0"]
    assert [type(layer).__name__ for layer in network.skip[0]] == ["SpatialDropout"]
    assert len(remove(network)) == 7
    assert repr(network) == repr(plain)


def test_slots_and_paths_can_be_mixed() -> None:
    network = UNet(2, 1, 2, channels=(4, 6, 8))
    report = insert(network, "dropout", ["head", "path:pool"], example=IMAGE)
    assert [one.path for one in report] == ["head.0", "pool.regularizer"]
    assert len(remove(network)) == 2


class Partial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = Slot(), Slot()
        self.conv = nn.Conv2d(1, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.used(x))


def test_a_slot_that_the_network_does_not_use_is_no_place() -> None:
    assert [place.name for place in find_places(Partial(), IMAGE)] == ["used"]
    with pytest.raises(MedsegError, match="no place matches 'unused'"):
        insert(Partial(), "dropout", "unused", example=IMAGE)

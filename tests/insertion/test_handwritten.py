"""Places are found in code not written for it: functions, in-place changes, shared modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medseg_reg.errors import MedsegError
from medseg_reg.insertion import find_places, insert, remove
from medseg_reg.regularizers import SpatialDropout


def conv(inputs: int, outputs: int, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **more)


def names(network: nn.Module, x: Any, kind: str = "") -> list[str]:
    return [place.name for place in find_places(network, x) if kind in ("", place.kind)]


def paths(network: nn.Module, x: Any, kind: str) -> list[str]:
    return [place.path for place in find_places(network, x) if place.kind == kind]


def check_filled(network: nn.Module, x: Any, places: str | list[str]) -> None:
    """Evaluation is as before, training is not, and removal restores."""
    args = x if isinstance(x, tuple) else (x,)
    plain, before = copy.deepcopy(network).eval(), repr(network)
    insert(network, "spatial_dropout", places, example=x, p=0.6)
    with torch.no_grad():
        assert torch.equal(network.eval()(*args), plain(*args))
        torch.manual_seed(0)
        trained = [network.train()(*args) for _ in range(6)]
    assert any(not torch.allclose(y, plain(*args)) for y in trained)
    network(*args).sum().backward()
    remove(network)
    assert repr(network) == before


IMAGE = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))


class Functional(nn.Module):
    """A U-Net of two levels without any module but convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(1, 4), conv(4, 4)
        self.c, self.d = conv(4, 6), conv(6, 6)
        self.e, self.f = conv(10, 4), conv(4, 4)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.a(x))
        skip = F.relu(self.b(x), inplace=True)
        x = self.c(F.max_pool2d(skip, 2)).relu_()
        x = torch.relu(self.d(x))
        x = F.interpolate(x, scale_factor=2.0)
        x = torch.cat([skip, x], dim=1)
        x = F.leaky_relu_(self.e(x))
        x = self.f(x)
        x *= torch.sigmoid(x)
        return self.last(x)


def test_functions_are_followed_like_modules() -> None:
    found = {place.name: place for place in find_places(Functional(), IMAGE)}
    assert {name: place.path for name, place in found.items()} == {
        "input": "a",
        "encoder.0.between_convs": "b",
        "bottleneck.between_convs": "d",
        "decoder.0.between_convs": "f",
        "head": "last",
        # The maps after b and d are made and read by functions alone: nothing to hang a layer
        # on. That after f is read by one module.
        "decoder.0.after_block": "last",
    }
    assert found["bottleneck.between_convs"].map_size == (6, 8, 8)


@pytest.mark.parametrize("places", ["between_convs", "head", "input", "encoder.*", "path:c"])
def test_layers_work_between_functions(places: str) -> None:
    torch.manual_seed(0)
    check_filled(Functional(), IMAGE, places)


class Block(nn.Module):
    """Two convolutions with one activation module, which may come from outside."""

    def __init__(self, inputs: int, outputs: int, activation: nn.Module, style: str) -> None:
        super().__init__()
        self.one, self.norm1 = conv(inputs, outputs), nn.InstanceNorm2d(outputs)
        self.two, self.norm2 = conv(outputs, outputs), nn.InstanceNorm2d(outputs)
        self.activation, self.style = activation, style

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm1(self.one(x))
        if self.style == "statement":
            self.activation(x)
        else:
            x = self.activation(x)
        x = self.norm2(self.two(x))
        if self.style == "statement":
            self.activation(x)
            return x
        return self.activation(x)


class Blocks(nn.Module):
    """A U-Net whose blocks share one activation."""

    def __init__(self, style: str, inplace: bool) -> None:
        super().__init__()
        shared = nn.ReLU(inplace=inplace)
        self.down = Block(1, 4, shared, style)
        self.bottom = Block(4, 6, shared, style)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.join = Block(8, 4, shared, style)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = self.down(x)
        x = self.bottom(F.avg_pool2d(skip, 2))
        return self.last(self.join(torch.cat([self.up(x), skip], 1)))


@pytest.mark.parametrize(
    ("style", "inplace"), [("value", False), ("value", True), ("statement", True)]
)
def test_an_activation_may_be_shared_and_in_place(style: str, inplace: bool) -> None:
    torch.manual_seed(0)
    network = Blocks(style, inplace)
    blocks = ["down", "bottom", "join"]
    assert paths(network, IMAGE, "between_convs") == [f"{block}.two" for block in blocks]
    # The activation runs six times, so the layer goes to the block.
    assert paths(network, IMAGE, "after_block") == blocks
    assert names(network, IMAGE, "after_block") == [
        "encoder.0.after_block",
        "bottleneck.after_block",
        "decoder.0.after_block",
    ]
    for kind in ("between_convs", "after_block", "after_norm"):
        check_filled(network, IMAGE, kind)


def test_a_normalization_whose_output_an_in_place_activation_changes_is_a_place() -> None:
    network = Blocks("statement", True)
    assert paths(network, IMAGE, "after_norm") == [
        f"{block}.norm{n}" for block in ("down", "bottom", "join") for n in (1, 2)
    ]


class Shared(nn.Module):
    """Uses one convolution in two ways, or twice in the same way."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.again, self.last = conv(1, 4), conv(4, 4), nn.Conv2d(4, 2, 1)
        self.way = way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.again(F.relu(self.first(x)))
        if self.way == "two ways":  # once behind an activation, once not
            return self.last(self.again(y))
        return self.last(y + self.again(F.relu(self.first(-x))))


def test_a_module_that_runs_twice_must_be_the_same_place_twice() -> None:
    assert names(Shared("two ways"), IMAGE, "between_convs") == []
    network = Shared("same way")
    (place,) = [p for p in find_places(network, IMAGE) if p.kind == "between_convs"]
    assert (place.path, place.calls) == ("again", 2)
    check_filled(network, IMAGE, "between_convs")


class Residual(nn.Module):
    """Residual blocks whose branch ends in a module, with and without a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(1, 4), nn.ReLU())
        self.branch = nn.Sequential(conv(4, 4), nn.ReLU(), conv(4, 4))
        self.wide = nn.Sequential(conv(4, 8, stride=2), nn.ReLU(), nn.Sequential(conv(8, 8)))
        self.project = nn.Conv2d(4, 8, 1, stride=2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = F.relu(self.branch(x) + x)
        y = self.wide(x)
        y += self.project(x)
        return self.head(F.relu(y).mean((2, 3)))


def test_the_branch_of_a_residual_addition_is_a_place() -> None:
    torch.manual_seed(0)
    network = Residual()
    assert paths(network, IMAGE, "residual") == ["branch.2", "wide.2.0"]
    assert names(network, IMAGE, "residual") == ["encoder.0.residual", "bottleneck.residual"]
    # The stem's map is read by a convolution, behind an activation, and as the shortcut.
    assert paths(network, IMAGE, "between_convs") == ["branch.0", "branch.2", "wide.2.0"]
    assert names(network, IMAGE, "head") == []
    check_filled(network, IMAGE, "residual")


class Gated(nn.Module):
    """A skip connection with an attention gate at a lower resolution, and a channel gate."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(conv(1, 4), nn.ReLU(), conv(4, 4), nn.ReLU())
        self.bottom = nn.Sequential(conv(4, 6, stride=2), nn.ReLU(), conv(6, 6), nn.ReLU())
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.theta, self.phi = nn.Conv2d(4, 3, 1, stride=2), nn.Conv2d(6, 3, 1)
        self.psi = nn.Conv2d(3, 1, 1)
        self.excite = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 2, 1), nn.ReLU())
        self.expand = nn.Conv2d(2, 8, 1)
        self.last = conv(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = self.down(x)
        g = self.bottom(skip)
        a = torch.sigmoid(self.psi(F.relu(self.theta(skip) + self.phi(g))))
        skip = skip * F.interpolate(a, scale_factor=2, mode="bilinear")
        x = torch.cat([skip, self.up(g)], 1)
        return self.last(x * self.expand(self.excite(x)).sigmoid())


def test_gates_are_places_and_nothing_inside_them_is() -> None:
    torch.manual_seed(0)
    network = Gated()
    assert paths(network, IMAGE, "gate") == ["psi"]
    assert paths(network, IMAGE, "between_convs") == ["down.2", "bottom.2"]
    assert paths(network, IMAGE, "after_block") == ["down.3", "bottom.3"]
    assert paths(network, IMAGE, "head") == ["last"]
    check_filled(network, IMAGE, ["gate", "after_block"])


class ListedFeatures(nn.Module):
    """An encoder that returns a list, a decoder that takes it, a dictionary as the result."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict(
            {"0": Block(1, 4, nn.ReLU(), ""), "1": Block(4, 6, nn.ReLU(), "")}
        )
        self.decoder = UpTo(6, 4)
        self.last = nn.Conv2d(4, 2, 1)

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        found = [self.encoder["0"](x)]
        return [*found, self.encoder["1"](F.max_pool2d(found[0], 2))]

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        *skips, x = self.features(x)
        return {"out": self.last(self.decoder(x, skip=skips[0]))}


class UpTo(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.join = Block(inputs + outputs, outputs, nn.ReLU(), "")

    def forward(self, x: torch.Tensor, *, skip: torch.Tensor) -> torch.Tensor:
        x = F.interpolate(x, size=skip.shape[2:])
        return self.join(torch.cat([F.pad(skip, [0, 0, 0, 0]), x], 1))


def test_a_skip_connection_is_met_as_a_named_argument() -> None:
    network = ListedFeatures()
    (place,) = [p for p in find_places(network, IMAGE) if p.kind == "skip"]
    assert (place.name, place.path, place.argument) == ("skip.0", "decoder", "skip")
    insert(network, SpatialDropout(0.6), "skip", example=IMAGE)
    seen: list[torch.Tensor] = []
    network.decoder.join.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    network(torch.ones(1, 1, 16, 16))
    skipped, raised = seen[0][:, :4], seen[0][:, 4:]
    assert (skipped.abs().amax((2, 3)) == 0).any()
    main = network.encoder["0"](torch.ones(1, 1, 16, 16))
    assert (main.abs().amax((2, 3)) > 0).all()
    assert raised.shape[1] == 6


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = conv(1, 4), conv(1, 4), nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor, weight: float, y: torch.Tensor) -> torch.Tensor:
        return self.last(F.relu(torch.cat([self.a(x), weight * self.b(y)], 1)))


@pytest.mark.parametrize("example", [(IMAGE, 2.0, IMAGE), {"x": IMAGE, "weight": 2.0, "y": -IMAGE}])
def test_a_network_may_have_several_inputs(example: Any) -> None:
    network = Pair()
    assert names(network, example) == ["input.0", "input.1", "head"]
    report = insert(network, "dropout", "input", example=example)
    assert [one.path for one in report] == ["a.regularizer", "b.regularizer"]


def sequence(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(conv(1, 4), *more, nn.ReLU(), conv(4, 4), nn.ReLU(), conv(4, 2))


@pytest.mark.parametrize(
    "between", [nn.Dropout(0.5), SpatialDropout(0.5), nn.Identity(), nn.Dropout2d(0.0)]
)
def test_dropouts_that_are_there_do_not_disturb(between: nn.Module) -> None:
    network = sequence(between)
    assert names(network, IMAGE) == [
        "input",
        "encoder.0.between_convs",
        "encoder.0.after_block",
        "head",
    ]
    assert insert(network, "dropout", "between_convs", example=IMAGE)[0].path == "3.regularizer"


def test_layers_that_were_inserted_do_not_disturb() -> None:
    network = sequence()
    before = find_places(network, IMAGE)
    for _ in range(2):
        insert(network, "dropout", ["input", "between_convs", "after_block"], example=IMAGE)
        assert find_places(network, IMAGE) == before
    assert [n for n, _ in network[2].named_children()] == ["regularizer", "regularizer_1"]


@pytest.mark.parametrize(
    "wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm]
)
def test_a_convolution_with_a_parametrized_weight_carries_a_layer(
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    network = sequence()
    wrap(network[2])
    before = {key: value.clone() for key, value in network.state_dict().items()}
    assert insert(network, "dropout", "between_convs", example=IMAGE)[0].path == "2.regularizer"
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_maps_of_one_and_three_axes_are_found() -> None:
    for dims, kind in ((1, nn.Conv1d), (3, nn.Conv3d)):
        network = nn.Sequential(kind(1, 4, 3), nn.ReLU(), kind(4, 4, 3), nn.ReLU(), kind(4, 2, 1))
        x = torch.rand(1, 1, *[8] * dims)
        assert names(network, x, "between_convs") == ["encoder.0.between_convs"]
        check_filled(network, x, "between_convs")


class TokenMixer(nn.Module):
    """Works on tokens, then on channels-last maps, then on maps again."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Conv2d(1, 8, 4, stride=4), nn.Linear(16, 16)
        self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 8)
        self.out = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        tokens = self.mix(x.flatten(2)).transpose(1, 2)
        y = tokens.reshape(-1, 4, 4, 8)
        y = self.two(F.gelu(self.one(y)))
        x = F.relu(self.out(x + y.permute(0, 3, 1, 2)))
        return F.interpolate(self.last(x), scale_factor=4)


def test_tokens_and_channels_last_maps_are_no_places() -> None:
    found = find_places(TokenMixer(), IMAGE)
    assert [(place.name, place.map_size) for place in found] == [
        ("input", (1, 16, 16)),
        # What is added to a map is a map again: the end of a residual block.
        ("bottleneck.after_block.0", (8, 4, 4)),
        ("bottleneck.after_block.1", (8, 4, 4)),
        ("head", (8, 4, 4)),
    ]
    network = TokenMixer()
    for path in ("mix", "one"):
        with pytest.raises(MedsegError, match=f"behind 'path:{path}' is no place"):
            insert(network, "dropout", f"path:{path}", example=IMAGE)


def test_a_network_without_down_sampling_is_all_encoder() -> None:
    assert names(sequence(), IMAGE, "after_block") == ["encoder.0.after_block"]

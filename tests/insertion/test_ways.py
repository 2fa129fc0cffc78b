"""Layers are reached in training, whatever way a network takes, or inserting them is an error."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from medseg_reg.errors import MedsegError
from medseg_reg.insertion import find_places, insert

IMAGE = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def paths(network: nn.Module, kind: str) -> list[str]:
    return [place.path for place in find_places(network, IMAGE) if place.kind == kind]


def body() -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4), nn.ReLU(), conv(4, 2))


class Loop(nn.Module):
    """Calls whatever children it has, which no module but a container should."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(1, 4), conv(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for child in self.children():
            x = F.relu(child(x))
        return x


def test_a_module_that_calls_all_its_children_is_left_as_it_was() -> None:
    network = nn.Sequential(Loop(), nn.MaxPool2d(2), conv(4, 2))
    before = repr(network)
    with pytest.raises(MedsegError, match="'0' seems to call all its children in turn"):
        insert(network, "dropout", "path:0", example=IMAGE)
    assert repr(network) == before
    assert paths(network, "between_convs") == ["0.b"]
    insert(network, "dropout", "between_convs", example=IMAGE)


class Switch(nn.Module):
    """Goes another way while it trains."""

    def __init__(self, train: bool) -> None:
        super().__init__()
        self.first, self.on, self.off = conv(1, 4), body(), body()
        self.when = train

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.on(x) if self.training == self.when else self.off(x)


def test_a_place_that_training_does_not_reach_is_an_error() -> None:
    network = Switch(train=False)
    before = repr(network)
    with pytest.raises(MedsegError, match="between_convs: .* evaluation mode only"):
        insert(network, "dropout", "between_convs", example=IMAGE)
    assert repr(network) == before
    assert network.training


class Chance(nn.Module):
    """Leaves a block out by chance, in training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = conv(1, 4), body()
        self.last = conv(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if self.training and torch.rand(()) < 0.5:
            return self.last(x)
        return self.block(x)


def test_a_block_that_is_left_out_by_chance_is_tried_again() -> None:
    assert len(insert(Chance(), "dropout", "between_convs", example=IMAGE)) == 1


class NeedsTargets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(1, 4), body())

    def forward(self, x: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
        if self.training and target is None:
            raise ValueError("training needs targets")
        return self.body(x)


def test_a_network_that_does_not_train_on_an_example_says_so_in_the_report() -> None:
    report = insert(NeedsTargets(), "dropout", "between_convs", example=IMAGE)
    assert report.note == "Not checked in training mode: ValueError: training needs targets"
    assert report.note in str(report)


class Counting(nn.Module):
    """Counts its training passes, as some layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(1, 4), body())
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen = self.seen + 1
        return self.body(x)


def test_buffers_are_as_before() -> None:
    network = Counting()
    buffers = dict(network.named_buffers())
    values = {name: buffer.clone() for name, buffer in buffers.items()}
    insert(network, "dropout", "between_convs", example=IMAGE)
    assert dict(network.named_buffers()).keys() == buffers.keys()
    for name, buffer in network.named_buffers():
        assert buffer is buffers[name], name
        assert torch.equal(buffer, values[name]), name


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = conv(1, 4), body()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.body, self.stem(x), use_reentrant=False)


def test_activation_checkpointing_draws_the_same_again() -> None:
    torch.manual_seed(0)
    kept, saved = Checkpointed(), Checkpointed()
    saved.load_state_dict(kept.state_dict())
    kept.forward = lambda x: kept.body(kept.stem(x))  # type: ignore[method-assign]
    gradients = []
    for network in (kept, saved):
        insert(network, "dropout", ["between_convs", "after_norm"], example=IMAGE, p=0.4)
        torch.manual_seed(1)
        network(IMAGE).square().sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_batch_of_one_pixel_does_not_stop_the_check() -> None:
    # Batch normalization refuses to train on one value for each channel.
    network = nn.Sequential(nn.Conv2d(1, 4, 16), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    assert not insert(network, "dropout", "after_norm", example=IMAGE).note

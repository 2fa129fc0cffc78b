"""A narrowed network computes what the whole one does at that width, with fewer parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from medseg_reg.errors import MedsegError
from medseg_reg.insertion import insert, inserted, narrow
from medseg_reg.networks import UNet
from medseg_reg.regularizers.structural_dropout import StructuralDropout

IMAGE = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def trained(network: nn.Module) -> nn.Module:
    """Give a network statistics and scales other than 0 and 1."""
    torch.manual_seed(0)
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.is_floating_point() and tensor.dim() == 1:
            about_zero = name.endswith(("bias", "running_mean"))
            with torch.no_grad():
                tensor.copy_(torch.rand_like(tensor) * (0.2 if about_zero else 1.0))
                tensor.add_(-0.1 if about_zero else 0.5)
    return network


def at_width(network: nn.Module, width: float | int) -> nn.Module:
    wide = copy.deepcopy(network).eval()
    for module in wide.modules():
        if isinstance(module, StructuralDropout):
            module.width = width
    return wide


def size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def check(network: nn.Module, width: float | int, x: torch.Tensor = IMAGE) -> nn.Module:
    before = {key: value.clone() for key, value in network.state_dict().items()}
    count, modes = len(inserted(network)), [m.training for m in network.modules()]
    small = narrow(network, width, x)
    with torch.no_grad():
        expected = at_width(network, width)(x)
        assert torch.allclose(small.eval()(x), expected, atol=1e-5, rtol=1e-4)
        if not isinstance(width, float) or width < 1:
            assert not torch.allclose(expected, copy.deepcopy(network).eval()(x), atol=1e-3)
    assert not any(isinstance(module, StructuralDropout) for module in small.modules())
    assert not inserted(small)
    # The whole network is untouched.
    assert len(inserted(network)) == count
    assert [m.training for m in network.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    return small


@pytest.mark.parametrize(
    ("width", "kept"),
    [(0.25, (1, 2)), (0.5, (2, 4)), (0.7, (3, 6)), (1.0, (4, 8)), (1, (1, 1)), (3, (3, 3))],
)
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_our_unet_is_narrowed_between_its_convolutions(
    norm: str, width: float | int, kept: tuple[int, int]
) -> None:
    network = trained(UNet(2, 1, 2, channels=(4, 6, 8), norm=norm))
    insert(network, "structural_dropout", "between_convs", example=IMAGE)
    small = check(network, width)
    assert (size(small) < size(network)) == (kept != (4, 8))
    assert small.encoder[0].conv1.out_channels == kept[0]
    assert small.encoder[0].norm1.num_features == kept[0]
    assert small.encoder[0].conv2.in_channels == kept[0]
    assert small.bottleneck.conv2.weight.shape[:2] == (8, kept[1])
    assert small.encoder[0].conv2.out_channels == 4


def test_monais_basic_unet_is_narrowed() -> None:
    nets = pytest.importorskip("monai.networks.nets")
    network = trained(nets.BasicUNet(2, 1, 2, features=(8, 8, 12, 12, 16, 8)))
    x = torch.rand(1, 1, 32, 32)
    insert(network, "structural_dropout", "between_convs", example=x)
    small = check(network, 0.5, x)
    assert size(small) < 0.6 * size(network)
    assert small.down_4.convs.conv_0.adn.N.weight.shape == (8,)


def test_a_narrowed_network_can_be_trained_on_and_saved() -> None:
    network = trained(UNet(2, 1, 2, channels=(4, 6)))
    insert(network, "structural_dropout", "between_convs", example=IMAGE)
    small = narrow(network, 0.5, IMAGE)
    small(IMAGE).square().mean().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
    copy.deepcopy(small).load_state_dict(small.state_dict())
    assert list(small.state_dict()) == list(network.state_dict())


def sequence(*middle: nn.Module, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), *middle, nn.Conv2d(8, 4, 3, padding=1, groups=groups)
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: sequence(nn.BatchNorm2d(8), nn.PReLU(8), StructuralDropout()),
        lambda: sequence(nn.GELU(), StructuralDropout(), nn.Dropout(0.5)),
        lambda: sequence(nn.InstanceNorm2d(8), StructuralDropout(), nn.LeakyReLU(0.2)),
        lambda: sequence(StructuralDropout(), nn.ReLU(), nn.MaxPool2d(2), nn.Identity()),
        lambda: sequence(nn.MaxPool2d(2), nn.Tanh(), StructuralDropout(), nn.PReLU()),
        lambda: nn.Sequential(
            nn.ConvTranspose2d(1, 8, 2, stride=2),
            nn.SiLU(),
            StructuralDropout(),
            nn.ConvTranspose2d(8, 3, 2, stride=2),
        ),
    ],
)
def test_what_works_on_each_channel_may_be_in_between(make: Callable[[], nn.Module]) -> None:
    network = trained(make())
    small = check(network, 0.375)
    assert (small[0].out_channels, small[-1].in_channels) == (3, 3)


def test_a_convolution_between_two_layers_is_cut_on_both_sides() -> None:
    network = trained(
        nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1)
        )
    )
    insert(network, "structural_dropout", ["between_convs", "head"], example=IMAGE)
    small = check(network, 0.5)
    assert small[2].weight.shape == (3, 4, 3, 3)


class Shares(nn.Module):
    """The map of the layer, or what it is made from, goes elsewhere too."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.a, self.layer = nn.Conv2d(1, 4, 3, padding=1), StructuralDropout()
        self.b, self.c = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)
        self.where = where

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        z = self.layer(y.relu())
        if self.where == "before":
            return self.c(self.b(z) + y)
        if self.where == "cat":
            return self.c(self.b(torch.cat([z[:, :2], z[:, 2:]], 1)))
        if self.where == "twice":
            return self.c(self.b(z)) + self.c(y.tanh())
        return self.c(self.b(z) + z)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Shares("before"), "layer: its map, or what it is made from, is used elsewhere"),
        (lambda: Shares("behind"), "not read by one convolution alone, but by 'b', add in ''"),
        (lambda: Shares("cat"), "not read by one convolution alone, but by getitem in ''"),
        (lambda: sequence(nn.GroupNorm(2, 8), StructuralDropout()), "'1' .* mixes channels"),
        (lambda: sequence(nn.Softmax(1), StructuralDropout()), "'1' .* mixes channels"),
        (lambda: sequence(StructuralDropout(), nn.BatchNorm2d(8)), "'2' is between the layer and"),
        (lambda: sequence(StructuralDropout(), nn.GELU()), "'2' is between the layer and"),
        (lambda: sequence(StructuralDropout(), groups=2), "'2' has 2 groups"),
        (lambda: nn.Sequential(StructuralDropout(), nn.Conv2d(1, 4, 3)), "comes from no conv"),
        (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), StructuralDropout()), "but by nothing"),
        (
            lambda: nn.Sequential(
                nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 4, 3)),
                StructuralDropout(),
                nn.Conv2d(4, 4, 3),
            ),
            "'0' has no weight of its own",
        ),
        (lambda: sequence(nn.ReLU()), "narrow: the network has no StructuralDropout layer"),
    ],
)
def test_what_cannot_be_cut_is_an_error_that_names_it(
    make: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(MedsegError, match=message):
        narrow(make(), 0.5, IMAGE)


def test_a_difference_that_was_overlooked_is_an_error() -> None:
    network = sequence(StructuralDropout(), nn.ConstantPad2d(1, 5.0))
    with pytest.raises(MedsegError, match="the narrower network differs from the whole one by"):
        narrow(network, 0.5, IMAGE)
    assert network[1].width is None


def test_places_that_cannot_be_cut_are_named_as_they_were_inserted() -> None:
    network = UNet(2, 1, 2, channels=(4, 6))
    insert(network, "structural_dropout", ["between_convs", "skip"], example=IMAGE)
    with pytest.raises(MedsegError, match=r"1 of 4 places cannot be cut: skip.0: .*cat in 'deco"):
        narrow(network, 0.5, IMAGE)


@pytest.mark.parametrize(("width", "message"), [(9, "8 channels"), (0, "width must"), (1.5, "wid")])
def test_a_width_that_does_not_fit_is_an_error(width: Any, message: str) -> None:
    with pytest.raises(MedsegError, match=message):
        narrow(sequence(StructuralDropout()), width, IMAGE)

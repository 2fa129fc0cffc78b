"""A network runs on shapes without values, and nothing of it changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medseg_reg.errors import MedsegError
from medseg_reg.insertion import place
from medseg_reg.networks import UNet
from medseg_reg.networks.build import check_input_size
from medseg_reg.networks.foreign import ForeignNetwork
from medseg_reg.networks.shapes import run_on_shape


class Reads(nn.Module):
    """Reads a value on its way, which a shape does not have; wants an even number of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[2] % 2:
            raise ValueError("an odd number of rows")
        found: torch.Tensor = self.conv(x * float(x.sum().item() + 1))
        return found


def test_the_output_has_a_shape_and_no_values() -> None:
    output = run_on_shape(UNet(2, 1, 3, channels=(4, 8)), (2, 1, 1001, 2000))
    assert (output.shape, output.device.type) == ((2, 3, 1001, 2000), "meta")


def test_a_network_that_reads_values_gets_some_if_that_is_asked_for() -> None:
    with pytest.raises(RuntimeError, match="meta"):
        run_on_shape(Reads(), (1, 1, 4, 4))
    assert run_on_shape(Reads(), (1, 1, 4, 4), values=True).device.type == "cpu"


def test_the_size_of_a_network_that_reads_values_is_checked_too() -> None:
    network = ForeignNetwork("x", Reads(), factor=1)
    check_input_size(network, 1, (4, 5), 2)
    with pytest.raises(MedsegError, match="5x4 .* an odd number of rows"):
        check_input_size(network, 1, (5, 4), 2)


def test_layers_stay_in_evaluation_mode_while_the_network_trains() -> None:
    network, seen = UNet(2, 1, 2, channels=(4, 8)), []
    place(network, "dropout", ["head"], {"p": 0.5})
    network.head[0].register_forward_hook(lambda layer, *_: seen.append(layer.training))
    network.bottleneck.register_forward_hook(lambda block, *_: seen.append(block.training))
    run_on_shape(network, (2, 1, 8, 8), training=True)
    assert seen == [True, False]
    assert all(module.training for module in network.modules())


def test_a_failure_leaves_the_network_as_it_was() -> None:
    network = Reads().eval()
    with pytest.raises(ValueError, match="odd"):
        run_on_shape(network, (1, 1, 3, 4), training=True, values=True)
    assert not any(module.training for module in network.modules())
    assert network.conv.weight.device.type == "cpu"

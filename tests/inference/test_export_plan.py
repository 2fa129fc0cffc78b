"""Sizes that an export shall take are those of its network, and what differs is found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from medseg_reg.inference.export.plan import Differs, Plan, plans_of, require_equal
from medseg_reg.networks import UNet
from medseg_reg.networks.build import build_network

# Sizes


def test_sizes_that_a_network_does_not_take_are_not_asked_of_its_export() -> None:
    class Choosy(UNet):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[2] < 40:
                raise ValueError("too small")
            return super().forward(x)

    plan = next(plans_of(Choosy(2, 1, 2, channels=(4, 6)).eval(), 1, (40, 40)))
    assert plan.dynamic
    assert len(plan.probes) == 4
    assert all(shape[2] >= 40 for shape in plan.probes)


def test_networks_of_this_package_take_one_pixel_in_onnx_and_torchscript() -> None:
    own = [UNet(2, 1, 2, channels=(4, 6), norm=norm).eval() for norm in ("batch", "instance")]
    foreign = build_network(
        in_channels=1, classes=2, head="softmax", name="monai.SegResNet", blocks_down=[1, 1],
        blocks_up=[1],
    ).eval()  # fmt: skip
    for form in ("onnx", "torchscript", "monai-bundle"):
        for network in own:
            plan = next(plans_of(network, 1, (8, 8), form))
            assert (plan.smallest, plan.takes) == (1, "any")
            assert (1, 1, 1, 1) in plan.probes
        # Nobody has looked there.
        assert next(plans_of(foreign, 1, (8, 8), form)).smallest == 3
    least = next(plans_of(own[0], 1, (8, 8), "pt2"))
    assert (least.smallest, least.takes) == (3, "any, from 3 rows and columns")
    assert min(min(shape[2:]) for shape in least.probes) >= 3


# The comparison


def plan(*probes: tuple[int, int, int, int]) -> Plan:
    return Plan(True, probes[0], probes)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda y: y + 2e-4, "differs from PyTorch by 0.0002"),
        (lambda y: y * torch.nan, "differs from PyTorch by nan"),
        (lambda y: y[:, :, 1:], r"gives \(1, 2, 3, 4\) .* PyTorch \(1, 2, 4, 4\)"),
    ],
)
def test_the_comparison_finds_what_is_wrong(wrong: Callable[[Tensor], Tensor], said: str) -> None:
    network = nn.Conv2d(1, 2, 1)
    with pytest.raises(Differs, match=said):
        require_equal(network, lambda x: wrong(network(x)), plan((1, 1, 4, 4)))


def test_the_comparison_looks_at_every_shape() -> None:
    network = nn.Conv2d(1, 2, 1)

    def wrong_in_a_batch(x: Tensor) -> Tensor:
        y = network(x)
        y[1:] += 0.1
        return y

    assert require_equal(network, wrong_in_a_batch, plan((1, 1, 4, 4))) == 0
    with pytest.raises(Differs, match=r"\(3, 1, 4, 4\)"):
        require_equal(network, wrong_in_a_batch, plan((1, 1, 4, 4), (3, 1, 4, 4)))


def test_large_logits_may_differ_in_their_own_unit() -> None:
    network = nn.Conv2d(1, 1, 1)
    with torch.no_grad():
        network.bias.fill_(5000)
    found = require_equal(network, lambda x: network(x) + 0.1, plan((1, 1, 4, 4)))
    assert found < 1e-4

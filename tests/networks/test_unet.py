"""U-Net keeps the contract of networks, and computes what its paper draws."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch.nn import functional as F

from medseg_reg.insertion import measure, place
from medseg_reg.networks import UNet
from tests.networks.own_contract import OwnContract

PARTS = ("between_convs", "after_norm", "after_block")


PLACES = {
    "input",
    "head",
    "skip.0",
    "skip.1",
    *(f"bottleneck.{part}" for part in PARTS),
    *(f"{side}.{i}.{part}" for side in ("encoder", "decoder") for i in (0, 1) for part in PARTS),
}


class TestUNet(OwnContract):
    network = UNet
    places: ClassVar[set[str]] = PLACES
    changes: ClassVar[dict[str, Any]] = {
        "channels": (4, 8),
        "norm": "instance",
        "activation": "leakyrelu",
        "upsample": "nontrainable",
    }
    golden = (-0.27599, -0.08633, 0.03674, -0.26294, -0.29969)
    golden_3d = (0.11185, 0.22859, 0.15386, 0.40319, 0.37268)


def written_out(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The forward pass of a U-Net of two levels in evaluation mode, operation by operation."""

    def block(x: torch.Tensor, name: str) -> torch.Tensor:
        for n in ("1", "2"):
            x = F.conv2d(x, weights[f"{name}.conv{n}.weight"], padding=1)
            x = F.batch_norm(
                x,
                weights[f"{name}.norm{n}.running_mean"],
                weights[f"{name}.norm{n}.running_var"],
                weights[f"{name}.norm{n}.weight"],
                weights[f"{name}.norm{n}.bias"],
            ).relu()
        return x

    skip = block(x, "encoder.0")
    below = block(F.max_pool2d(skip, 2), "bottleneck")
    up = F.conv_transpose2d(
        below, weights["decoder.0.up.deconv.weight"], weights["decoder.0.up.deconv.bias"], stride=2
    )
    x = block(torch.cat([skip, up], 1), "decoder.0")
    return F.conv2d(x, weights["classify.weight"], weights["classify.bias"])


def test_the_forward_pass_is_the_one_written_out() -> None:
    torch.manual_seed(0)
    network = UNet(2, 3, 4, channels=(5, 7))
    for _ in range(3):
        network(torch.rand(4, 3, 8, 8))  # so that the running statistics are not 0 and 1
    x = torch.rand(2, 3, 8, 12)
    assert torch.allclose(network.eval()(x), written_out(network.state_dict(), x), atol=1e-5)


def test_every_place_sees_the_map_that_its_name_says() -> None:
    network = UNet(2, 3, 2, channels=(4, 6, 8))
    placements = place(network, "dropout", ["*"], {"p": 0.5})
    measure(network, torch.rand(1, 3, 16, 24), placements)
    found = {placement.place: placement.map_size for placement in placements}
    widths = (4, 6, 8)
    assert found["input"] == (3, 16, 24)
    assert found["head"] == (4, 16, 24)
    for level in (0, 1):
        size = (widths[level], 16 >> level, 24 >> level)
        assert found[f"skip.{level}"] == size
        for part in PARTS:
            assert found[f"encoder.{level}.{part}"] == size
            assert found[f"decoder.{level}.{part}"] == size
    assert found["bottleneck.after_block"] == (8, 4, 6)


def test_a_regularized_skip_does_not_touch_the_way_down() -> None:
    network = UNet(2, 1, 2, channels=(4, 6))
    x, seen = torch.rand(2, 1, 8, 8), []
    network.bottleneck.register_forward_hook(lambda *parts: seen.append(parts[2]))
    network(x)
    place(network, "dropout", ["skip.0"], {"p": 0.9})
    network(x)
    assert torch.equal(seen[0], seen[1])


def test_the_default_has_the_usual_number_of_weights() -> None:
    network = UNet(2, 1, 3, channels=(64, 128, 256, 512, 1024))
    convs = sum(p.numel() for n, p in network.named_parameters() if "norm" not in n)
    norms = sum(p.numel() for n, p in network.named_parameters() if "norm" in n)
    double = [(1, 64), (64, 128), (128, 256), (256, 512), (512, 1024)]
    double += [(1024, 512), (512, 256), (256, 128), (128, 64)]
    expected = sum(9 * (a * b + b * b) for a, b in double)
    expected += sum(4 * 2 * n * n + n for n in (64, 128, 256, 512)) + 64 * 3 + 3
    assert convs == expected
    assert norms == sum(4 * b for _, b in double)


def test_instance_normalization_has_scale_and_shift() -> None:
    network = UNet(2, 1, 2, channels=(4, 6), norm="instance")
    assert network.encoder[0].norm1.weight.shape == (4,)
    assert network.encoder[0].conv1.bias is None


def test_one_level_is_no_u_net() -> None:
    with pytest.raises(ValueError, match=r"at least two levels, channels is \(8,\)"):
        UNet(2, 1, 2, channels=(8,))

"""Attention U-Net keeps the contract of networks, and its gates compute what the paper says."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from medseg_reg.insertion import find_places, measure, place
from medseg_reg.networks import AttentionUNet, UNet
from medseg_reg.networks.attention_unet import AttentionGate
from tests.networks.own_contract import OwnContract
from tests.networks.test_unet import PLACES


class TestAttentionUNet(OwnContract):
    network = AttentionUNet
    places: ClassVar[set[str]] = {*PLACES, "gate.1"}
    changes: ClassVar[dict[str, Any]] = {
        "channels": (4, 6, 8, 8),
        "norm": "instance",
        "activation": "leakyrelu",
        "upsample": "nontrainable",
        "gate_full_resolution": True,
    }
    golden = (-0.27711, -0.12995, 0.03304, -0.15657, -0.30164)
    golden_3d = (0.11206, 0.19085, 0.11726, 0.39391, 0.34553)


def test_the_coefficients_are_those_of_the_formula() -> None:
    torch.manual_seed(0)
    gate = AttentionGate(2, 3, 5, "relu")
    x, g = torch.randn(1, 3, 4, 6), torch.randn(1, 5, 2, 3)
    found = gate.coefficients(gate.joined(x, g))[0, 0].detach().numpy()
    w = {name: value.detach().double().numpy() for name, value in gate.named_parameters()}
    a, b = x[0].double().numpy(), g[0].double().numpy()
    # A kernel of 2 with stride 2 sees each block of 2x2 pixels by itself.
    blocks = a.reshape(3, 2, 2, 3, 2).transpose(0, 1, 3, 2, 4)
    joined = np.einsum("ocij,cyxij->oyx", w["of_skip.weight"], blocks)
    joined += np.einsum("oc,cyx->oyx", w["of_below.weight"][:, :, 0, 0], b)
    joined = np.maximum(joined + w["of_below.bias"][:, None, None], 0)
    psi = np.einsum("c,cyx->yx", w["psi.weight"][0, :, 0, 0], joined) + w["psi.bias"]
    small = 1 / (1 + np.exp(-psi))
    # Linear interpolation between the centres of the pixels, the border repeated.
    rows = (np.arange(4) + 0.5) / 2 - 0.5
    columns = (np.arange(6) + 0.5) / 2 - 0.5
    tall = np.stack([np.interp(rows, range(2), column) for column in small.T], axis=1)
    expected = np.stack([np.interp(columns, range(3), row) for row in tall])
    assert np.allclose(found, expected, atol=1e-6)


def test_coefficients_lie_between_0_and_1() -> None:
    gate = AttentionGate(3, 2, 4, "relu")
    found = gate.coefficients(gate.joined(torch.randn(2, 2, 4, 4, 6), torch.randn(2, 4, 2, 2, 3)))
    assert found.shape == (2, 1, 4, 4, 6)
    assert ((found > 0) & (found < 1)).all()


def test_a_gate_has_the_activation_of_its_network() -> None:
    gates = AttentionUNet(2, 1, 2, channels=(4, 6, 8), activation="gelu").attention.values()
    assert {type(gate.act) for gate in gates} == {torch.nn.GELU}


def test_an_open_gate_lets_the_skip_map_pass_as_in_a_u_net() -> None:
    torch.manual_seed(0)
    gated = AttentionUNet(2, 1, 2, channels=(4, 6, 8), gate_full_resolution=True).eval()
    plain = UNet(2, 1, 2, channels=(4, 6, 8)).eval()
    plain.load_state_dict({k: v for k, v in gated.state_dict().items() if "attention" not in k})
    x = torch.rand(1, 1, 16, 20)
    assert not torch.allclose(gated(x), plain(x), atol=1e-4)
    with torch.no_grad():
        for gate in gated.attention.values():
            gate.psi.bias.fill_(100.0)  # sigmoid(100) is 1
    assert torch.allclose(gated(x), plain(x), atol=1e-6)


def test_a_shut_gate_keeps_the_skip_map_out() -> None:
    torch.manual_seed(0)
    network = AttentionUNet(2, 1, 2, channels=(4, 6, 8))
    arrived: list[torch.Tensor] = []
    network.skip[1].register_forward_hook(lambda *parts: arrived.append(parts[2]))
    with torch.no_grad():
        network.attention["1"].psi.bias.fill_(-100.0)
        network.attention["1"].psi.weight.zero_()
    network(torch.rand(2, 1, 8, 8))
    assert arrived[0].abs().max() < 1e-30


def test_every_place_sees_the_map_that_its_name_says() -> None:
    network = AttentionUNet(2, 3, 2, channels=(4, 6, 8), gate_full_resolution=True)
    placements = place(network, "dropout", ["*"], {"p": 0.5})
    measure(network, torch.rand(1, 3, 16, 24), placements)
    found = {placement.place: placement.map_size for placement in placements}
    # The coefficients are computed at half the size of the skip map.
    assert (found["gate.0"], found["gate.1"]) == ((4, 8, 12), (6, 4, 6))
    assert (found["skip.0"], found["skip.1"]) == ((4, 16, 24), (6, 8, 12))
    assert found["bottleneck.after_block"] == (8, 4, 6)


def test_a_layer_in_a_gate_changes_the_coefficients_alone() -> None:
    torch.manual_seed(0)
    network = AttentionUNet(2, 1, 2, channels=(4, 6, 8))
    x, seen = torch.rand(2, 1, 8, 8), []
    network.skip[1].register_forward_hook(lambda *parts: seen.append(parts[2]))
    network.encoder[1].register_forward_hook(lambda *parts: seen.append(parts[2]))
    place(network, "dropout", ["gate"], {"p": 0.9})
    network(x)
    network.eval()(x)
    (train_map, train_skip), (eval_map, eval_skip) = seen[:2], seen[2:]
    assert train_map.shape == eval_map.shape
    quotient = train_skip / train_map.clamp_min(1e-6)
    shown = train_map > 1e-3
    assert (quotient[shown] < 1).all()
    assert not torch.allclose(train_skip, eval_skip)


def test_the_places_of_the_gates_are_found_by_their_kind() -> None:
    places = find_places(AttentionUNet(2, 1, 2, channels=(4, 6, 8, 8)), torch.rand(1, 1, 16, 16))
    assert {place.name for place in places if place.kind == "gate"} == {"gate.1", "gate.2"}


def test_without_a_second_skip_connection_nothing_is_left_to_gate() -> None:
    with pytest.raises(ValueError, match=r"channels \(4, 8\).*three levels, or gate_full_res"):
        AttentionUNet(2, 1, 2, channels=(4, 8))
    assert list(AttentionUNet(2, 1, 2, (4, 8), gate_full_resolution=True).gate) == ["0"]

"""A network by its configuration, the sizes that it can train on, and what its logits mean."""

from __future__ import annotations

import pytest
import torch

from medseg_reg.errors import MedsegError
from medseg_reg.networks import UNet
from medseg_reg.networks.build import (
    Network,
    build_network,
    check_input_size,
    parameter_count,
    predicted_labels,
    probabilities,
)


def build(head: str = "softmax", classes: int = 3, **more: object) -> Network:
    return build_network(in_channels=1, classes=classes, head=head, channels=(4, 6, 8), **more)


@pytest.mark.parametrize(("head", "classes", "outputs"), [("softmax", 3, 3), ("sigmoid", 2, 1)])
def test_the_head_decides_the_outputs(head: str, classes: int, outputs: int) -> None:
    assert build(head, classes).eval()(torch.rand(1, 1, 8, 8)).shape[1] == outputs


def test_a_sigmoid_head_is_for_two_classes() -> None:
    with pytest.raises(MedsegError, match="'sigmoid' is for two classes, the data have 3"):
        build("sigmoid", 3)


@pytest.mark.parametrize("name", ["unet", "attention_unet", "unet3plus"])
@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("size", [(3, 4), (4, 4), (4, 5), (8, 8)])
def test_a_size_is_refused_exactly_when_training_on_it_would_crash(
    name: str, norm: str, batch: int, size: tuple[int, int]
) -> None:
    network = build(name=name, norm=norm)
    try:
        network(torch.rand(batch, 1, *size))
    except ValueError:
        with pytest.raises(MedsegError, match=rf"size {size[0]}x{size[1]} .* at least 8x8"):
            check_input_size(network, 1, size, batch)
    else:
        check_input_size(network, 1, size, batch)


def test_looking_at_a_size_changes_nothing() -> None:
    network = build()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    random = torch.get_rng_state()
    check_input_size(network, 1, (64, 64), 4)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in network.modules())


def test_labels_are_the_likeliest_classes() -> None:
    logits = torch.tensor([[0.1, 2.0, -1.0], [1.0, -3.0, 4.0]])[..., None, None]
    assert predicted_labels(logits).flatten().tolist() == [1, 2]
    assert predicted_labels(logits).dtype == torch.uint8
    assert predicted_labels(logits).shape == (2, 1, 1)
    one = torch.tensor([[-0.5], [0.0], [0.5]])[..., None, None]
    assert predicted_labels(one).flatten().tolist() == [0, 0, 1]


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_probabilities_add_up_and_agree_with_the_labels(channels: int) -> None:
    logits = torch.randn(2, channels, 5, 6, generator=torch.Generator().manual_seed(0))
    found = probabilities(logits.bfloat16())
    assert found.shape == (2, max(channels, 2), 5, 6)
    assert found.dtype == torch.float32
    assert torch.allclose(found.sum(1), torch.ones(2, 5, 6))
    assert torch.equal(found.argmax(1).to(torch.uint8), predicted_labels(logits.bfloat16()))


def test_only_trainable_values_are_counted() -> None:
    network = build()
    whole = parameter_count(network)
    assert whole == sum(p.numel() for p in network.parameters())
    assert isinstance(network, UNet)
    network.classify.requires_grad_(False)
    assert parameter_count(network) == whole - (4 * 3 + 3)

"""A hierarchical mixture of experts in the place of the last convolution, of any network."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from medseg_reg.errors import MedsegError
from medseg_reg.inference.stochastic import sampling
from medseg_reg.insertion import find_places, insert, place, remove
from medseg_reg.networks import HierarchicalMixture
from medseg_reg.networks.build import Network, build_network
from medseg_reg.regularizers import TreeDropout
from tests.insertion.transformers import recompute
from tests.networks.small_foreign import SMALL
from tests.reference import tree_dropout as reference

OWN: list[dict[str, Any]] = [
    {"name": "unet", "channels": (4, 8)},
    {"name": "attention_unet", "channels": (4, 6, 8)},
    {"name": "unet3plus", "channels": (4, 8), "cat_channels": 3},
]
FOREIGN: list[dict[str, Any]] = [
    {"name": "monai.BasicUNet", "features": [4, 4, 8, 8, 8, 4]},
    {"name": "monai.UNETR", "img_size": 32, "hidden_size": 24, "mlp_dim": 24, "num_heads": 2},
    {"name": "smp.Unet", "encoder_name": "resnet18", "decoder_channels": [8, 8, 8, 8, 4]},
    {"name": "smp.Segformer", "encoder_name": "mit_b0", "decoder_segmentation_channels": 8},
]
# Too dear for each run.
MORE: list[dict[str, Any]] = [
    {"name": "monai.SwinUNETR", **SMALL["monai.SwinUNETR"]},
    {"name": "smp.DPT", **SMALL["smp.DPT"]},
]


def build(arguments: dict[str, Any], depth: int = 2, head: str = "softmax") -> Network:
    torch.manual_seed(0)
    return build_network(in_channels=1, classes=2, head=head, tree_depth=depth, **arguments)


def mixture_of(network: nn.Module) -> HierarchicalMixture:
    (found,) = [m for m in network.modules() if isinstance(m, HierarchicalMixture)]
    return found


def image(*size: int) -> torch.Tensor:
    return torch.rand(2, 1, *(size or (32, 32)), generator=torch.Generator().manual_seed(1))


# The head


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_head_is_a_tree_of_its_convolutions(dims: int) -> None:
    torch.manual_seed(0)
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    head, x = HierarchicalMixture(conv(5, 3, 1), depth=3), torch.rand(2, 5, *(4, 3, 2)[:dims])
    leaves = head.experts(x).detach().numpy().reshape(2, 8, 3, *x.shape[2:])
    gates = torch.sigmoid(head.gates(x)).detach().numpy()
    expected = [reference.answer(a, b) for a, b in zip(leaves, gates, strict=True)]
    np.testing.assert_allclose(head(x).detach().numpy(), np.stack(expected), atol=1e-6)


def test_kernel_stride_and_padding_are_those_of_the_convolution() -> None:
    conv = nn.Conv2d(4, 2, (3, 5), stride=2, padding=(1, 2), dilation=1, padding_mode="reflect")
    head, x = HierarchicalMixture(conv, depth=1), torch.rand(1, 4, 9, 11)
    assert head(x).shape == conv(x).shape
    with torch.no_grad():
        for part in (head.experts, head.gates):
            part.weight.zero_()
            part.bias.zero_()
        head.experts.weight[:2] = conv.weight
        head.experts.bias[:2] = conv.bias
    torch.testing.assert_close(head(x), 0.5 * conv(x))


@pytest.mark.parametrize(
    ("conv", "depth", "said"),
    [(nn.Conv2d(4, 2, 1), 0, "at least one level"), (nn.Conv2d(4, 2, 1, groups=2), 1, "2 groups")],
)
def test_a_tree_that_cannot_be_is_refused(conv: nn.Conv2d, depth: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        HierarchicalMixture(conv, depth)


def test_evaluation_expects_what_training_draws_and_mc_dropout_draws_again() -> None:
    network, x = build(OWN[0], depth=3).eval(), image()
    plain = network(x)
    place(network, "tree_dropout", ["tree_gates"], {"p": 0.5})
    network.eval()
    expected = network(x)
    assert not torch.allclose(expected, plain)
    mixture_of(network).tree_gates[0].p = 0.0
    assert torch.equal(network(x), plain)
    mixture_of(network).tree_gates[0].p = 0.5
    with torch.no_grad(), sampling(network) as layers:
        assert len(layers) == 1
        many = x[:1, :, :4, :4].expand(4000, 1, 4, 4)
        mean, spread = network(many).mean(0), network(many).std(0)
    network.eval()
    assert ((mean - network(many[:1])[0]).abs() < 5 * spread / 4000**0.5 + 1e-5).all()


def test_plain_evaluation_is_that_of_the_tree_without_dropout() -> None:
    network, x = build(OWN[0]).eval(), image()
    plain = network(x)
    place(network, "tree_dropout", ["tree_gates"], {"p": 0.5, "evaluation": "plain"})
    assert torch.equal(network.eval()(x), plain)


# In networks


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(one, id=one["name"], marks=pytest.mark.slow if one in MORE else ())
        for one in OWN + FOREIGN + MORE
    ],
)
@pytest.mark.parametrize("head", ["softmax", "sigmoid"])
def test_the_last_convolution_becomes_a_mixture(arguments: dict[str, Any], head: str) -> None:
    network, x = build(arguments, head=head), image()
    plain = build(arguments, depth=0, head=head)
    assert mixture_of(network).leaves == 4
    new, old = network.state_dict(), plain.state_dict()
    heads = [key for key in old if key not in new]
    assert {key.rpartition(".")[2] for key in heads} <= {"weight", "bias"}
    assert len({key.rpartition(".")[0] for key in heads}) == 1
    assert all(torch.equal(new[key], value) for key, value in old.items() if key in new)
    assert network.eval()(x).shape == plain.eval()(x).shape
    report = insert(network, "tree_dropout", example=x[:1], p=0.5)
    assert [one.place.rpartition(".")[2] for one in report] == ["tree_gates"]
    assert report[0].map_size is not None
    assert report[0].map_size[0] == 3
    network.train()(x).square().sum().backward()
    for part in (mixture_of(network).experts, mixture_of(network).gates):
        assert part.weight.grad is not None
        assert part.weight.grad.isfinite().all()
    remove(network)
    assert list(network.state_dict()) == list(new)


@pytest.mark.parametrize("arguments", [OWN[0], FOREIGN[2]], ids=lambda one: one["name"])
def test_the_other_places_are_still_there(arguments: dict[str, Any]) -> None:
    network, plain = build(arguments), build(arguments, depth=0)
    names = [[one.name for one in find_places(each, image())] for each in (network, plain)]
    more = [name for name in names[0] if name.endswith("tree_gates")]
    assert [name for name in names[0] if name not in more] == names[1]
    assert len(more) == 1
    report = insert(network, "spatial_dropout", ["between_convs", "head"], example=image(), p=0.3)
    report += insert(network, "tree_dropout", example=image(), p=0.3)
    assert all(one.measured_rate is not None for one in report)


def test_a_network_that_ends_otherwise_is_refused_with_what_was_found() -> None:
    monai = {"name": "monai.UNet", "channels": [4, 8], "strides": [2]}
    with pytest.raises(MedsegError, match=r"monai.UNet does not end .* ConvTranspose2d.*depth: 0"):
        build(monai)
    with pytest.raises(MedsegError, match="does not end in a convolution from features"):
        build({**monai, "num_res_units": 2})


@pytest.mark.parametrize("arguments", [OWN[0], FOREIGN[1]], ids=lambda one: one["name"])
def test_bfloat16_autocast_gives_finite_logits_and_gradients(arguments: dict[str, Any]) -> None:
    network = build(arguments, depth=4)
    insert(network, "tree_dropout", example=image()[:1], p=0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = network(image())
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    without = {name for name, p in network.named_parameters() if p.grad is None}
    assert all("norm_cross_attn" in name for name in without)  # MONAI never uses them
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("arguments", [OWN[0], FOREIGN[1]], ids=lambda one: one["name"])
def test_a_tree_that_is_computed_again_has_the_same_gradients(arguments: dict[str, Any]) -> None:
    network, grads = build(arguments), []
    insert(network, "tree_dropout", example=image()[:1], p=0.5)
    path = next(p for p, m in network.named_modules() if isinstance(m, HierarchicalMixture))
    for again in (False, True):
        if again:
            recompute(network, [path])
        network.zero_grad()
        torch.manual_seed(1)
        network.train()(image()).square().mean().backward()
        grads.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_it_compiles_and_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = build(OWN[0], depth=3), image(13, 12)
    place(network, "tree_dropout", ["tree_gates"], {"p": 0.4})
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(network), fullgraph=True, backend="eager")
    torch.manual_seed(3)
    expected = network(x)
    torch.manual_seed(3)
    torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=1e-5)
    network.eval()
    program = torch.export.export(network, (x,)).module()
    torch.testing.assert_close(program(x), network(x), atol=1e-6, rtol=1e-5)


def test_a_rate_in_evaluation_belongs_to_tree_dropout_alone() -> None:
    network, x = build(OWN[0]).eval(), image()
    plain = network(x)
    place(network, "dropout", ["tree_gates"], {"p": 0.5})
    assert torch.equal(network.eval()(x), plain)
    assert not any(isinstance(m, TreeDropout) for m in network.modules())

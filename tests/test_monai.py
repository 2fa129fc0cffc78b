"""Every regularizer goes by its name into MONAI's networks, and its class into nnU-Net's."""

from __future__ import annotations

import importlib
import pydoc
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from monai.networks.layers.factories import Dropout as factory
from monai.networks.layers.utils import get_dropout_layer
from monai.networks.nets import (
    AttentionUnet,
    BasicUNet,
    BasicUNetPlusPlus,
    DynUNet,
    FlexibleUNet,
    SegResNet,
    UNet,
)
from torch import nn

import medseg_reg.monai
from medseg_reg.monai import factory_names
from medseg_reg.regularizers import (
    HeuristicDropout,
    Regularizer,
    SpatialDropout,
    base,
    build,
    regularizer_class,
    regularizer_names,
)

Network = Callable[..., nn.Module]
NAMES = [name for name in regularizer_names() if not regularizer_class(name).place_kinds]

unet = partial(UNet, 2, 1, 2, (8, 16, 16), (2, 2))
basic_unet = partial(BasicUNet, 2, 1, 2, (8, 8, 16, 16, 16, 8))


def layers(network: nn.Module) -> list[Regularizer]:
    return [module for module in network.modules() if isinstance(module, Regularizer)]


def train_one_step(network: nn.Module, x: torch.Tensor) -> float:
    """Return the largest change of a weight."""
    before = [weight.detach().clone() for weight in network.parameters()]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    loss = network.train()(x).square().mean()
    assert loss.isfinite()
    loss.backward()
    optimizer.step()
    after = [weight.detach() for weight in network.parameters()]
    assert all(weight.isfinite().all() for weight in after)
    return max((a - b).abs().max().item() for a, b in zip(after, before, strict=True))


def assert_it_works(network: nn.Module, plain: nn.Module, x: torch.Tensor) -> None:
    """The network trains, and with the same weights equals the plain one in `eval()`."""
    weights = zip(plain.state_dict(), network.state_dict().values(), strict=True)
    plain.load_state_dict(dict(weights))
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(x), plain.eval()(x), rtol=0, atol=0)
    assert train_one_step(network, x) > 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [unet, basic_unet], ids=["UNet", "BasicUNet"])
def test_every_regularizer_works_by_name(make: Network, name: str) -> None:
    torch.manual_seed(0)
    network = make(dropout=(factory_names(name)[0], {"p": 0.2}))
    found = layers(network)
    assert {type(layer) for layer in found} == {regularizer_class(name)}
    assert {layer.p for layer in found} == {0.2}
    assert list(network.state_dict()) == list(make().state_dict())
    assert_it_works(network, make(), torch.rand(2, 1, 32, 32))


@pytest.mark.parametrize("name", NAMES)
def test_every_spelling_gives_the_layer_with_its_arguments(name: str) -> None:
    for key in (*factory_names(name), *map(str.lower, factory_names(name))):
        layer = get_dropout_layer((key, {"p": 0.25}))
        assert repr(layer) == repr(build(name, p=0.25))
        assert repr(get_dropout_layer(key)) == repr(build(name))


def test_the_names_are_those_of_the_registry_in_upper_case() -> None:
    assert factory_names("heuristic_dropout") == ("HEURISTIC_DROPOUT", "HEURISTICDROPOUT")
    with pytest.raises(ValueError, match="did you mean 'heuristic_dropout'"):
        factory_names("heuristc_dropout")


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_the_dropout_dim_of_monai_changes_nothing(dim: int) -> None:
    layer = get_dropout_layer("spatial_dropout", dropout_dim=dim)
    assert type(layer) is SpatialDropout
    y = layer(torch.ones(8, 16, 5, 4))
    assert torch.equal((y == 0).all((2, 3)), (y == 0).any(3).any(2))  # whole channels, always


def test_monais_own_dropouts_stay_what_they_are() -> None:
    kinds = (nn.Dropout, nn.Dropout2d, nn.Dropout3d)
    for dim, kind in enumerate(kinds, start=1):
        assert type(get_dropout_layer(0.1, dropout_dim=dim)) is kind
        assert type(get_dropout_layer(("dropout", {"p": 0.1}), dropout_dim=dim)) is kind
    assert type(get_dropout_layer("alphadropout")) is nn.AlphaDropout
    assert factory_names("dropout") == ("MEDSEG_DROPOUT", "MEDSEGDROPOUT")


def test_names_that_would_clash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    monkeypatch.setattr(factory, "components", dict(factory.components))
    made = {
        name: base.register(name)(type(name.title(), (SpatialDropout,), {}))
        for name in ("alpha_dropout", "new_one", "newone")
    }
    medseg_reg.monai.enter_all()
    medseg_reg.monai.enter_all()
    assert factory_names("alpha_dropout") == ("ALPHA_DROPOUT",)  # ALPHADROPOUT is MONAI's
    assert factory_names("new_one") == ("NEW_ONE",)
    assert factory_names("newone") == ("NEWONE",)
    for name, cls in made.items():
        assert type(get_dropout_layer(name)) is cls


def test_importing_anew_changes_nothing() -> None:
    before = factory.names
    importlib.reload(medseg_reg.monai)
    assert factory.names == before
    assert len(set(before)) == len(before)
    assert factory["heuristicdropout", 1] is HeuristicDropout


class First(nn.Module):
    """The first of several outputs."""

    def forward(self, outputs: list[torch.Tensor]) -> torch.Tensor:
        return outputs[0]


PLACES: list[tuple[str, Network, int, int]] = [
    ("UNet", unet, 4, 5),
    ("UNet with residual units", partial(unet, num_res_units=2), 9, 12),
    ("BasicUNet", basic_unet, 18, 23),
    (
        "BasicUNetPlusPlus",
        partial(BasicUNetPlusPlus, 2, 1, 2, features=(8, 8, 16, 16, 16, 8)),
        30,
        44,
    ),
    (
        "DynUNet",
        partial(DynUNet, 2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[8, 16, 32]),
        13,
        13,
    ),
    ("AttentionUnet", partial(AttentionUnet, 2, 1, 2, (8, 16, 32), (2, 2)), 8, 17),
]


@pytest.mark.parametrize(("name", "make", "places", "convs"), PLACES, ids=[p[0] for p in PLACES])
def test_the_layers_sit_behind_as_many_convolutions_as_the_page_says(
    name: str, make: Network, places: int, convs: int
) -> None:
    torch.manual_seed(0)
    network = make(dropout=("spatial_dropout", {"p": 0.2}))
    assert len(layers(network)) == places
    kinds = (nn.Conv2d, nn.ConvTranspose2d)
    assert sum(isinstance(module, kinds) for module in network.modules()) == convs
    x = torch.rand(2, 1, 32, 32)
    if name == "BasicUNetPlusPlus":  # a list of outputs
        network, plain = nn.Sequential(network, First()), nn.Sequential(make(), First())
    else:
        plain = make()
    assert_it_works(network, plain, x)


def test_what_monai_leaves_out_of_the_attention_unet() -> None:
    network = AttentionUnet(2, 1, 2, (8, 16, 32), (2, 2), dropout=("spatial_dropout", {"p": 0.2}))
    inside = {path for path, module in network.named_modules() if isinstance(module, Regularizer)}
    assert not any(".attention." in path or ".upconv." in path for path in inside)
    left = [module.p for module in network.modules() if type(module) is nn.Dropout]
    assert left == [0.0, 0.0]


def test_the_last_layer_of_a_unet_has_none() -> None:
    network = unet(dropout=("spatial_dropout", {"p": 0.2}))
    assert not layers(network.model[-1])


def test_the_order_puts_the_layer_behind_the_activation() -> None:
    d = ("spatial_dropout", {"p": 0.2})
    assert [name for name, _ in unet(dropout=d).model[0].adn.named_children()] == ["N", "D", "A"]
    behind = unet(dropout=d, adn_ordering="NAD")
    assert [name for name, _ in behind.model[0].adn.named_children()] == ["N", "A", "D"]


def test_segresnet_takes_a_number_alone_and_the_decoder_of_flexible_unet_a_name() -> None:
    with pytest.raises(TypeError):
        SegResNet(2, 8, 1, 2, dropout_prob=("spatial_dropout", {"p": 0.2}))
    network = FlexibleUNet(1, 2, "efficientnet-b0", spatial_dims=2, dropout="spatial_dropout")
    inside = [path for path, module in network.named_modules() if isinstance(module, Regularizer)]
    assert len(inside) == 10
    assert all(path.startswith("decoder.") for path in inside)


# nnU-Net: a class and its arguments, between convolution and normalization.


class ConvDropoutNorm(nn.Sequential):
    """One convolution as nnU-Net builds it: the layer comes before the normalization."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        dropout_op: type[nn.Module] | None = None,
        dropout_op_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        if dropout_op is not None:
            self.dropout = dropout_op(**(dropout_op_kwargs or {}))
        self.norm = nn.InstanceNorm2d(outputs, eps=1e-5, affine=True)
        self.nonlin = nn.LeakyReLU(inplace=True)


def stand_in(**dropout: Any) -> nn.Module:
    blocks = [ConvDropoutNorm(a, b, s, **dropout) for a, b, s in ((1, 8, 1), (8, 16, 2))]
    return nn.Sequential(*blocks, nn.ConvTranspose2d(16, 8, 2, 2), ConvDropoutNorm(8, 2, 1))


def plain_conv_unet(**dropout: Any) -> nn.Module:
    unets = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    network: nn.Module = unets.PlainConvUNet(
        input_channels=1,
        n_stages=3,
        features_per_stage=(8, 16, 16),
        conv_op=nn.Conv2d,
        kernel_sizes=3,
        strides=(1, 2, 2),
        n_conv_per_stage=2,
        num_classes=2,
        n_conv_per_stage_decoder=2,
        conv_bias=True,
        norm_op=nn.InstanceNorm2d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        **dropout,
    )
    return network


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [stand_in, plain_conv_unet], ids=["stand-in", "PlainConvUNet"])
def test_every_class_fits_nnunet(make: Network, name: str) -> None:
    cls = regularizer_class(name)
    # A plans file names the class by its path.
    assert pydoc.locate(f"medseg_reg.regularizers.{cls.__name__}") is cls
    torch.manual_seed(0)
    network = make(dropout_op=cls, dropout_op_kwargs={"p": 0.2})
    assert {layer.p for layer in layers(network)} == {0.2}
    assert_it_works(network, make(), torch.rand(2, 1, 32, 32))

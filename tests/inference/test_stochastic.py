"""Which layers draw by chance, and a network in which only those do."""

from __future__ import annotations

import pytest
import timm.layers
import torch
import torchvision
from monai.networks.layers import DropPath as MonaiDropPath
from torch import nn

from medseg_reg.errors import MedsegError
from medseg_reg.inference.stochastic import (
    fixed_layers,
    require_stochastic,
    sampling,
    stochastic_layers,
)
from medseg_reg.insertion import insert, place
from medseg_reg.insertion.running import seeded
from medseg_reg.networks import UNet3Plus
from medseg_reg.networks.build import build_network
from medseg_reg.regularizers import (
    DropBlock,
    HeuristicDropout,
    NSDropout,
    Regularizer,
    SpatialDropout,
    regularizer_class,
    regularizer_names,
)


class Composite(Regularizer):
    """A regularizer of somebody else that brings a normalization along."""

    def __init__(self) -> None:
        super().__init__(0.5)
        self.norm, self.drop = nn.BatchNorm2d(2), nn.Dropout(0.5)

    def regularize(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.norm(x))


@pytest.mark.parametrize(
    "layer",
    [
        SpatialDropout(0.2),
        DropBlock(0.2),
        HeuristicDropout(0.2, selection="sampled"),
        nn.Dropout(0.1),
        nn.Dropout2d(0.1),
        nn.AlphaDropout(0.1),
        timm.layers.DropPath(0.1),
        timm.layers.DropBlock2d(0.1),
        torchvision.ops.StochasticDepth(0.1, "row"),
        torchvision.ops.DropBlock2d(0.1, 3),
        MonaiDropPath(0.1),
        nn.MultiheadAttention(4, 2, dropout=0.1),
    ],
    ids=lambda layer: f"{type(layer).__module__.split('.')[0]}.{type(layer).__name__}",
)
def test_a_layer_that_draws_is_found(layer):
    assert stochastic_layers(nn.Sequential(nn.ReLU(), layer))["1"] is layer


@pytest.mark.parametrize(
    "layer",
    [
        HeuristicDropout(0.2),
        NSDropout(0.2),
        SpatialDropout(0.0),
        nn.Dropout(0.0),
        timm.layers.DropPath(0.0),
        nn.MultiheadAttention(4, 2),
        nn.BatchNorm2d(3),
        nn.ReLU(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_layer_that_does_not_draw_is_not(layer):
    assert stochastic_layers(nn.Sequential(layer)) == {}


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), SpatialDropout(0.5), HeuristicDropout(0.5)
    )


def test_only_the_layers_that_draw_are_in_training_mode():
    model = network().train()
    with sampling(model) as layers:
        assert layers == [model[2]]
        assert [part.training for part in model] == [False, False, True, False]
        assert not model.training
    assert all(module.training for module in model.modules())


def test_normalization_keeps_and_uses_what_it_learned():
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(8, 1, 6, 6) * 9 + 50
    with sampling(model), torch.no_grad():
        first, second = model[:2](images[:1]), model[:2](images)
        model(images)
    # In training mode the batch would decide its own mean.
    assert torch.equal(first, second[:1])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_modes_come_back_after_an_error():
    model = network().eval()
    with pytest.raises(RuntimeError), sampling(model):
        raise RuntimeError
    assert not any(module.training for module in model.modules())


def test_a_normalization_inside_a_regularizer_stays_in_evaluation():
    model = nn.Sequential(Composite()).eval()
    with sampling(model):
        assert model[0].training
        assert model[0].drop.training
        assert not model[0].norm.training


def test_the_fast_path_of_transformers_does_not_leave_dropouts_out():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True))
    tokens = torch.randn(2, 5, 8)
    with sampling(model), torch.inference_mode():
        assert not torch.equal(model(tokens), model(tokens))


def test_seeding_is_for_a_block_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded(torch.device("cpu"), 1):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with seeded(torch.device("cpu"), 1):
        assert torch.equal(torch.rand(3), first)
    assert not torch.equal(first, expected)


def test_a_network_that_draws_is_accepted():
    require_stochastic(network(), "run")


def test_a_network_without_such_layers_is_told_apart():
    with pytest.raises(MedsegError, match=r"^run: has no layer that draws.*spatial_dropout"):
        require_stochastic(nn.Sequential(nn.ReLU()), "run")


def test_layers_that_do_not_draw_are_named_with_what_helps():
    model = nn.Module()
    model.one, model.two = HeuristicDropout(0.1), HeuristicDropout(0.1)
    model.none, model.labels = SpatialDropout(0.0), NSDropout(0.2)
    assert list(fixed_layers(model)) == ["one", "two", "none", "labels"]
    with pytest.raises(MedsegError) as error:
        require_stochastic(model, "runs/a")
    text = str(error.value)
    assert "HeuristicDropout (one, two) takes the channels" in text
    assert "`selection: sampled`" in text
    assert "SpatialDropout (none) has the rate p = 0" in text
    assert "NSDropout (labels) decides by its input" in text


def test_many_places_are_cut_short():
    model = nn.Sequential(*(HeuristicDropout(0.1) for _ in range(9)))
    with pytest.raises(MedsegError, match=r"\(0, 1, 2 and 6 more\)"):
        require_stochastic(model, "run")


def test_the_dropout_of_a_fused_attention_draws() -> None:
    torch.manual_seed(0)
    attention = timm.layers.Attention(8, num_heads=2, attn_drop=0.5)
    assert attention.fused_attn
    network, x = nn.Sequential(nn.LayerNorm(8), attention).eval(), torch.rand(1, 6, 8)
    assert list(stochastic_layers(network)) == ["1.attn_drop"]
    with sampling(network):
        assert not torch.equal(network(x), network(x))
    assert not attention.training
    assert torch.equal(network(x), network(x))


def test_paths_that_an_encoder_drops_without_a_layer_are_drawn() -> None:
    small = {"encoder_depth": 3, "decoder_channels": [8, 8, 8]}
    network = build_network(
        in_channels=1, classes=2, head="softmax", name="smp.Unet",
        encoder_name="efficientnet-b0", **small,
    ).eval()  # fmt: skip
    x, encoder = torch.rand(8, 1, 32, 32), network.network.encoder
    # Rates of the first blocks are so small that draws would often be equal.
    encoder._drop_connect_rate = 1.0
    found = stochastic_layers(network)
    assert {type(layer).__name__ for layer in found.values()} == {"MBConvBlock"}
    with torch.no_grad():
        expected = network(x)
        with sampling(network):
            draws = [network(x) for _ in range(6)]
            assert any(not torch.equal(draws[0], one) for one in draws[1:])
            norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
            assert not any(norm.training for norm in norms)
        assert torch.equal(network(x), expected)
    encoder._drop_connect_rate = 0.0
    with pytest.raises(MedsegError, match="has no layer that draws by chance"):
        require_stochastic(network, "run")


UNETR = {"img_size": 32, "feature_size": 4, "hidden_size": 8, "mlp_dim": 8, "num_heads": 2}


@pytest.mark.parametrize("name", regularizer_names())
def test_every_regularizer_draws_in_a_network_or_says_that_it_does_not(name: str) -> None:
    cls = regularizer_class(name)
    own = {"channels": (4, 6, 8), "tree_depth": 2}
    foreign = {"name": "monai.UNETR", "experts": {"experts": 2}, **UNETR}
    maps = {"between_convs", "after_norm", "bottleneck", "input", "tree_gates"}
    more = own if cls.default_places[0] in maps else foreign
    torch.manual_seed(0)
    network = build_network(in_channels=1, classes=2, head="softmax", **more)
    x = torch.rand(2, 1, 32, 32)
    layer = insert(network, name, cls.default_places[0], example=x[:1], p=0.5)
    assert len(layer) > 0
    network.eval()
    if not cls.stochastic:
        with pytest.raises(MedsegError, match=f"{cls.__name__}.* "):
            require_stochastic(network, "run")
        return
    with torch.no_grad():
        expected = network(x)
        with sampling(network):
            draws = [network(x) for _ in range(6)]
        assert any(not torch.equal(draws[0], one) for one in draws[1:])
        assert torch.equal(network(x), expected)


def test_the_head_that_says_which_classes_are_there_is_no_regularizer() -> None:
    arguments = {"channels": (4, 8), "cat_channels": 4, "classification_guided": True}
    network = UNet3Plus(2, 1, 2, **arguments)
    assert stochastic_layers(network) == {}
    place(network, "heuristic_dropout", ["*"], {"p": 0.3})
    with pytest.raises(MedsegError, match="none of its layers draws by chance"):
        require_stochastic(network, "run")
    place(network, "spatial_dropout", ["bottleneck.*"], {"p": 0.3})
    assert all("bottleneck" in path for path in stochastic_layers(network))

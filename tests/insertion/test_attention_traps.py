"""What a transformer would do with a layer in silence is told when the layer is put there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medseg_reg.errors import MedsegError
from medseg_reg.insertion import find_places, insert, place
from medseg_reg.insertion.hooks import _both
from medseg_reg.networks import UNet
from medseg_reg.networks.token_labels import use_token_labels
from medseg_reg.networks.token_selection import use_token_selection
from tests.insertion.transformers import SWIN, TRANSFORMERS
from tests.insertion.zoo import monai, smp, timm

IMAGE = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))


def refused(network: nn.Module, *arguments: Any, **more: Any) -> str:
    """The message of an insertion that leaves the network as it was."""
    before = repr(network)
    with pytest.raises(MedsegError) as error:
        insert(network, *arguments, **{"example": IMAGE, **more})
    assert repr(network) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    return str(error.value)


class Patches(nn.Module):
    """A block of MONAI's transformer between two convolutions."""

    def __init__(self, **block: Any) -> None:
        super().__init__()
        blocks = pytest.importorskip("monai.networks.blocks.transformerblock")
        self.embed = nn.Conv2d(1, 12, 16, 16)
        self.block = blocks.TransformerBlock(12, 24, 3, **block)
        self.last = nn.Conv2d(12, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.embed(x)
        tokens = self.block(maps.flatten(2).transpose(1, 2))
        return self.last(tokens.transpose(1, 2).reshape(maps.shape))


def test_a_layer_that_needs_the_weights_is_told_that_the_attention_is_fused() -> None:
    said = refused(TRANSFORMERS["timm-vit-fused"].network(), "spatial_dropout", "attention")
    assert "the attention of 'blocks.0.attn' is fused, so its weights are never there" in said
    assert "'blocks.0.attn.fused_attn'" in said
    assert "TIMM_FUSED_ATTN=0" in said


@pytest.mark.parametrize("name", ["guided_key_dropout", "guided_residual_dropout"])
def test_guided_dropout_is_told_that_an_attention_is_fused(name: str) -> None:
    said = refused(TRANSFORMERS["timm-vit-fused"].network(), name)
    assert "its weights are never there and the layer would never be called" in said


@pytest.mark.parametrize("name", ["SwinUNETR", "Segformer"])
def test_tokens_in_windows_have_no_attention_of_their_own(name: str) -> None:
    said = refused(TRANSFORMERS[name].network(), "guided_residual_dropout")
    assert "sees windows or fewer keys than the block has tokens" in said
    assert "Use guided_key_dropout" in said


def test_a_fused_attention_without_a_mask_says_how_to_take_it_apart() -> None:
    case = TRANSFORMERS["timm-swin"]
    network = case.network()
    for module in network.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    said = refused(network, "drop_key", example=case.example())
    assert "takes no argument attn_mask: set 'layers.0.blocks.0.attn.fused_attn' to False" in said


def test_flash_attention_that_is_random_in_evaluation_is_refused() -> None:
    said = refused(Patches(use_flash_attention=True, dropout_rate=0.2), "drop_key")
    assert "'block.attn' draws its dropout of 0.2 in evaluation too" in said
    assert "dropout_rate=0" in said


def test_flash_attention_without_dropout_gets_its_keys_hidden() -> None:
    torch.manual_seed(0)
    network = Patches(use_flash_attention=True).eval()
    before = network(IMAGE)
    (report,) = insert(network, "drop_key", example=IMAGE, p=0.5)
    assert report.map_size == (3, 16, 16)
    assert report.measured_rate == pytest.approx(0.5, abs=0.1)
    assert torch.equal(network(IMAGE), before)
    assert not torch.equal(network.train()(IMAGE), before)


def test_flash_attention_that_is_there_only_without_gradients_is_refused() -> None:
    said = refused(monai("SwinUNETR", 1, 2, use_flash_attention=True, **SWIN)(), "drop_key")
    assert "fused attention wherever no gradients are, as in MC dropout" in said
    assert "attn.use_flash_attention' to False" in said


def test_relative_positions_that_are_wrong_on_small_maps_are_told_once() -> None:
    network = TRANSFORMERS["SwinUNETR"].network().swinViT
    report = insert(network, "drop_key", example=IMAGE)
    assert report.note == (
        "encoder.4.attention: windows of 16 tokens take the first of the relative positions for "
        "49, so that most pairs get the offset of another pair; train on larger images (MONAI's "
        "SwinUNETR: at least 112 pixels)."
    )
    wrong = report.note.partition(": ")[2]
    for name, places in (("drop_head", "attention_head"), ("drop_path", "encoder.4.residual*")):
        other = insert(network, name, f"{places}", example=IMAGE, p=0.1)
        assert other.note.partition(": ")[2] == wrong, name
    large = torch.rand(1, 1, 128, 128)
    assert not insert(network, "drop_head", example=large).note
    assert not insert(network, "drop_key", "attention", example=large).note
    assert not insert(network, "drop_path", "encoder.4.residual*", example=large).note


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(
            timm("vit_tiny_patch16_224", img_size=64, depth=2, patch_drop_rate=0.5), id="timm"
        ),
        pytest.param(
            smp("DPT", "tu-vit_tiny_patch16_224", dynamic_img_size=True, patch_drop_rate=0.25),
            id="DPT",
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.parametrize("name", ["drop_key", "drop_head", "drop_path"])
def test_a_network_that_drops_patches_itself_is_refused(make: Any, name: str) -> None:
    places = {"drop_path": "encoder.4.residual"}.get(name)
    said = refused(make(), name, places)
    assert "in training this place has (" in said
    assert "patch_drop_rate=0" in said


@pytest.mark.parametrize(
    ("part", "use"),
    [
        ("token_selection", lambda *where: use_token_selection(*where, stages=1)),
        ("token_labels", lambda *where: use_token_labels(*where, 2)),
    ],
)
def test_parts_beside_blocks_refuse_such_a_network_too(part: str, use: Any) -> None:
    network = timm("vit_tiny_patch16_224", img_size=64, depth=2, patch_drop_rate=0.5)()
    before = repr(network)
    said = "'patch_drop' leaves out 0.5 of the patches in training.*patch_drop_rate=0"
    with pytest.raises(MedsegError, match=f"network.{part}: ViT: {said}"):
        use(network, IMAGE.shape, "ViT")
    assert repr(network) == before


def test_maps_behind_dropped_patches_are_told_to_be_wrong() -> None:
    body = timm("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=0, patch_drop_rate=0.5)
    network = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), body(), nn.Unflatten(1, (192, 1, 1)),
                            nn.Conv2d(192, 2, 1))  # fmt: skip
    report = insert(network, "dropout", "head", example=IMAGE)
    assert report.note == (
        "the network: '1.patch_drop' leaves out 0.5 of the patches in training, so that maps made "
        "of the others are wrong: build it without, as with timm's patch_drop_rate=0."
    )


@pytest.mark.parametrize("name", ["guided_key_dropout", "guided_residual_dropout"])
def test_guided_dropout_is_told_that_an_attention_is_flash(name: str) -> None:
    said = refused(Patches(use_flash_attention=True), name)
    assert "its weights are never there and the layer would never be called" in said
    assert "Set 'block.attn.use_flash_attention' to False first." in said


def test_a_module_that_a_fused_attention_never_calls_is_no_place() -> None:
    for name, path in (("timm-vit-fused", "blocks.*.attn.attn_drop"), ("DPT", "*.attn.attn_drop")):
        said = refused(TRANSFORMERS[name].network(), "dropout", f"path:{path}")
        assert f"no module that runs matches 'path:{path}'" in said


def test_rates_that_add_up_are_told() -> None:
    network = smp("Segformer", "mit_b0", decoder_segmentation_channels=16)()
    report = insert(network, "drop_path", example=IMAGE, p=0.1)
    # The first block has a rate of 0.
    assert report.note == (
        "encoder.2.residual.1 and 6 more: the network drops these branches by a DropPath of its "
        "own; both rates act."
    )


def test_rates_that_add_up_are_told_of_maps_too() -> None:
    convnext = pytest.importorskip("torchvision.models.convnext")
    stages = [convnext.CNBlockConfig(4, 8, 1), convnext.CNBlockConfig(8, None, 1)]
    network = convnext.ConvNeXt(stages, stochastic_depth_prob=0.2, num_classes=2)
    report = insert(network, "drop_path", example=torch.rand(1, 3, 64, 64), p=0.1)
    assert [one.place.rpartition(".")[2] for one in report] == ["residual", "residual"]
    assert report.note == (
        f"{report[1].place}: the network drops these branches by a StochasticDepth of its own; "
        "both rates act."
    )


def test_a_layer_of_attentions_goes_nowhere_else() -> None:
    case = TRANSFORMERS["UNETR"]
    said = refused(case.network(), "drop_key", "between_convs", example=case.example())
    assert "it is for places of the kind attention; 'encoder.0.between_convs' is none" in said
    with pytest.raises(MedsegError, match="drop_head.*places of the kind attention_head; 'head'"):
        place(UNet(2, 1, 2, channels=(4, 8)), "drop_head", ["head"], {})


def test_a_network_without_attention_says_which_places_it_has() -> None:
    with pytest.raises(
        MedsegError, match="no place matches 'attention'. Places: after_block, input"
    ):
        insert(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), "drop_key", example=IMAGE)


class Bare(nn.Module):
    """An attention written out by functions, of one head, whose heads are not side by side."""

    def __init__(self, softmax: bool, head_major: bool) -> None:
        super().__init__()
        self.embed, self.last = nn.Conv2d(1, 12, 16, 16), nn.Conv2d(12, 2, 1)
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.softmax = nn.Softmax(-1) if softmax else None
        self.head_major = head_major

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.embed(x)
        x = maps.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        weights = q @ k.transpose(-2, -1)
        weights = F.softmax(weights, -1) if self.softmax is None else self.softmax(weights)
        heads = (weights @ v).permute(*((0, 2, 1, 3) if self.head_major else (0, 2, 3, 1)))
        x = x + self.proj(heads.reshape(x.shape))
        return self.last(x.transpose(1, 2).reshape(maps.shape))


def test_what_no_module_hands_on_is_no_place() -> None:
    kinds = {
        (softmax, head_major): {
            place.kind for place in find_places(Bare(softmax, head_major), IMAGE) if place.tokens
        }
        for softmax in (True, False)
        for head_major in (True, False)
    }
    assert kinds[True, True] == {"attention", "attention_head", "residual"}
    assert kinds[False, True] == {"attention_head", "residual"}
    assert kinds[True, False] == {"attention", "residual"}  # channel after channel of all heads
    network = Bare(True, True)
    assert insert(network, "drop_key", example=IMAGE)[0].path == "softmax.regularizer"
    assert insert(network, "drop_head", example=IMAGE)[0].path == "proj.regularizer"


class Inline(nn.Module):
    """A block that computes its attention itself, by no module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(12), nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.qkv(self.norm(x)).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        weights = (heads[0] @ heads[1].transpose(-2, -1)).softmax(-1)
        return x + self.out((weights @ heads[2]).transpose(1, 2).flatten(2))


class InlineBlocks(Patches):
    """Several of them in a sequence, which is then the module around each attention."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(Inline(), Inline())


def test_several_attentions_in_one_module_are_no_block_to_skip() -> None:
    said = refused(InlineBlocks(), "guided_residual_dropout")
    assert "'block', the module around the attention of 'block.0', holds other attentions" in said


@pytest.mark.parametrize("forbidden", [-torch.inf, torch.finfo(torch.float32).min])
def test_a_row_of_which_nothing_is_left_keeps_the_mask_of_scores(forbidden: float) -> None:
    mask = torch.tensor([[0.0, 2.0, forbidden], [0.0, forbidden, forbidden]])
    keep = torch.tensor([[True, False, True], [False, True, True]])
    found = _both(keep, mask).softmax(-1)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0, 0], [1, 0, 0]]))

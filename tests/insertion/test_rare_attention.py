"""Attentions that networks of the large packages do not have, and what is said of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg_reg.errors import MedsegError
from medseg_reg.insertion import find_places, insert
from tests.insertion.transformers import TRANSFORMERS, outputs

IMAGE = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
WIDTH, HEADS = 12, 3


class Attention(nn.Module):
    """An attention with heads as wide as one likes, fused or not."""

    def __init__(self, channels: int = 4, fused: bool = True) -> None:
        super().__init__()
        self.channels, self.fused, self.every = channels, fused, 1
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * channels)
        self.softmax, self.proj = nn.Softmax(-1), nn.Linear(HEADS * channels, WIDTH)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, self.channels)).permute(2, 0, 3, 1, 4)
        k, v = k[:, :, :: self.every], v[:, :, :: self.every]
        if self.fused:
            heads = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        else:
            heads = self.softmax(q @ k.transpose(-2, -1) / self.channels**0.5) @ v
        return self.proj(heads.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A block around it, which calls it in one of several ways."""

    def __init__(self, attn: nn.Module, call: str = "alone") -> None:
        super().__init__()
        self.norm, self.attn, self.call = nn.LayerNorm(WIDTH), attn, call

    def forward(self, x: Tensor) -> Any:
        y = self.norm(x)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        added = {
            "alone": lambda: self.attn(y),
            "by position": lambda: self.attn(y, causal),
            "by name": lambda: self.attn(y, attn_mask=causal),
            "nothing by position": lambda: self.attn(y, None),
            "tuple": lambda: self.attn(y),
        }[self.call]()
        return (x + added, added) if self.call == "tuple" else x + added


class Patches(nn.Module):
    """Blocks between two convolutions, on 16 tokens of 16 x 16 pixels."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embed, self.last = nn.Conv2d(1, WIDTH, 16, 16), nn.Conv2d(WIDTH, 2, 1)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.embed(x)
        tokens = maps.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
            tokens = tokens[0] if isinstance(tokens, tuple) else tokens
        return self.last(tokens.transpose(1, 2).reshape(maps.shape))


def network(call: str = "alone", **attention: Any) -> nn.Module:
    torch.manual_seed(0)
    return Patches(Block(Attention(**attention), call))


def refused(model: nn.Module, name: str) -> str:
    with pytest.raises(MedsegError) as error:
        insert(model, name, example=IMAGE)
    return str(error.value)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("channels", [1, 4, 16])
def test_the_level_of_tokens_does_not_depend_on_the_width_of_heads(channels, fused):
    model = network(channels=channels, fused=fused)
    names = {place.kind: place.name for place in find_places(model, IMAGE) if place.tokens}
    wanted = {"attention", "attention_head", "block_residual", "residual", "tokens"}
    assert names == {kind: f"encoder.4.{kind}" for kind in wanted}


class Maps(nn.Module):
    """A block that gets and gives maps, with channels first, and flattens them itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention(16, fused=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


def test_nor_does_it_where_a_block_gets_a_map():
    model = nn.Sequential(nn.Conv2d(1, WIDTH, 8, 8), Maps(), nn.Conv2d(WIDTH, 2, 1))
    found = [place.name for place in find_places(model, IMAGE) if place.kind == "attention"]
    assert found == ["encoder.3.attention"]


def trained(call: str) -> Tensor:
    model = network(call)
    insert(model, "drop_key", example=IMAGE, p=0.5)
    torch.manual_seed(1)
    return model.train()(IMAGE)


def test_a_mask_that_a_fused_attention_gets_by_position_is_kept_beside_the_layers():
    by_name, without = trained("by name"), trained("alone")
    assert torch.equal(trained("by position"), by_name)
    assert torch.equal(trained("nothing by position"), without)
    assert not torch.allclose(by_name, without)
    # What the mask of the network hides stays hidden: no token depends on a later one.
    model = network("by position")
    insert(model, "drop_key", example=IMAGE, p=0.5)
    x = IMAGE.clone().requires_grad_()
    model.train()(x)[:, :, 0, 0].sum().backward()
    assert x.grad[:, :, :16, :16].abs().sum() > 0
    assert not x.grad[:, :, 16:].any()


def test_a_fused_attention_without_a_switch_is_told_of_none():
    said = refused(network(), "spatial_dropout")
    assert "no place matches" in said  # by default it goes to maps
    for name in ("guided_key_dropout", "guided_residual_dropout"):
        said = refused(network(), name)
        assert "the attention of 'blocks.0.attn' is fused" in said
        assert "Build the network with an attention that computes its weights." in said
        assert "fused_attn" not in said
        assert "TIMM" not in said


def test_the_switch_that_a_module_has_is_named():
    model = network()
    model.blocks[0].attn.use_flash_attention = True
    said = refused(model, "guided_residual_dropout")
    assert "Set 'blocks.0.attn.use_flash_attention' to False first." in said
    assert "TIMM" not in said


def test_fewer_keys_than_tokens_are_the_reason_why_nothing_can_be_hidden():
    model = network()
    model.blocks[0].attn.every = 2
    said = refused(model, "drop_key")
    assert "it has 16 queries for 8 keys, where keys are no tokens to hide" in said
    assert "takes no argument" not in said


def test_a_block_that_returns_several_tensors_is_told_so():
    said = refused(network("tuple", fused=False), "patch_dropout")
    assert "'blocks.0' returns more than its tokens" in said
    assert "()" not in said


def test_patches_are_dropped_and_blocks_skipped_whichever_is_inserted_first():
    case, found = TRANSFORMERS["UNETR"], []
    names = ["guided_residual_dropout", "patch_dropout"]
    for order in (names, names[::-1]):
        model = case.network()
        for name in order:
            insert(model, name, example=case.example(), p=0.5)
        torch.manual_seed(0)
        result = outputs(model.train(), case.example(3))
        sum(y.square().mean() for y in result).backward()
        found.append(result)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

"""A block of a transformer that computes some rows alone, with all it gets as keys and values."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from medseg_reg.errors import MedsegError


class RowBlock(nn.Module):
    r"""The rows of some tokens behind a block of timm's or MONAI's vision transformer.

    .. math::
        x'_i = x_i + \operatorname{softmax}(q_i K^T / \sqrt{d}) V W_o, \qquad
        y_i = x'_i + \operatorname{MLP}(\operatorname{LN}(x'_i)), \qquad i \in m

    with K and V of all tokens of the input and q of those in m alone: the attention is rectangular,
    and projections and MLP run on the rows of m. It has the modules of the block by the same names,
    so the names of the weights stay.

    Args:
        block: the block; it is not changed.
        keep: m, which of the tokens of the input, bool (N,).
        reuse: whether the other tokens stay behind it, with what they had; else they are left out.

    Raises:
        MedsegError: the block is another one, or has layers inserted, which would see other tokens.

    Paper:
        Y. Tang, K. Han, Y. Wang, C. Xu, J. Guo, C. Xu, D. Tao, "Patch Slimming for Efficient Vision
        Transformers", CVPR 2022, doi 10.1109/CVPR52688.2022.01185.

    >>> import torch
    >>> from timm.models.vision_transformer import Block
    >>> block, x = Block(8, 2).eval(), torch.rand(1, 5, 8)
    >>> part = RowBlock(block, torch.tensor([True, False, False, True, False]))(x)
    >>> torch.allclose(part, block(x)[:, [0, 3]], atol=1e-6)
    True
    """

    rows: Tensor

    def __init__(self, block: nn.Module, keep: Tensor, reuse: bool = False) -> None:
        super().__init__()
        _require_plain(block)
        for name, child in block.named_children():
            self.add_module(name, child)
        self.register_buffer("rows", keep.nonzero()[:, 0], persistent=False)
        self.tokens, self.reuse = len(keep), reuse
        self._block = (block,)  # not a child: its weights would have two names
        self.training = block.training

    @property
    def block(self) -> nn.Module:
        """The whole block."""
        return self._block[0]

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Map tokens (B, N, C) to (B, rows, C), or to (B, N, C) where others are reused."""
        if attn_mask is not None:
            raise ValueError("a block that computes some rows alone takes no mask")
        if x.shape[1] != self.tokens:
            raise ValueError(
                f"the network was slimmed for images of {self.tokens} tokens, this one has "
                f"{x.shape[1]}: masks are for one size"
            )
        parts: Any = self
        y = x[:, self.rows]
        y = y + self._branch(1, _attend(parts.attn, parts.norm1(x), self.rows))
        y = y + self._branch(2, parts.mlp(parts.norm2(y)))
        return x.index_copy(1, self.rows, y.to(x.dtype)) if self.reuse else y

    def _branch(self, number: int, x: Tensor) -> Tensor:
        """Apply what timm has at the end of a residual branch."""
        for name in (f"ls{number}", f"drop_path{number}"):
            part = getattr(self, name, None)
            x = x if part is None else part(x)
        return x

    def extra_repr(self) -> str:
        """Name the number of rows."""
        return f"rows={len(self.rows)} of {self.tokens}, reuse={self.reuse}"


def whole_block(block: nn.Module) -> nn.Module:
    """Return the block itself, or that of which it computes some rows."""
    return block.block if isinstance(block, RowBlock) else block


def block_operations(block: nn.Module, tokens: int, rows: int) -> int:
    """Return the multiply-adds of a block that gets so many tokens and computes so many rows.

    With the width C and hidden features F: 2 N C^2 for K and V, and for each row 2 C^2 for query
    and projection, 2 N C for the attention, 2 C F for the MLP.

    >>> from timm.models.vision_transformer import Block
    >>> block = Block(8, 2)
    >>> block_operations(block, 5, 5) == 4 * 5 * 64 + 2 * 25 * 8 + 2 * 5 * 8 * 32
    True
    """
    parts: Any = block
    linear = [m for m in parts.mlp.modules() if isinstance(m, nn.Linear)]
    width, inner = int(parts.attn.qkv.in_features), int(parts.attn.qkv.out_features) // 3
    mlp = sum(one.in_features * one.out_features for one in linear)
    return 2 * tokens * width * inner + rows * (2 * width * inner + 2 * tokens * inner + mlp)


def _attend(attention: Any, x: Tensor, rows: Tensor) -> Tensor:
    """Return the rows of a self-attention of timm or MONAI on tokens (B, N, C)."""
    weight, bias = attention.qkv.weight, attention.qkv.bias
    inner = weight.shape[0] // 3
    biases = (None, None) if bias is None else (bias[:inner], bias[inner:])
    query = F.linear(x[:, rows], weight[:inner], biases[0])
    key, value = F.linear(x, weight[inner:], biases[1]).chunk(2, dim=-1)
    heads = attention.num_heads
    query, key, value = (
        one.unflatten(-1, (heads, -1)).transpose(1, 2) for one in (query, key, value)
    )
    timm = hasattr(attention, "attn_drop")
    if timm:
        query, key = attention.q_norm(query), attention.k_norm(key)
    drop = attention.attn_drop if timm else attention.drop_weights
    p = drop.p if attention.training else 0.0
    found = F.scaled_dot_product_attention(query, key, value, dropout_p=p, scale=attention.scale)
    found = found.transpose(1, 2).flatten(2)
    if timm:
        return attention.proj_drop(attention.proj(attention.norm(found)))  # type: ignore[no-any-return]
    return attention.drop_output(attention.out_proj(found))  # type: ignore[no-any-return]


def _require_plain(block: Any) -> None:
    """Refuse a block that does more than what is written in `RowBlock`."""
    attention: Any = getattr(block, "attn", None)
    name = type(block).__name__
    kinds = {("Block", "Attention"), ("TransformerBlock", "SABlock")}
    plain = (
        (name, type(attention).__name__) in kinds
        and isinstance(attention.qkv, nn.Linear)
        and getattr(attention, "gate", None) is None
        and not getattr(attention, "causal", False)
        and getattr(attention, "rel_positional_embedding", None) is None
        and not getattr(block, "with_cross_attention", False)
    )
    if not plain:
        raise MedsegError(
            f"a block {name} with attention {type(attention).__name__} cannot compute some rows "
            "alone. Use a plain ViT, as in monai.UNETR, smp.DPT with tu-vit_*, or deit_*."
        )
    parts = list(block.modules())
    if any(m._forward_hooks or m._forward_pre_hooks for m in parts) or any(
        type(one).__module__.startswith("medseg_reg.") for one in parts
    ):
        raise MedsegError(
            f"a block {name} has layers inserted, which expect all tokens. Slim a network without "
            "them: token_selection, token_merging, experts and layers of transformers are left "
            "out, or taken out by `remove`."
        )

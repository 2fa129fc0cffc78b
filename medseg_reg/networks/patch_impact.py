"""How much each patch counts for what a transformer hands on: the scores of Patch Slimming."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from medseg_reg.errors import MedsegError
from medseg_reg.networks.foreign import ForeignNetwork
from medseg_reg.networks.token_encoder import token_encoder


def impacts(
    attentions: Sequence[Tensor], inputs: Sequence[Tensor], taps: Collection[int]
) -> Tensor:
    """Return the impact of each token of each block on the outputs that others read.

    With P_t^h the attention weights of head h in block t, Z_{t-1} its input and
    U_t^h = P_t^h |Z_{t-1}|, the impact of token i on the output of a later block u is

        s_{t,i} = mean over heads of ||A[:, i]||^2 ||U_t^h[i, :]||^2,  A = P_u^h ... P_{t+1}^h,

    the mean over every choice of a head in each of these blocks; it is the squared norm of the
    matrix A[:, i] U_t^h[i, :]. All choices at once are one recursion, from the last block down:

        G_t = I [t is read] + mean_h (P_{t+1}^h)^T G_{t+1} P_{t+1}^h
        s_{t,i} = (G_t)_ii mean_h ||U_t^h[i, :]||^2

    Where outputs of several blocks are read, as by the decoder of UNETR, their impacts add up.

    Args:
        attentions: P of each block, (B, H, N, N), rows sum to 1.
        inputs: Z of each block, (B, N, C).
        taps: numbers of the blocks, from 0, whose outputs are read.

    Returns:
        (B, blocks, N), float64.

    Paper:
        Y. Tang, K. Han, Y. Wang, C. Xu, J. Guo, C. Xu, D. Tao, "Patch Slimming for Efficient Vision
        Transformers", CVPR 2022, doi 10.1109/CVPR52688.2022.01185. It sums over heads, which is
        another scale for each block, and reads the class token of the last block alone.
    """
    batch, _, tokens, _ = attentions[0].shape
    gram = torch.zeros(batch, tokens, tokens, dtype=torch.float64, device=attentions[0].device)
    found: list[Tensor] = []
    for block in reversed(range(len(attentions))):
        weights = attentions[block].double()
        if block in taps:
            gram = gram + torch.eye(tokens, dtype=torch.float64, device=gram.device)
        found.append(block_impacts(gram, weights, inputs[block]))
        gram = gram_below(gram, weights)
    return torch.stack(found[::-1], dim=1)


def block_impacts(gram: Tensor, weights: Tensor, inputs: Tensor) -> Tensor:
    """Return s of one block, (B, N), by G of its output, its attention weights and its input."""
    norms = (weights.double() @ inputs.double().abs()[:, None]).square().sum(-1).mean(1)
    return gram.diagonal(dim1=1, dim2=2) * norms


def gram_below(gram: Tensor, weights: Tensor, rows: Tensor | None = None) -> Tensor:
    """Return G of the input of a block, (B, N, N), by that of its output.

    Args:
        gram: G of the output.
        weights: P of the block, (B, H, N, N).
        rows: which tokens the block computes, bool (N,), where others are left out: diag(m) P
            stands for P.
    """
    weights = weights.double()
    if rows is not None:
        weights = weights * rows[:, None]
    return (weights.transpose(2, 3) @ gram[:, None] @ weights).mean(1)


def patch_impacts(network: nn.Module, images: Tensor) -> Tensor:
    """Return the impact of each patch of images in each block of a network's transformer.

    Blocks of large norms have large impacts: compare patches of one block, averaged over images.

    Args:
        network: monai.UNETR or smp.DPT, built by `build_network`, in evaluation mode.
        images: (B, C, H, W), of a size that it takes.

    Returns:
        (B, blocks, N), the patches row after row.

    Raises:
        MedsegError: it is another network, or its attentions do not see all patches.
    """
    vit = token_encoder(network).vit
    attentions: list[Tensor] = []
    inputs: list[Tensor] = []
    with ExitStack() as stack, torch.no_grad():
        for block in vit.blocks:
            stack.enter_context(recorded(block.attn, attentions))
            hook = block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
            stack.callback(hook.remove)
        network(images)
    tokens = inputs[0].shape[1]
    seen = [one.shape[2:] for one in attentions]
    if seen != [(tokens, tokens)] * len(vit.blocks):
        raise MedsegError(
            "the attentions of this network do not show weights of all patches among each other, "
            "from which impacts are computed. Leave token_selection and token_merging out."
        )
    prefix = int(getattr(vit, "num_prefix_tokens", 0))
    return impacts(attentions, inputs, read_blocks(network))[..., prefix:]


def read_blocks(network: nn.Module) -> set[int]:
    """Return the numbers of the blocks, from 0, whose outputs the decoder reads."""
    blocks = len(token_encoder(network).vit.blocks)
    inner: Any = network.network if isinstance(network, ForeignNetwork) else network
    found = getattr(getattr(inner, "encoder", None), "_output_indices", (3, 6, 9, -1))
    return {number % blocks for number in found}


def best_patches(scores: Tensor, keep: float) -> Tensor:
    """Return which share of the patches has the most impact in each block, over all images.

    Args:
        scores: of `patch_impacts`, (B, blocks, N).
        keep: the share, in (0, 1]; at least one patch is kept.

    Returns:
        (blocks, N), boolean.

    >>> best_patches(torch.tensor([[[3.0, 1.0, 2.0, 0.0]]]), 0.5).tolist()
    [[True, False, True, False]]
    """
    mean = scores.mean(0)
    best = mean.topk(max(1, round(keep * mean.shape[1])), dim=1).indices
    return torch.zeros_like(mean, dtype=torch.bool).scatter(1, best, True)


@contextmanager
def rows_reused(network: nn.Module, keep: Tensor) -> Iterator[None]:
    """Let blocks compute the rows of some patches alone, while the block of code runs.

    The others keep what they had before the block, and all stay keys and values. This is the
    pruning of rows, of the attention and of the MLP, that Patch Slimming does, the same for all
    images, to see what it would cost in quality. No time is saved: rows are computed and left out;
    see `slim` for what saves it.

    Args:
        network: as in `patch_impacts`.
        keep: which patches each block computes, (blocks, N), boolean.
    """
    vit = token_encoder(network).vit
    prefix = torch.ones(int(getattr(vit, "num_prefix_tokens", 0)), dtype=torch.bool)
    with ExitStack() as stack:
        for block, rows in zip(vit.blocks, keep, strict=True):
            every = torch.cat([prefix, rows.cpu()])[:, None]

            def reuse(_: nn.Module, args: Any, output: Tensor, every: Tensor = every) -> Tensor:
                return torch.where(every.to(output.device), output, args[0])

            stack.callback(block.register_forward_hook(reuse).remove)
        yield


@contextmanager
def recorded(attention: Any, found: list[Tensor]) -> Iterator[None]:
    """Collect the weights of an attention of MONAI or timm while it runs."""
    fused = getattr(attention, "fused_attn", False)
    if fused:
        attention.fused_attn = False
    drop = attention.attn_drop if hasattr(attention, "attn_drop") else attention.drop_weights
    hook = drop.register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
    try:
        yield
    finally:
        hook.remove()
        if fused:
            attention.fused_attn = True

"""The search of Patch Slimming: which patches a classifier needs, from its last block to its first.

Y. Tang, K. Han, Y. Wang, C. Xu, J. Guo, C. Xu, D. Tao, "Patch Slimming for Efficient Vision
Transformers", CVPR 2022, doi 10.1109/CVPR52688.2022.01185.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medseg_reg.networks.patch_impact import block_impacts, gram_below, recorded
from medseg_reg.networks.row_block import RowBlock
from medseg_reg.networks.slimming import require_class_token

# Images of a step of the fine-tuning.
_BATCH = 16


@dataclass(frozen=True)
class Slimming:
    """What `find_patches` found.

    Attributes:
        keep: which patches are left behind each block, bool (blocks, N).
        errors: relative reconstruction error of the output of each block but the first, by what
            the block before it leaves out.
    """

    keep: Tensor
    errors: tuple[float, ...]


@torch.no_grad()
def find_patches(
    network: nn.Module,
    images: Tensor,
    tolerance: float = 0.01,
    step: int = 10,
    epochs: int = 0,
    lr: float = 1e-4,
) -> Slimming:
    r"""Search the patches that a classifier needs, the same for every image.

    The last block keeps no patch, as its class tokens alone are read. A block l keeps what the next
    one keeps, and then, as long as the rows that count of that one change too much,

    .. math::
        E_{l+1} = \| Z^{slim}_{l+1} - Z_{l+1} \|_F^2 / \| Z_{l+1} \|_F^2 > \epsilon,

    `step` further patches of the greatest impact

    .. math::
        s_{l,i} = (G_l)_{ii} \operatorname{mean}_h \| (P_l^h |Z_{l-1}|)_i \|^2, \quad
        G_l = \operatorname{mean}_h (m_{l+1} P_{l+1}^h)^T G_{l+1} (m_{l+1} P_{l+1}^h)

    with G the identity on the class tokens behind the last block; s and E are over all images.

    With `epochs`, block l is fine-tuned, each time that E is too large, to make E small on these
    images, before E is measured again and patches are added. What block l then gives, with all
    patches, is what the blocks before it have to keep. Weights that do not make E smaller are taken
    back. Without, weights stay as they are, and more
    patches are needed.

    Args:
        network: timm's vision transformer that reads its class token; only with `epochs` it is
            changed: all its blocks but the last.
        images: of the training, (B, C, H, W): some dozens. Their tokens before every block, and the
            attention weights of one block, are held at a time.
        tolerance: epsilon; published: 0.01 and 0.02.
        step: patches that are added at a time; published: 10.
        epochs: of the fine-tuning of a block over the images, by Adam; published: 3.
        lr: its learning rate.

    Raises:
        MedsegError: it reads its patches, or its blocks are no plain ones.
    """
    vit: Any = network
    require_class_token(vit)
    was = vit.training
    vit.eval()
    inputs = _tokens(vit, images)
    prefix, tokens, blocks = int(vit.num_prefix_tokens), inputs[0].shape[1], len(vit.blocks)
    kept = torch.zeros(blocks, tokens, dtype=torch.bool, device=images.device)
    kept[:, :prefix] = True
    gram = torch.diag(kept[-1].double()).expand(len(images), -1, -1)
    errors: list[float] = []
    for number in reversed(range(blocks)):
        block, before = vit.blocks[number], inputs[number]
        if number + 1 < blocks:
            pair = _Pair(
                block, vit.blocks[number + 1], before, inputs[number + 2], kept[number + 1]
            )
            scores = block_impacts(gram, _weights(block, before), before).mean(0)
            kept[number], error = pair.widened(scores, tolerance, step, epochs, lr)
            errors.append(error)
            inputs[number + 1] = block(before)
        gram = gram_below(gram, _weights(block, before), kept[number])
    vit.train(was)
    return Slimming(kept[:, prefix:].cpu(), tuple(errors[::-1]))


@dataclass(frozen=True)
class _Pair:
    """A block whose patches are searched, and the next one, whose output tells when they suffice.

    Attributes:
        block: the block.
        following: the next one.
        before: tokens before the block, (B, N, C).
        behind: tokens behind the next one where it gets all.
        wanted: which of them count, bool (N,).
    """

    block: nn.Module
    following: nn.Module
    before: Tensor
    behind: Tensor
    wanted: Tensor

    def widened(
        self, scores: Tensor, tolerance: float, step: int, epochs: int, lr: float
    ) -> tuple[Tensor, float]:
        """Return which tokens the block must keep, at least those that count, and the error."""
        order = scores.masked_fill(self.wanted, -torch.inf).argsort(descending=True)
        order = order[: int((~self.wanted).sum())]
        kept, added = self.wanted.clone(), 0
        while True:
            error = self.error(kept)
            if error > tolerance and epochs:
                error = self.tuned(kept, error, epochs, lr)
            if error <= tolerance or added >= len(order):
                return kept, error
            kept[order[added : added + step]] = True
            added += step

    def error(self, kept: Tensor) -> float:
        """Return E of all images."""
        return float(self._error(kept, slice(None)))

    def tuned(self, kept: Tensor, error: float, epochs: int, lr: float) -> float:
        """Make E smaller by the weights of the block, which stay where that fails; return it."""
        parameters = list(self.block.parameters())
        before = [one.clone() for one in parameters]
        optimizer = torch.optim.Adam(parameters, lr)
        for _ in range(epochs):
            for start in range(0, len(self.before), _BATCH):
                with torch.enable_grad():
                    found = self._error(kept, slice(start, start + _BATCH))
                    gradients = torch.autograd.grad(found, parameters)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
        optimizer.zero_grad()
        after = self.error(kept)
        if after < error:
            return after
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
        return error

    def _error(self, kept: Tensor, part: slice) -> Tensor:
        rows = RowBlock(self.block, kept)(self.before[part])
        found = RowBlock(self.following, self.wanted[kept])(rows).double()
        truth = self.behind[part][:, self.wanted].double()
        error: Tensor = (found - truth).square().sum() / truth.square().sum()
        return error


def _tokens(vit: Any, images: Tensor) -> list[Tensor]:
    """Return the tokens before each block and behind the last."""
    found: list[Tensor] = []
    hooks = [b.register_forward_pre_hook(lambda _, args: found.append(args[0])) for b in vit.blocks]
    hooks.append(vit.blocks[-1].register_forward_hook(lambda *given: found.append(given[2])))
    try:
        vit(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _weights(block: Any, tokens: Tensor) -> Tensor:
    """Return the attention weights (B, H, N, N) of a block."""
    found: list[Tensor] = []
    with recorded(block.attn, found):
        block.attn(block.norm1(tokens))
    return found[0]

"""Dynamic selection of tokens for dense prediction: those not chosen skip a block but stay.

Y. Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification",
NeurIPS 2021, arXiv:2106.02034, and "Dynamic Spatial Sparsification for Efficient Vision
Transformers and Convolutional Neural Networks", T-PAMI 2023, arXiv:2207.01580; Y. Liu et al.,
"Revisiting Token Pruning for Object Detection and Instance Segmentation" (SViT), WACV 2024,
arXiv:2306.07050.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medseg_reg.errors import MedsegError
from medseg_reg.insertion import find_places
from medseg_reg.insertion.kinds import own_patch_dropout
from medseg_reg.insertion.places import Place
from medseg_reg.insertion.running import quietly
from medseg_reg.insertion.sequence import FewerTokens, hang_keys
from medseg_reg.networks.pass_state import PassState
from medseg_reg.networks.sparse_experts import SparseExperts, feed_forward_blocks
from medseg_reg.regularizers.patch_dropout import PatchDropout, gather_tokens

_ROUNDING = 1e-9
MODES = ("block", "feed_forward")


class TokenSelection(PassState):
    r"""Chooses the tokens that a block of a transformer works on.

    .. math::
        s_i = [\ell_i + g_i > 0], \qquad y_i = s_i B(x)_i + (1 - s_i) f(x_i)

    with the logit l of a small predictor, a layer norm and an MLP of a quarter of the width (8 at
    least), and g logistic noise, the difference of two Gumbel variables. The gradient is that of
    sigmoid((l + g) / temperature): Gumbel-softmax over keep and skip, straight-through. Of a whole
    block B, f is the identity, so that a token that is not chosen keeps its features and its place
    (SViT); of a feed-forward block it is a linear layer, the fast path. While training B sees all
    tokens, and those not chosen are hidden as keys of its attention, without a gradient through
    that. At least one patch is chosen.

    In evaluation there is no noise: the k = max(1, floor(keep N)) patches of the greatest logits
    are gathered, B runs on them alone, and its answers are put in their places. Of the same choice
    this is what training computes.

    It adds ``weight`` times (mean of s over patches and batch - keep)^2 to the loss; where the task
    gains more from another share, that is a pull and no bound. An image may keep more than others
    in training; in evaluation each keeps k, so that the result for an image does not depend on its
    batch.

    `use_token_selection` hangs it on the blocks of a network.

    Args:
        width: features of a token.
        keep: the share of the patches to choose, in (0, 1).
        weight: of the loss.
        temperature: of the relaxation that gives the gradient.
        prefix_tokens: how many tokens in front are no patches; they are always chosen.
        fast: whether f is a linear layer.

    Attributes:
        penalty: what a training pass adds to the loss; else None.
        kept: the share of the patches that the last training pass chose, without a gradient.
        in_evaluation: whether it chooses in ``eval()``; False lets a block run on all tokens.

    Raises:
        ValueError: an argument is out of range.

    >>> selection = TokenSelection(8, keep=0.5).eval()
    >>> x = torch.rand(2, 10, 8)
    >>> inside = selection.enter(x)
    >>> inside.shape, selection.leave(inside + 1).sub(x).sum((1, 2)).round().tolist()
    (torch.Size([2, 5, 8]), [40.0, 40.0])
    """

    of_a_pass = ("penalty", "kept", "_tokens", "_mask", "_order")

    def __init__(
        self,
        width: int,
        keep: float = 0.7,
        weight: float = 4.0,
        temperature: float = 1.0,
        prefix_tokens: int = 0,
        fast: bool = False,
    ) -> None:
        super().__init__()
        if not 0 < keep < 1 or weight < 0 or temperature <= 0:
            raise ValueError(
                f"expected keep in (0, 1), weight >= 0, temperature > 0; got {keep}, {weight}, "
                f"{temperature}"
            )
        self.keep, self.weight, self.temperature = float(keep), float(weight), float(temperature)
        self.prefix_tokens = prefix_tokens
        hidden = max(8, width // 4)
        first, last = nn.Linear(width, hidden), nn.Linear(hidden, 1)
        self.predictor = nn.Sequential(nn.LayerNorm(width), first, nn.GELU(), last)
        # It begins near its target, not at one half.
        nn.init.constant_(last.bias, math.log(keep / (1 - keep)))
        self.fast = nn.Linear(width, width) if fast else None
        self.in_evaluation = True
        self.penalty: Tensor | None = None
        self.kept: Tensor | None = None
        self._tokens: Tensor | None = None
        self._mask: Tensor | None = None
        self._order: Tensor | None = None
        self._shape = torch.Size()

    def logits(self, tokens: Tensor) -> Tensor:
        """Return the logit of each patch of tokens (B, N, width): (B, patches), float32."""
        found: Tensor = self.predictor(tokens[:, self.prefix_tokens :])
        return found.squeeze(-1).float()

    def enter(self, x: Tensor) -> Tensor:
        """Return what a block is to run on in place of tokens (B, ..., width)."""
        self._tokens = self._mask = self._order = self.penalty = None
        if not (self.training or self.in_evaluation):
            return x
        self._shape = x.shape
        self._tokens = tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        logits = self.logits(tokens)
        if self.training:
            self._mask = self._drawn(logits)
            return x
        patches = logits.shape[1]
        order = logits.argsort(1, descending=True) + self.prefix_tokens
        front = torch.arange(self.prefix_tokens, device=x.device).expand(len(x), -1)
        self._order = torch.cat([front, order], 1)
        count = max(1, math.floor(self.keep * patches + _ROUNDING))
        # In their own order, as a block that knows it would see them.
        chosen = self._order[:, : self.prefix_tokens + count].sort(1).values
        self._order = torch.cat([chosen, self._order[:, chosen.shape[1] :]], 1)
        return gather_tokens(tokens, chosen)

    def leave(self, y: Tensor) -> Tensor:
        """Return all tokens behind a block, in the shape in which they came."""
        tokens, mask, order = self._tokens, self._mask, self._order
        self._tokens = self._mask = self._order = None
        if tokens is not None and mask is not None:
            other = (tokens if self.fast is None else self.fast(tokens)).view(y.shape)
            share = mask.view(*y.shape[:-1], 1).to(y.dtype)
            return share * y + (1 - share) * other
        if tokens is None or order is None:
            return y
        count = y.shape[1]
        if self.fast is None:
            index = order[:, :count, None].expand_as(y)
            kind = torch.promote_types(y.dtype, tokens.dtype)
            return tokens.to(kind).scatter(1, index, y.to(kind)).view(self._shape)
        rest = self.fast(gather_tokens(tokens, order[:, count:]))
        both = torch.cat([y, rest.to(y.dtype)], 1)
        index = order[..., None].expand_as(both)
        return torch.zeros_like(both).scatter(1, index, both).view(self._shape)

    def key_weights(self) -> Tensor | None:
        """Return 0 for tokens that are no keys in this pass, else 1, (B, N); None for no mask."""
        return None if self._mask is None else self._mask.detach()

    def _drawn(self, logits: Tensor) -> Tensor:
        """Return s (B, N) with the gradient of its relaxation, and note the penalty."""
        noise = torch.empty_like(logits).uniform_().clamp(1e-6, 1 - 1e-6)
        noisy = logits + noise.log() - (-noise).log1p()
        hard = (noisy > 0).float()
        hard = hard.scatter(1, noisy.argmax(1, keepdim=True), 1.0)
        soft = torch.sigmoid(noisy / self.temperature)
        s = hard + (soft - soft.detach())  # of the value of `hard` to the last bit
        self.kept = hard.mean()
        if torch.is_grad_enabled() and self.weight > 0:
            self.penalty = self.weight * (s.mean() - self.keep).square()
        return torch.cat([s.new_ones(len(s), self.prefix_tokens), s], 1)

    def extra_repr(self) -> str:
        """Name the arguments."""
        return f"keep={self.keep:g}, weight={self.weight:g}, temperature={self.temperature:g}"


@dataclass(eq=False)
class SelectHook(FewerTokens):
    """Lets a block run on the tokens that a `TokenSelection` chooses.

    Attributes:
        layer: the selection, a child of the block.
    """

    layer: TokenSelection

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """Return the arguments, with the chosen tokens."""
        chosen = self.layer.enter(args[0])
        return None if chosen is args[0] else (chosen, *args[1:])


@dataclass(eq=False)
class ReturnHook:
    """Puts what a block made of chosen tokens among the others.

    Attributes:
        layer: the selection.
    """

    layer: TokenSelection

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Any:
        """Return all tokens."""
        return self.layer.leave(output)


def use_token_selection(
    network: nn.Module,
    shape: Sequence[int],
    owner: str,
    *,
    keep: float = 0.7,
    stages: int = 3,
    first: int | None = None,
    mode: str = "block",
    weight: float = 4.0,
    temperature: float = 1.0,
) -> list[str]:
    """Let the later blocks of a transformer work on a part of the tokens, chosen anew by each.

    The weights keep their names; those of the predictors stand beside them, as
    ``...blocks.3.selection.predictor.1.weight``.

    Args:
        network: changed in place; it is looked at in evaluation mode.
        shape: of an input (B, C, *spatial) that it takes.
        owner: its name in errors.
        keep: the share of patches in the first stage; keep^2 in the second, and so on.
        stages: into how many equal parts the blocks are divided.
        first: how many blocks at the beginning run on all tokens; a quarter of them by default.
        mode: `block` for whole blocks, whose tokens form one sequence; `feed_forward` for their
            MLPs alone, where the others go through one linear layer. There windows are no obstacle.
        weight: of the loss that holds the shares.
        temperature: see `TokenSelection`.

    Returns:
        The paths of the blocks, in the order in which they run.

    Raises:
        MedsegError: the network has no such blocks, or they cannot run on a part of the tokens.
    """
    key = f"network.token_selection: {owner}"
    if said := own_patch_dropout(network):
        raise MedsegError(f"{key}: {said}.")
    places = [one for one in find_places(network, torch.rand(*shape)) if one.kind == "tokens"]
    place = places[0] if places else None
    paths = _paths(network, shape, place, mode, key)
    start = len(paths) // 4 if first is None else first
    chosen = paths[start:]
    if len(chosen) < stages:
        raise MedsegError(
            f"{key} has {len(paths)} such blocks, of which {len(chosen)} are left after the first "
            f"{start}: too few for stages={stages}. Use less, or another first."
        )
    prefix, share = 0 if place is None else place.prefix, weight / len(chosen)
    for number, path in enumerate(chosen):
        width = token_width(network.get_submodule(path))
        stage = 1 + number * stages // len(chosen)
        fast = mode == "feed_forward"
        selection = TokenSelection(width, keep**stage, share, temperature, prefix, fast)
        _hang(network, path, selection, place if mode == "block" else None)
    _try(network, shape, key)
    return chosen


def _hang(network: nn.Module, path: str, selection: TokenSelection, place: Place | None) -> None:
    """Hang a selection on a block, and on the attention in it if tokens are to be hidden there."""
    block = network.get_submodule(path)
    selection.to(next(network.parameters()).device).train(block.training)
    block.add_module("selection", selection)
    block.register_forward_pre_hook(SelectHook(selection))
    block.register_forward_hook(ReturnHook(selection))
    for keys in () if place is None else place.keys:
        if keys.path.startswith(f"{path}."):
            hang_keys(network, keys, selection)


def token_width(block: nn.Module) -> int:
    """Return the features of the tokens of a block: those of the first that it does with them."""
    for module in block.modules():
        if isinstance(module, nn.LayerNorm):
            return int(module.normalized_shape[-1])
        if isinstance(module, nn.Linear):
            return module.in_features
    raise AssertionError("a block without layers")


def _paths(
    network: nn.Module, shape: Sequence[int], place: Place | None, mode: str, key: str
) -> list[str]:
    """Return the paths of all blocks that could be chosen for."""
    if mode == "feed_forward":
        if any(isinstance(module, SparseExperts) for module in network.modules()):
            raise MedsegError(f"{key}: its feed-forward blocks are experts. Use mode=block.")
        if any(isinstance(m, PatchDropout) and m.window for m in network.modules()):
            raise MedsegError(
                f"{key}: its feed-forward blocks run on fewer tokens already, for PatchDropout. "
                "Take that out first."
            )
        paths = feed_forward_blocks(network, shape)
        if not paths:
            raise MedsegError(
                f"{key} has no feed-forward blocks of a transformer, two linear layers each. Use "
                "a transformer, such as monai.UNETR."
            )
        return paths
    if place is None:
        raise MedsegError(
            f"{key} has no blocks of a transformer that get tokens one after the other. Use a "
            "transformer, such as monai.UNETR."
        )
    if place.windows:
        raise MedsegError(
            f"{key}: its attention sees windows, whose tokens cannot be left out one by one. Use "
            "mode=feed_forward, or the layer patch_dropout, which leaves out rows and columns."
        )
    problems = [place.problem, *(keys.problem for keys in place.keys)]
    problem = next(filter(None, problems), "")
    if problem:
        raise MedsegError(f"{key}: {problem} Or mode=feed_forward.")
    return list(place.chain)


def _try(network: nn.Module, shape: Sequence[int], key: str) -> None:
    """Run the network on fewer tokens, as in evaluation."""
    selections = [m for m in network.modules() if isinstance(m, TokenSelection)]
    device = next(network.parameters()).device
    try:
        with quietly(network, device):
            for one in selections:
                one.in_evaluation = True
            network(torch.rand(*shape, device=device))
    except RuntimeError as error:
        text = " ".join(str(error).split())[:200]
        raise MedsegError(
            f"{key} does not run on a part of its tokens ({text}). Its blocks need the whole grid, "
            "as for relative positions. Use mode=feed_forward."
        ) from error

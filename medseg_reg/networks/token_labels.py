"""Token labelling for dense prediction: each token of a transformer learns what its patch shows.

Z. Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers",
NeurIPS 2021, arXiv:2104.10858.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from medseg_reg.errors import MedsegError
from medseg_reg.insertion import find_places
from medseg_reg.insertion.kinds import own_patch_dropout
from medseg_reg.insertion.running import quietly
from medseg_reg.insertion.sequence import AllTokens
from medseg_reg.networks.pass_state import PassState
from medseg_reg.networks.token_selection import token_width

_KEY = "network.token_labels"


def patch_occupancy(
    labels: Tensor, classes: int, patch: Sequence[int], multiple: int = 1
) -> Tensor:
    r"""Return which fraction of each patch each class has.

    .. math:: y_{ic} = \frac{1}{|P_i|} \sum_{n \in P_i} [t_n = c]

    Args:
        labels: t, (B, *spatial), integers; one that is no class, as an ignored one, counts nowhere,
            so that the fractions of its patch have a smaller sum.
        classes: how many, the background counted.
        patch: pixels of a patch along each axis.
        multiple: the sizes are first brought to multiples of this and of the patch, by repeating
            the border at the end of each axis, as a network pads its images.

    Returns:
        (B, classes, *grid), float32.

    >>> patch_occupancy(torch.tensor([[[0, 1, 1, 1], [0, 0, 1, 1]]]), 2, (2, 2)).tolist()
    [[[[0.75, 0.0]], [[0.25, 1.0]]]]
    """
    index = torch.arange(classes, device=labels.device)
    found = labels.unsqueeze(1) == index.view(1, -1, *[1] * (labels.ndim - 1))
    shares = found.float()
    pads: list[int] = []
    for size, side in reversed(list(zip(labels.shape[1:], patch, strict=True))):
        pads += [0, -size % math.lcm(multiple, side)]
    if any(pads):
        shares = functional.pad(shares, pads, mode="replicate")
    for axis, side in enumerate(patch, start=2):
        shares = shares.unflatten(axis, (-1, side)).mean(axis + 1)
    return shares


def token_label_loss(logits: Tensor, occupancy: Tensor, foreground: float = 1.0) -> Tensor:
    r"""Return the cross-entropy of tokens against the fractions of the classes in their patches.

    .. math::
        L = - \sum_i w_i \sum_c \bar y_{ic} \log \operatorname{softmax}(z_i)_c \Big/ \sum_i w_i,
        \qquad w_i = k_i \, (1 + (\varphi - 1)(1 - \bar y_{i0}))

    with k the sum of the fractions of a patch, 1 where all of its pixels have a class, and
    :math:`\bar y = y / k`. It is 0 if no pixel has one.

    Args:
        logits: z, (B, classes, *grid).
        occupancy: y, of the same shape.
        foreground: phi, how much more a patch full of foreground counts than one of background;
            1 is the plain mean of the paper.

    >>> y = torch.tensor([[[0.25], [0.75]]])
    >>> round(token_label_loss(torch.zeros(1, 2, 1), y).item(), 4)
    0.6931
    """
    with torch.autocast(logits.device.type, enabled=False):
        known = occupancy.sum(1)
        shares = occupancy / known.clamp_min(1e-6)[:, None]
        each = -(shares * torch.log_softmax(logits.float(), dim=1)).sum(1)
        weights = known * (1 + (foreground - 1) * (1 - shares[:, 0]))
        return (weights * each).sum() / weights.sum().clamp_min(1e-6)


class TokenLabels(PassState):
    """Lets the tokens of a transformer learn, beside the task, what their patches show.

    A layer norm and a linear layer turn each token into logits of the classes. ``weight`` times
    `token_label_loss` against `patch_occupancy` is added to the loss. That happens while training
    with labels alone: no output depends on it, and evaluation and exports run without it.

    `use_token_labels` hangs it on a network.

    Args:
        width: features of a token.
        classes: how many, the background counted.
        patch: pixels of a token's patch along each axis.
        multiple: the network pads its images to multiples of this.
        weight: of the loss.
        foreground: see `token_label_loss`.
        prefix_tokens: how many tokens in front are no patches; they have no labels.
        channels_first: whether tokens come as a map (B, width, *grid).

    Attributes:
        labels: the label maps (B, *spatial) of the batch that comes next; set from outside.
        penalty: what a training pass adds to the loss; None without labels or gradients.

    Raises:
        ValueError: an argument is out of range; in the forward pass, labels that do not fit.

    How it differs from the paper: there a stronger classifier makes the labels, which here come
    from the mask. There is no class token, and in evaluation the heads add nothing to the output.

    >>> layer = TokenLabels(8, classes=2, patch=(4, 4))
    >>> layer.labels = torch.zeros(1, 8, 8, dtype=torch.uint8)
    >>> layer.watch(torch.rand(1, 4, 8))
    >>> layer.penalty.shape
    torch.Size([])
    """

    of_a_pass = ("penalty", "labels")

    def __init__(
        self,
        width: int,
        classes: int,
        patch: Sequence[int],
        multiple: int = 1,
        weight: float = 0.5,
        foreground: float = 1.0,
        prefix_tokens: int = 0,
        channels_first: bool = False,
    ) -> None:
        super().__init__()
        if weight < 0 or foreground <= 0:
            raise ValueError(f"expected weight >= 0, foreground > 0; got {weight}, {foreground}")
        self.weight, self.foreground = float(weight), float(foreground)
        self.classes, self.patch, self.multiple = classes, tuple(patch), multiple
        self.prefix_tokens, self.channels_first = prefix_tokens, channels_first
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))
        self.labels: Tensor | None = None
        self.penalty: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, N, width) or (B, *grid, width) to logits (B, classes, patches)."""
        flat = tokens.flatten(1, -2)[:, self.prefix_tokens :]
        logits: Tensor = self.head(flat)
        return logits.transpose(1, 2)

    def watch(self, tokens: Tensor) -> None:
        """Note the penalty of tokens as a block gives them."""
        self.penalty = None
        if self.labels is None or self.weight == 0 or not torch.is_grad_enabled():
            return
        tokens = tokens.movedim(1, -1) if self.channels_first else tokens
        shares = patch_occupancy(self.labels, self.classes, self.patch, self.multiple)
        patches = math.prod(tokens.shape[1:-1]) - self.prefix_tokens
        if len(shares) != len(tokens) or math.prod(shares.shape[2:]) != patches:
            raise ValueError(
                f"token labels: {len(tokens)} images of {patches} patches, but labels of the shape "
                f"{tuple(self.labels.shape)} for patches of {self.patch} pixels: give those of the "
                "same batch, in the size of the images"
            )
        loss = token_label_loss(self(tokens), shares.flatten(2).to(tokens.device), self.foreground)
        self.penalty = self.weight * loss

    def extra_repr(self) -> str:
        """Name the arguments."""
        return f"patch={self.patch}, weight={self.weight:g}, foreground={self.foreground:g}"


@dataclass(eq=False)
class WatchHook(AllTokens):
    """Shows the tokens that a block gives to a layer beside it.

    Attributes:
        layer: a child of the block.
    """

    layer: TokenLabels

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Leave the output as it is."""
        if self.layer.training:
            self.layer.watch(output)


@dataclass(frozen=True)
class Tap:
    """Tokens behind a block of a transformer.

    Attributes:
        path: of the block.
        width: features of a token.
        patch: pixels of a token's patch along each axis.
        prefix: how many tokens in front are no patches.
        channels_first: whether tokens come as a map (B, width, *grid).
    """

    path: str
    width: int
    patch: tuple[int, ...]
    prefix: int
    channels_first: bool


def use_token_labels(
    network: nn.Module,
    shape: Sequence[int],
    owner: str,
    classes: int,
    *,
    weight: float = 0.5,
    taps: int = 1,
    foreground: float = 1.0,
) -> list[str]:
    """Let the tokens behind blocks of a transformer learn what their patches show.

    The weights keep their names; those of the heads stand beside them, as
    ``...blocks.11.token_labels.head.1.weight``. The random state is left as it was, so that
    everything else is drawn as without.

    Args:
        network: changed in place; it is looked at in evaluation mode.
        shape: of an input (B, C, *spatial) that it takes.
        owner: its name in errors.
        classes: how many, the background counted.
        weight: of the loss, shared evenly by the taps.
        taps: behind how many blocks: 1 for the last, 3 for the ends of three equal parts.
        foreground: see `token_label_loss`.

    Returns:
        The paths of the blocks, in the order in which they run.

    Raises:
        MedsegError: the network has no such blocks, too few, or they give no grid of patches.
    """
    if said := own_patch_dropout(network):
        raise MedsegError(f"{_KEY}: {owner}: {said}.")
    blocks = _blocks(network, shape, owner)
    if taps > len(blocks):
        raise MedsegError(f"{_KEY}: {owner} has {len(blocks)} blocks, fewer than taps={taps}.")
    paths = list(blocks)
    chosen = [paths[len(paths) * (number + 1) // taps - 1] for number in range(taps)]
    device = next(network.parameters()).device
    multiple = int(getattr(network, "factor", 1))
    for tap in _measured(network, shape, {path: blocks[path] for path in chosen}, owner):
        block = network.get_submodule(tap.path)
        with torch.random.fork_rng(devices=[]):
            layer = TokenLabels(
                tap.width,
                classes,
                tap.patch,
                multiple,
                weight / taps,
                foreground,
                tap.prefix,
                tap.channels_first,
            )
        block.add_module("token_labels", layer.to(device).train(block.training))
        block.register_forward_hook(WatchHook(layer))
    return chosen


def finest_patch(network: nn.Module, shape: Sequence[int], key: str) -> tuple[int, ...]:
    """Return the pixels of a patch of a transformer's first tokens along each axis.

    Args:
        network: any network.
        shape: of an input (B, C, *spatial) that it takes.
        key: begins errors.

    Raises:
        MedsegError: the network has no blocks that work on patches.
    """
    blocks = _blocks(network, shape, "the network", key)
    first = next(iter(blocks))
    (tap,) = _measured(network, shape, {first: blocks[first]}, "the network", key)
    return tap.patch


def _blocks(
    network: nn.Module, shape: Sequence[int], owner: str, key: str = _KEY
) -> dict[str, int]:
    """Return the paths of all blocks, with how many tokens in front are no patches."""
    # Of a generator of its own, so that whatever is drawn later is drawn as without.
    example = torch.rand(*shape, generator=torch.Generator().manual_seed(0))
    places = [one for one in find_places(network, example) if one.kind == "tokens"]
    blocks = {path: place.prefix for place in places for path in place.chain}
    if not blocks:
        raise MedsegError(
            f"{key}: {owner} has no blocks of a transformer that get tokens one after the other. "
            "Use a transformer, such as monai.UNETR."
        )
    return blocks


def _measured(
    network: nn.Module, shape: Sequence[int], blocks: dict[str, int], owner: str, key: str = _KEY
) -> list[Tap]:
    """Run the network once to see which tokens blocks give."""
    given: dict[str, Any] = {}

    def note(path: str) -> Any:
        return lambda module, args, output: given.__setitem__(path, output)

    handles = [network.get_submodule(path).register_forward_hook(note(path)) for path in blocks]
    device = next(network.parameters()).device
    try:
        with quietly(network, device):
            network(torch.rand(*shape, device=device))
    finally:
        for handle in handles:
            handle.remove()
    multiple = int(getattr(network, "factor", 1))
    size = [-(-n // multiple) * multiple for n in shape[2:]]
    taps = []
    for path, prefix in blocks.items():
        tokens, width = given[path], token_width(network.get_submodule(path))
        first = isinstance(tokens, Tensor) and tokens.ndim > 3 and tokens.shape[-1] != width
        grid = _grid(tokens.movedim(1, -1) if first else tokens, prefix, size)
        if grid is None:
            found = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise MedsegError(
                f"{key}: '{path}' of {owner} gives {found} for images of {tuple(size)}, which is "
                "no grid of patches."
            )
        patch = tuple(n // m for n, m in zip(size, grid, strict=True))
        taps.append(Tap(path, tokens.shape[1 if first else -1], patch, prefix, first))
    return taps


def _grid(tokens: Any, prefix: int, size: Sequence[int]) -> tuple[int, ...] | None:
    """Return how many patches tokens stand for along each axis; None if they are no such grid."""
    if not isinstance(tokens, Tensor):
        return None
    grid = tuple(tokens.shape[1:-1])
    if len(grid) == 1:
        # Patches are squares, so their side is a root of the pixels that each has.
        patches = grid[0] - prefix
        if patches < 1:
            return None
        side = (math.prod(size) / patches) ** (1 / len(size))
        grid = tuple(max(1, round(n / side)) for n in size)
        if math.prod(grid) != patches:
            return None
    fits = len(grid) == len(size) and all(n % m == 0 for n, m in zip(size, grid, strict=True))
    return grid if fits else None

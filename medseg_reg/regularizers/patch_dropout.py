"""PatchDropout for dense prediction: a transformer runs on a part of the patches while training."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg_reg.regularizers.attention_weights import check_tokens
from medseg_reg.regularizers.base import Regularizer, check_map, check_rate, register

__all__ = [
    "PatchDropout",
    "complete_tokens",
    "gather_tokens",
    "kept_lines",
    "kept_patches",
    "patch_dropout",
    "patches_with_foreground",
]

_POOLS = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}
_ROUNDING = 1e-9
_SPREAD = 0.02  # of a new mask token, as of position embeddings


def kept_patches(
    batch: int,
    patches: int,
    p: float,
    protected: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Which k = max(1, floor((1 - p) N)) of N patches each sample keeps, in their own order.

    Args:
        batch: samples.
        patches: N.
        p: share to drop, in [0, 1).
        protected: (batch, N), boolean: these are kept first; where they are more than k, a random
            part of them.
        device: of the result.

    Returns:
        Their numbers (batch, k), rising.

    Example:
        >>> kept_patches(2, 36, 0.25).shape
        torch.Size([2, 27])
    """
    count = max(1, math.floor((1.0 - p) * patches + _ROUNDING))
    with torch.no_grad():
        order = torch.rand(batch, patches, device=device)
        if protected is not None:
            order = order + ~protected
        return order.argsort(1)[:, :count].sort(1).values


def gather_tokens(x: Tensor, kept: Tensor) -> Tensor:
    """Returns the tokens (B, k, C) of (B, N, C) that are kept, by their numbers (B, k)."""
    return x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))


def complete_tokens(x: Tensor, kept: Tensor, tokens: int, mask_token: Tensor) -> Tensor:
    """Puts kept tokens (B, k, C) into their places among N, and a mask token (C,) into the others.

    Example:
        >>> import torch
        >>> complete_tokens(torch.ones(1, 1, 1), torch.tensor([[2]]), 3, torch.zeros(1)).flatten()
        tensor([0., 0., 1.])
    """
    full = mask_token.to(x.dtype).expand(x.shape[0], tokens, -1)
    return full.scatter(1, kept[..., None].expand_as(x), x)


def kept_lines(window: int, p: float, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Which rows and which columns of every window are kept, so that a share p of it is dropped.

    Of w rows w sqrt(1 - p) are kept, rounded up or down at random so that this is the mean, and of
    the columns as many, drawn apart; at least one of each. The mean share of the window that is
    dropped is p then, unless p is above 1 - 1 / w^2.

    Args:
        window: w, the side of a window.
        p: share to drop, in [0, 1).
        device: of the result.

    Returns:
        The numbers of rows and of columns, rising.

    Example:
        >>> rows, columns = kept_lines(4, 0.75)
        >>> len(rows), len(columns)
        (2, 2)
    """
    target = max(1.0, window * math.sqrt(1.0 - p))
    lines = []
    for _ in range(2):
        count = min(window, math.floor(target + float(torch.rand(())) * (1.0 - _ROUNDING)))
        lines.append(torch.randperm(window)[: max(1, count)].sort().values.to(device))
    return lines[0], lines[1]


def patches_with_foreground(labels: Tensor, patches: int) -> Tensor:
    """Where a patch has a pixel that is not background.

    Args:
        labels: label maps (B, *spatial), background 0.
        patches: how many there are; they form a grid of the proportions of the image.

    Returns:
        Boolean (B, patches).

    Raises:
        ValueError: no such grid fits the image.

    Example:
        >>> import torch
        >>> labels = torch.zeros(1, 4, 8, dtype=torch.int64)
        >>> labels[0, 0, 7] = 1
        >>> patches_with_foreground(labels, 8).int().tolist()
        [[0, 0, 0, 1, 0, 0, 0, 0]]
    """
    size = labels.shape[1:]
    side = (patches / math.prod(size)) ** (1 / len(size))
    grid = tuple(max(1, round(n * side)) for n in size)
    if math.prod(grid) != patches:
        raise ValueError(
            f"PatchDropout: {patches} patches form no grid on labels of {tuple(size)}; use images "
            "whose sides are multiples of the patch, or protect_foreground=False"
        )
    return _POOLS[len(size)]((labels > 0).float()[:, None], grid).flatten(1) > 0


def patch_dropout(
    x: Tensor,
    p: float = 0.25,
    prefix_tokens: int = 0,
    training: bool = True,
    *,
    kept: Tensor | None = None,
    mask_token: Tensor | None = None,
) -> Tensor:
    """Replaces a share p of the positions of a map by one and the same vector.

    Args:
        x: a map, or tokens, (B, C, *positions).
        p: share of the positions to drop.
        prefix_tokens: positions in front that are always kept.
        training: False returns the very same tensor.
        kept: which to keep, of `kept_patches`, beyond the prefix; drawn by default.
        mask_token: the vector (C,); zeros by default.

    Example:
        >>> import torch
        >>> y = patch_dropout(torch.ones(1, 2, 4, 4), p=0.25)
        >>> float(y.mean()), bool((y[:, 0] == y[:, 1]).all())
        (0.75, True)
    """
    p = check_rate(p, "patch_dropout")
    if not training or p == 0.0:
        return x
    check_map(x, "patch_dropout")
    if x.numel() == 0:
        return x
    patches = math.prod(x.shape[2:]) - prefix_tokens
    if kept is None:
        kept = kept_patches(x.shape[0], patches, p, device=x.device)
    with torch.no_grad():
        keep = torch.zeros(x.shape[0], prefix_tokens + patches, dtype=torch.bool, device=x.device)
        keep.scatter_(1, kept + prefix_tokens, True)
        keep[:, :prefix_tokens] = True
        keep = keep.view(x.shape[0], 1, *x.shape[2:])
    if mask_token is None:
        return x * keep
    fill = mask_token.to(x.dtype).view(1, -1, *[1] * (x.dim() - 2))
    return x * keep + fill * ~keep


@register("patch_dropout")
class PatchDropout(Regularizer):
    """Runs a transformer on a random part of the patches, and puts a mask token for the others.

    Of the N patches of a sample k = max(1, floor((1 - p) N)) go through the blocks, without
    replacement, with their position embeddings, the same ones in all of them. After each block,
    for every reader outside, the map is complete: z_l at the patches that were kept, one learned
    vector e at the others. So the decoder of a segmentation network finds each token in its place,
    and the blocks cost as much as k tokens do.

    In a transformer of windows (Swin) all windows of w x w patches lose the same ones: some rows
    and columns are kept, see `kept_lines`, one choice for the batch. So every window is a smaller
    rectangle, whose patches keep their relative positions and, where windows are shifted, the mask
    between regions. Each resolution has a layer, a choice and a mask token of its own, and the map
    that goes to the next one, and to the decoder, is complete.

    `insert` arranges this. Called alone, the layer replaces positions of a map by e, or by zeros.
    The mask token is trained like a weight, but it is no part of ``state_dict``: a run keeps it
    with what its layers remember, and evaluation never reads it.

    With k of N kept, all s patches of a small target are dropped in about p^s of the passes, and
    then no token supports their label: see ``protect_foreground``, or use p of 0.25 at most.

    Args:
        p: share of the patches to drop, in [0, 1).
        vary: draw the share anew in each pass, for the whole batch, evenly from 0 to 2 p (from
            2 p - 1 to 1 where p is above 0.5); the published regularizer has p = 0.25.
        protect_foreground: keep patches with labelled pixels first. It needs the labels of the
            batch, which the training loop gives; passes without gradient, as in MC dropout, do
            without. Not in windows, which share their pattern.
        prefix_tokens: how many tokens in front are no patches, as a class token; they are always
            kept. `insert` sets what the network has.

    Attributes:
        labels: the label maps (B, *spatial) of the batch that comes next; set from outside.
        mask_token: the vector (C,) in place of a dropped patch; made by `prepare`.
        kept: which tokens of each sample go through the blocks in this pass; None for all.
        tokens: how many there are, N and the prefix.
        window: the side w of a window; 0 for one sequence. `insert` sets what the network has.
        rows: which rows of a window are kept in this pass, `columns` which columns; None for all.

    Shapes:
        (B, C, *positions) with one to three axes; the output is alike.

    Raises:
        ValueError: a bad parameter, an input of another shape or kind, or, with
            ``protect_foreground``, a batch without labels or with other proportions.

    Paper:
        Y. Liu, C. Matsoukas, F. Strand, H. Azizpour, K. Smith, "PatchDropout: Economizing Vision
        Transformers Using Patch Dropout", WACV 2023, arXiv 2208.07220, for classification, where
        dropped patches are gone. Mask tokens for the decoder are those of K. He et al., "Masked
        Autoencoders Are Scalable Vision Learners", CVPR 2022. The published code varies the rate in
        steps of 0.05, in half of the batches. In windows it draws a pattern for each sample, keeps
        floor((1 - p) w) of the rows and of the columns, so that more than p is dropped, and goes on
        with the smaller grid to the end, where patches that were no neighbours are merged.

    Example:
        >>> import torch
        >>> y = PatchDropout(p=0.5)(torch.ones(1, 2, 4, 4))
        >>> float(y.mean())
        0.5
    """

    default_places = ("tokens",)
    place_kinds = ("tokens",)
    unit = "patch"
    paper = "Liu et al., WACV 2023"
    needs = "a transformer of one sequence of tokens; labels with protect_foreground"

    def __init__(
        self,
        p: float = 0.25,
        vary: bool = False,
        protect_foreground: bool = False,
        prefix_tokens: int = 0,
    ) -> None:
        super().__init__(p)
        self.vary, self.protect_foreground = bool(vary), bool(protect_foreground)
        self.prefix_tokens = check_tokens(prefix_tokens, type(self).__name__)
        self.labels: Tensor | None = None
        self.kept: Tensor | None = None
        self.tokens = self.window = 0
        self.rows: Tensor | None = None
        self.columns: Tensor | None = None
        self.mask_token: nn.Parameter | None = None

    def prepare(self, channels: int, device: torch.device | None = None) -> None:
        """Makes the mask token for tokens of so many channels; always the same one."""
        generator = torch.Generator().manual_seed(0)
        token = _SPREAD * torch.randn(channels, generator=generator)
        self.mask_token = nn.Parameter(token.to(device))

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer, and forgets which patches the last pass kept."""
        self.kept = self.rows = self.columns = None
        return super().forward(x)

    def regularize(self, x: Tensor) -> Tensor:
        """Draws the patches to keep, and puts the mask token for the others."""
        if self.window:
            self.rows, self.columns = kept_lines(self.window, self._rate(), x.device)
            return self.masked(x)
        self.tokens = math.prod(x.shape[2:])
        patches = self.tokens - self.prefix_tokens
        kept = kept_patches(
            x.shape[0], patches, self._rate(), self._protected(x, patches), x.device
        )
        prefix = torch.arange(self.prefix_tokens, device=x.device).expand(x.shape[0], -1)
        self.kept = torch.cat([prefix, kept + self.prefix_tokens], 1)
        return patch_dropout(x, self.p, self.prefix_tokens, kept=kept, mask_token=self.mask_token)

    def completed(self, x: Tensor) -> Tensor:
        """Puts kept tokens (B, k, C) into a sequence (B, N, C) of mask tokens."""
        if self.kept is None or self.mask_token is None:
            return x
        return complete_tokens(x, self.kept, self.tokens, self.mask_token)

    def gathered(self, x: Tensor) -> Tensor:
        """Returns the kept ones of all tokens (B, N, C)."""
        if self.kept is None:
            return x
        return gather_tokens(x, self.kept)

    def masked(self, x: Tensor) -> Tensor:
        """Puts the mask token at the rows and columns of a map (B, C, H, W) that are left out."""
        if self.rows is None or self.columns is None or self.mask_token is None:
            return x
        keep = torch.zeros(self.window, self.window, dtype=torch.bool, device=x.device)
        keep[self.rows[:, None], self.columns] = True
        keep = keep.repeat(x.shape[2] // self.window, x.shape[3] // self.window)
        return torch.where(keep, x, self.mask_token.to(x.dtype)[:, None, None])

    def in_window(self, shift: tuple[int, int]) -> Tensor | None:
        """Which of the w^2 patches of a window that is shifted are kept, row after row."""
        if self.rows is None or self.columns is None:
            return None
        rows, columns = (
            ((lines - by) % self.window).sort().values
            for lines, by in zip((self.rows, self.columns), shift, strict=True)
        )
        return (rows[:, None] * self.window + columns).flatten()

    def measured_rate(self, x: Tensor, y: Tensor) -> float:
        """The share of patches that were replaced."""
        changed = (x != y).any(1).flatten(1)[:, self.prefix_tokens :]
        return float(changed.float().mean()) if changed.numel() else 0.0

    def memory(self) -> dict[str, Tensor]:
        """The mask token, once there is one."""
        return {} if self.mask_token is None else {"mask_token": self.mask_token.detach()}

    def load_memory(self, memory: Mapping[str, Tensor]) -> None:
        """Restores the mask token.

        Raises:
            ValueError: the memory is not one of this layer.
        """
        own = self.memory()
        if memory.keys() != own.keys() or any(memory[k].shape != own[k].shape for k in own):
            found = {name: tuple(value.shape) for name, value in memory.items()}
            expected = {name: tuple(value.shape) for name, value in own.items()}
            raise ValueError(f"PatchDropout: expected {expected or 'nothing'}, got {found}")
        if self.mask_token is not None:
            with torch.no_grad():
                self.mask_token.copy_(memory["mask_token"])

    def _rate(self) -> float:
        if not self.vary:
            return self.p
        low, high = max(0.0, 2 * self.p - 1), min(1.0, 2 * self.p)
        return low + (high - low) * float(torch.rand(()))

    def _protected(self, x: Tensor, patches: int) -> Tensor | None:
        unlabelled = self.labels is None and not torch.is_grad_enabled()
        if not self.protect_foreground or unlabelled:
            return None
        if self.labels is None or len(self.labels) != len(x):
            found = "none" if self.labels is None else f"{len(self.labels)}"
            raise ValueError(
                f"PatchDropout: protect_foreground needs the labels of the {len(x)} samples of the "
                f"batch, got {found}; medseg_reg.train gives them, another loop sets layer.labels"
            )
        return patches_with_foreground(self.labels, patches).to(x.device)

    def _save_to_state_dict(
        self, destination: dict[str, object], prefix: str, keep_vars: bool
    ) -> None:
        """Leaves the mask token out: a network has the same keys with and without its layers."""

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        """Misses nothing."""

"""Cross-entropy, Dice and SSIM, mixed by weights, for one-channel and multi-class networks.

    loss = MixedLoss(ce=1.0, dice=1.0, ssim=1.0)
    loss(network(images), labels).backward()

Raw logits and integer labels go in; activation, one-hot encoding, float32 and small images
are handled here, because each of them has silently spoiled published results elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from monai.losses.dice import DiceLoss
from monai.losses.ssim_loss import SSIMLoss
from torch import Tensor, nn
from torch.nn import functional as F

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5


def check_labels(target: Tensor, n_labels: int) -> None:
    """Raise when a label map holds anything but 0 .. n_labels - 1.

    Reads two numbers back from the device, so on a GPU it waits for the queue to drain:
    call it once per data set, or to explain a NaN loss, not at each step.

    Args:
        target: label map of any shape, an integer or boolean type.
        n_labels: number of classes with the background (2 for a network with one channel).

    Raises:
        ValueError: `target` is not an integer type, or a label is out of range.

    Example:
        >>> check_labels(torch.tensor([[0, 1], [2, 255]]), 3)
        Traceback (most recent call last):
        ...
        ValueError: labels span 0..255, expected 0..2: remap or mask the others before the loss
    """
    if target.is_floating_point() or target.is_complex():
        raise ValueError(f"labels are {target.dtype}, expected integers such as uint8 or int64")
    if target.numel() == 0:
        return
    low, high = (int(bound) for bound in target.long().aminmax())
    if low < 0 or high >= n_labels:
        raise ValueError(
            f"labels span {low}..{high}, expected 0..{n_labels - 1}: "
            "remap or mask the others before the loss"
        )


def ssim_window(spatial: Sequence[int]) -> tuple[int, ...]:
    """Return the SSIM window: 11 per axis, or the largest odd size that fits a shorter axis.

    Args:
        spatial: image size in pixels, one number per axis.

    Example:
        >>> ssim_window((512, 10)), ssim_window((1, 2, 3))
        ((11, 9), (1, 1, 3))
    """
    return tuple(min(SSIM_WINDOW, size - 1 + size % 2) for size in spatial)


class MixedLoss(nn.Module):
    r"""Weighted sum of cross-entropy, soft Dice and SSIM on raw logits.

    With :math:`p` the softmax (for one channel, the sigmoid) of the logits, :math:`t` the
    one-hot target and :math:`n` running over all pixels of all samples of the batch:

    .. math::
        L = w_{ce} L_{ce} + w_{dice} L_{dice} + w_{ssim} L_{ssim}

        L_{ce} = - \sum_{n,c} \omega_c \, q_{nc} \log p_{nc} \Big/ \sum_n \omega_{t_n},
        \quad q = (1 - s) \, t + s / K

        L_{dice} = \frac{1}{C} \sum_c \Big( 1 - \frac{2 \sum_n p_{nc} t_{nc} + 10^{-5}}
        {\sum_n p_{nc} + \sum_n t_{nc} + 10^{-5}} \Big)

        L_{ssim} = 1 - \operatorname{mean} \frac{(2 \mu_p \mu_t + c_1)(2 \sigma_{pt} + c_2)}
        {(\mu_p^2 + \mu_t^2 + c_1)(\sigma_p^2 + \sigma_t^2 + c_2)}

    **Cross-entropy** (torch). A one-channel network is the two-class network with logits
    (0, x): that is binary cross-entropy, and smoothing by s turns targets 0 and 1 into s/2
    and 1 - s/2. (MONAI's `DiceCELoss.ce` is the constant 0 there.) If the class weights of all
    pixels of a batch are zero, the term is 0 and not 0/0.

    **Dice** (MONAI) is pooled: sums run over the batch as well, one ratio per class, the mean
    over classes. Slices are pieces of volumes and most hold no foreground; a ratio per slice
    would be the constant 1 on them, almost without gradient. So the value depends on what
    shares a batch: compare runs at equal batch size, and note that data-parallel processes
    pool their own share only. A class absent from the whole batch adds nearly 1.

    **SSIM** (MONAI) compares each class's probability map with its one-hot mask: Gaussian
    window, 11 pixels per axis, sigma 1.5, c1 = 0.01^2, c2 = 0.03^2 (data range 1), the mean
    over windows that lie fully inside the image. An axis under 11 pixels gets the largest odd
    window that fits; at 1 x 1 only the luminance ratio (2pt + c1) / (p^2 + t^2 + c1) is left.
    SSIM hardly pulls where mask and map are both flat: mix it with cross-entropy or Dice.

    Everything runs in float32, inside autocast too, where SSIM in bfloat16 and sums in float16
    go wrong. A NaN or an infinity anywhere in the logits makes every term NaN (a sigmoid
    would turn infinity into a confident 1), so one test of the loss catches it.

    Sources: F. Milletari et al., "V-Net", 3DV 2016, doi:10.1109/3DV.2016.79 (Dice; squared
    sums in its denominator, plain ones here, as in MONAI). Z. Wang et al., "Image quality
    assessment: from error visibility to structural similarity", IEEE TIP 2004,
    doi:10.1109/TIP.2003.819861 (SSIM; same window and constants).

    Args:
        ce: weight of the cross-entropy.
        dice: weight of the Dice term.
        ssim: weight of the SSIM term.
        class_weights: factor per class in the cross-entropy, K values; for one channel
            [background, foreground].
        label_smoothing: s in the cross-entropy, 0 <= s < 1.
        include_background: whether channel 0 counts in Dice and SSIM. Cross-entropy always
            uses all classes; a one-channel network has no background channel.

    Shapes:
        logits (B, K, H, W) or (B, K, D, H, W), floating; target (B, H, W) or (B, D, H, W),
        an integer type, labels 0 .. K - 1 (0 and 1 for K = 1). The loss is a float32 scalar.

    Raises:
        ValueError: on construction, for weights that are negative, not finite or all zero; in
            the forward pass, for shapes that do not match, float labels, a wrong number of
            class weights, or labels out of range. Labels are checked at each step on the CPU;
            on a GPU the check would make the host wait, so there labels out of range make the
            loss NaN and `check_labels` tells why.

    Example:
        >>> loss = MixedLoss(ce=1.0, dice=0.5)
        >>> logits, target = torch.zeros(1, 2, 8, 8), torch.ones(1, 8, 8, dtype=torch.uint8)
        >>> {name: round(term.item(), 4) for name, term in loss.components(logits, target).items()}
        {'ce': 0.6931, 'dice': 0.3333}
        >>> round(loss(logits, target).item(), 4)
        0.8598
    """

    class_weights: Tensor | None

    def __init__(
        self,
        ce: float = 1.0,
        dice: float = 0.0,
        ssim: float = 0.0,
        *,
        class_weights: Sequence[float] | Tensor | None = None,
        label_smoothing: float = 0.0,
        include_background: bool = False,
    ) -> None:
        """Store the weights; see the class for their meaning."""
        super().__init__()
        weights = {"ce": float(ce), "dice": float(dice), "ssim": float(ssim)}
        _check_weights(list(weights.values()), f"loss weights {weights}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing is {label_smoothing}, expected 0 <= s < 1")
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}
        self.label_smoothing = float(label_smoothing)
        self.include_background = include_background
        if class_weights is not None:
            class_weights = torch.as_tensor(class_weights, dtype=torch.float32).detach().clone()
            if class_weights.ndim != 1:
                raise ValueError(
                    f"class_weights have shape {tuple(class_weights.shape)}, "
                    "expected one value per class"
                )
            values = class_weights.tolist()
            _check_weights(values, f"class_weights {values}")
        # Not persistent: a checkpoint keeps the same keys whatever the loss.
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the weighted sum of the terms, a float32 scalar; see the class."""
        return self.combine(self.components(logits, target))

    def combine(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of what `components` gave: logs every term at no extra cost.

        Args:
            terms: unweighted scalars by name, as from `components`.

        Example:
            >>> loss = MixedLoss(ce=1.0, dice=2.0)
            >>> loss.combine({"ce": torch.tensor(0.5), "dice": torch.tensor(0.25)}).item()
            1.0
        """
        weighted = [weight * terms[name] for name, weight in self.weights.items()]
        return torch.stack(weighted).sum()

    def components(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return each unweighted term whose weight is positive, by name: ce, dice, ssim.

        Args:
            logits: raw network output, (B, K, *spatial).
            target: integer labels, (B, *spatial).

        Raises:
            ValueError: as the class says.

        Example:
            >>> logits, target = torch.zeros(1, 1, 4, 4), torch.ones(1, 4, 4).long()
            >>> list(MixedLoss(dice=1.0).components(logits, target))
            ['ce', 'dice']
        """
        _check_shapes(logits, target)
        channels = logits.shape[1]
        n_labels = max(2, channels)
        if target.device.type == "cpu" or target.is_floating_point():
            check_labels(target, n_labels)
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float()
            labels = target.long()
            spoiled = _zero_or_nan(logits, labels, n_labels)
            # On a GPU a label out of range would end the process in a device assertion.
            labels = labels.clamp(0, n_labels - 1)
            terms: dict[str, Tensor] = {}
            if "ce" in self.weights:
                terms["ce"] = self._cross_entropy(logits, labels)
            if "dice" in self.weights or "ssim" in self.weights:
                maps, masks = self._region_maps(logits, labels)
                if "dice" in self.weights:
                    # Channel 0 is dropped already: MONAI warns if asked to, with one channel.
                    terms["dice"] = DiceLoss(include_background=True, batch=True)(maps, masks)
                if "ssim" in self.weights:
                    terms["ssim"] = _ssim(maps, masks)
            return {name: term + spoiled for name, term in terms.items()}

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        if logits.shape[1] == 1:
            # Softmax over (0, x) is the sigmoid of x: one code path for weights and smoothing.
            logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
        weights = self.class_weights
        if weights is not None and len(weights) != logits.shape[1]:
            raise ValueError(
                f"class_weights hold {len(weights)} values, expected {logits.shape[1]}: one per "
                "class (for one channel: [background, foreground])"
            )
        # reduction="none": torch's own 2-D mean is refused by deterministic mode on CUDA, and
        # is 0/0 when the weights of all labels of a batch are zero.
        losses = F.cross_entropy(
            logits, labels, weights, reduction="none", label_smoothing=self.label_smoothing
        )
        if weights is None:
            return losses.mean()
        total, summed = weights[labels].sum(), losses.sum()
        # With label smoothing the losses are not 0 where the weights of all labels are.
        mean = summed / total.clamp_min(torch.finfo(torch.float32).tiny)
        return torch.where(total > 0, mean, summed * 0)

    def _region_maps(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return probabilities and one-hot masks, (B, C, *spatial), of the channels that count."""
        channels = logits.shape[1]
        if channels == 1:
            return torch.sigmoid(logits), labels.unsqueeze(1).float()
        first = 0 if self.include_background else 1
        classes = torch.arange(first, channels, device=labels.device)
        classes = classes.view(1, -1, *[1] * (labels.ndim - 1))
        return torch.softmax(logits, dim=1)[:, first:], (labels.unsqueeze(1) == classes).float()

    def extra_repr(self) -> str:
        """Show the weights and options in `print(model)`."""
        shown = [f"{name}={weight:g}" for name, weight in self.weights.items()]
        if self.class_weights is not None:
            shown.append(f"class_weights={[round(w, 6) for w in self.class_weights.tolist()]}")
        if self.label_smoothing:
            shown.append(f"label_smoothing={self.label_smoothing:g}")
        return ", ".join([*shown, f"include_background={self.include_background}"])


def _check_weights(values: Sequence[float], name: str) -> None:
    if any(not math.isfinite(value) or value < 0 for value in values) or not any(values):
        raise ValueError(f"{name}: expected finite values >= 0, at least one of them > 0")


def _check_shapes(logits: Tensor, target: Tensor) -> None:
    if not logits.is_floating_point() or logits.ndim not in (4, 5) or logits.numel() == 0:
        raise ValueError(
            f"logits are {logits.dtype} of shape {tuple(logits.shape)}, "
            "expected floats of shape (B, K, H, W) or (B, K, D, H, W), none of them 0"
        )
    expected = (logits.shape[0], *logits.shape[2:])
    if tuple(target.shape) != expected:
        raise ValueError(
            f"target has shape {tuple(target.shape)}, expected {expected} for logits of shape "
            f"{tuple(logits.shape)}: labels carry no channel axis"
        )


def _zero_or_nan(logits: Tensor, labels: Tensor, n_labels: int) -> Tensor:
    """Return 0, or NaN if a logit is not finite or a label is out of range, without a sync."""
    zero = (logits.detach() * 0).sum()
    valid = ((labels >= 0) & (labels < n_labels)).all()
    return zero.masked_fill(~valid, math.nan)


def _ssim(maps: Tensor, masks: Tensor) -> Tensor:
    spatial = maps.shape[2:]
    # SSIM treats channels alike and takes their mean, so samples may pose as channels. That
    # keeps the convolutions depthwise, which CUDA runs in true float32, and is faster on the
    # CPU. A lone channel or a channels_last map would go to cuDNN and its default TF32, whose
    # rounding of the second moments is of the size of c2.
    maps, masks = (x.contiguous().reshape(1, -1, *spatial) for x in (maps, masks))
    if maps.shape[1] == 1 and maps.is_cuda:
        maps, masks = (torch.cat([x, x], dim=1) for x in (maps, masks))
    loss = SSIMLoss(
        len(spatial), data_range=1.0, win_size=ssim_window(spatial), kernel_sigma=SSIM_SIGMA
    )
    # MONAI builds its window on the default device: a copy, and a sync, at each step otherwise.
    with maps.device:
        value: Tensor = loss(maps, masks)
    return value

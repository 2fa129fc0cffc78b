"""The losses mixed by weights, on raw logits and integer labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from medseg_reg.losses.boundary import boundary_loss, signed_distance
from medseg_reg.losses.cross_entropy import cross_entropy
from medseg_reg.losses.focal import focal_loss
from medseg_reg.losses.labels import (
    check_coarse,
    check_labels,
    check_shapes,
    one_hot,
    resized,
    two_classes,
    zero_or_nan,
)
from medseg_reg.losses.overlap import dice_loss, iou_loss, tversky_loss
from medseg_reg.losses.similarity import ms_ssim_loss, ssim_loss
from medseg_reg.losses.weights import (
    Supervision,
    check_count,
    check_supervision,
    check_weights,
    supervision_shares,
    weights_of,
)

REGION_TERMS = ("dice", "iou", "tversky", "ssim", "ms_ssim", "boundary")


class _Truth(NamedTuple):
    """What is made of the labels once, for all outputs of a network."""

    labels: Tensor
    """int64 (B, *spatial), 0 where a pixel does not count."""
    counted: Tensor | None
    """bool (B, 1, *spatial), where pixels count; None for everywhere."""
    masks: Tensor | None
    """One-hot, (B, C, *spatial), of the classes of the region terms."""
    distances: Tensor | None
    """Signed distances to the outlines of the masks."""


class MixedLoss(nn.Module):
    r"""Weighted sum of losses on raw logits, each in float32.

    .. math:: L = \sum_i w_i L_i

    over the terms whose weight is positive. Pixel terms are means over pixels, by the weights of
    their labels: `ce` (`cross_entropy`), `focal` (`focal_loss`). Region terms compare the
    probabilities of each class with its mask and are means over classes, by `region_weights`:
    `dice`, `iou`, `tversky` (`dice_loss`, `iou_loss`, `tversky_loss`, sums over the batch),
    `ssim`, `ms_ssim` (`ssim_loss`, `ms_ssim_loss`) and `boundary` (`boundary_loss`). The
    functions in brackets say formula, paper and limits of each.

    **One channel.** A one-channel network is the two-class network with logits (0, x): softmax
    becomes the sigmoid, `ce` binary cross-entropy, and smoothing by s turns targets 0 and 1 into
    s/2 and 1 - s/2. (MONAI's `DiceCELoss.ce` is the constant 0 there.)

    **Batches.** `dice`, `iou` and `tversky` are ratios of sums over the batch. So their value
    depends on what shares a batch: compare runs at equal batch size, and note that data-parallel
    processes pool their own share only.

    **Ignored pixels.** A pixel with the label `ignore` counts in no term and gets no gradient, so
    that the value of `ce`, `focal`, `dice`, `iou` and `tversky` is that of the image without it.
    For `ssim` and `ms_ssim` windows that hold such a pixel are left out: few scattered pixels can
    silence them. For `boundary` it is neither inside nor outside. If no pixel of a batch counts,
    no term has a gradient. If `ignore` is one of the classes, that class has no region terms.

    **Deep supervision.** A list of logits, the finest first, gives the mean of their losses by
    `supervision`. Coarser logits are interpolated linearly to the size of the labels, as in
    UNet 3+. The labels are never made smaller: that loses thin structures, and an ignored pixel
    would have to spread or vanish.

    Everything runs in float32, inside autocast too, where SSIM in bfloat16 and sums in float16
    go wrong. A NaN or an infinity anywhere in the logits makes every term NaN (a sigmoid
    would turn infinity into a confident 1), so one test of the loss catches it.

    UNet 3+'s loss (H. Huang et al., ICASSP 2020, doi:10.1109/ICASSP40776.2020.9053405) is
    `MixedLoss(ce=0, focal=1, ms_ssim=1, iou=1)` with equal weights of the outputs.

    Args:
        ce: weight of the cross-entropy.
        dice: weight of the Dice term.
        ssim: weight of the SSIM term.
        focal: weight of the focal term.
        iou: weight of the IoU term.
        tversky: weight of the Tversky term.
        ms_ssim: weight of the multi-scale SSIM term.
        boundary: weight of the boundary term; constant, where its paper raises it.
        class_weights: factor per class in the pixel terms, K values; for one channel
            [background, foreground].
        region_weights: factor per class in the means of the region terms, likewise.
        label_smoothing: s in the cross-entropy, 0 <= s < 1.
        focal_gamma: gamma of the focal term.
        tversky_alpha: weight of false positives in the Tversky term.
        tversky_beta: weight of false negatives in the Tversky term.
        tversky_gamma: gamma of the focal Tversky loss; 1 is the plain one.
        include_background: whether channel 0 counts in the region terms. Pixel terms always use
            all classes; a one-channel network has no background channel.
        ignore: a label, such as 255, whose pixels count in no term.
        supervision: weights of the outputs: "equal" (UNet 3+), "halving" (1, 1/2, 1/4, ... as in
            nnU-Net), or one weight for each. They are divided by their sum.

    Shapes:
        logits (B, K, H, W) or (B, K, D, H, W), floating, or a list of them; target (B, H, W) or
        (B, D, H, W), an integer type, labels 0 .. K - 1 (0 and 1 for K = 1) and `ignore`. The
        loss is a float32 scalar.

    Raises:
        ValueError: on construction, for weights that are negative, not finite or all zero, or
            parameters out of range; in the forward pass, for shapes that do not match, float
            labels, a wrong number of weights, or labels out of range. Labels are checked at each
            step on the CPU; on a GPU the check would make the host wait, so there labels out of
            range make the loss NaN and `check_labels` tells why.

    Example:
        >>> loss = MixedLoss(ce=1.0, dice=0.5)
        >>> logits, target = torch.zeros(1, 2, 8, 8), torch.ones(1, 8, 8, dtype=torch.uint8)
        >>> {name: round(term.item(), 4) for name, term in loss.components(logits, target).items()}
        {'ce': 0.6931, 'dice': 0.3333}
        >>> round(loss(logits, target).item(), 4)
        0.8598
    """

    class_weights: Tensor | None
    region_weights: Tensor | None

    def __init__(
        self,
        ce: float = 1.0,
        dice: float = 0.0,
        ssim: float = 0.0,
        *,
        focal: float = 0.0,
        iou: float = 0.0,
        tversky: float = 0.0,
        ms_ssim: float = 0.0,
        boundary: float = 0.0,
        class_weights: Sequence[float] | Tensor | None = None,
        region_weights: Sequence[float] | Tensor | None = None,
        label_smoothing: float = 0.0,
        focal_gamma: float = 2.0,
        tversky_alpha: float = 0.3,
        tversky_beta: float = 0.7,
        tversky_gamma: float = 1.0,
        include_background: bool = False,
        ignore: int | None = None,
        supervision: Supervision | Sequence[float] = "equal",
    ) -> None:
        """Store the weights; see the class for their meaning."""
        super().__init__()
        weights = dict(ce=ce, dice=dice, ssim=ssim, focal=focal, iou=iou, tversky=tversky)
        weights.update(ms_ssim=ms_ssim, boundary=boundary)
        check_weights(list(weights.values()), f"loss weights {weights}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing is {label_smoothing}, expected 0 <= s < 1")
        check_weights([focal_gamma, 1.0], f"focal_gamma is {focal_gamma}")
        check_weights(
            [tversky_alpha, tversky_beta],
            f"tversky_alpha is {tversky_alpha} and tversky_beta {tversky_beta}",
        )
        if not 0 < tversky_gamma < math.inf:
            raise ValueError(f"tversky_gamma is {tversky_gamma}, expected a finite value > 0")
        self.weights = {name: float(weight) for name, weight in weights.items() if weight > 0}
        self.label_smoothing = float(label_smoothing)
        self.focal_gamma = float(focal_gamma)
        self.tversky = (float(tversky_alpha), float(tversky_beta), float(tversky_gamma))
        self.include_background, self.ignore = include_background, ignore
        self.supervision = check_supervision(supervision)
        # Not persistent: a checkpoint keeps the same keys whatever the loss.
        for name, values in (("class_weights", class_weights), ("region_weights", region_weights)):
            self.register_buffer(name, weights_of(values, name), persistent=False)
        if self.region_weights is not None:
            counted = [w for c, w in enumerate(self.region_weights.tolist()) if self._is_region(c)]
            check_weights(counted, f"region_weights {counted} of the classes that count")

    def forward(self, logits: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
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

    def components(self, logits: Tensor | Sequence[Tensor], target: Tensor) -> dict[str, Tensor]:
        """Return each unweighted term whose weight is positive, by name.

        Args:
            logits: raw network output, (B, K, *spatial), or a list of them, the finest first.
            target: integer labels, (B, *spatial).

        Raises:
            ValueError: as the class says.

        Example:
            >>> logits, target = torch.zeros(1, 1, 4, 4), torch.ones(1, 4, 4).long()
            >>> list(MixedLoss(dice=1.0).components(logits, target))
            ['ce', 'dice']
        """
        outputs = [logits] if isinstance(logits, Tensor) else list(logits)
        shares = supervision_shares(self.supervision, len(outputs))
        check_shapes(outputs[0], target)
        for output in outputs[1:]:
            check_coarse(output, outputs[0])
        channels = outputs[0].shape[1]
        if target.device.type == "cpu" or target.is_floating_point():
            check_labels(target, max(2, channels), self.ignore)
        with torch.autocast(outputs[0].device.type, enabled=False):
            truth = self._truth(target, channels)
            total: dict[str, Tensor] = {}
            for output, share in zip(outputs, shares, strict=True):
                spoiled = zero_or_nan(output, target.long(), max(2, channels), self.ignore)
                terms = self._terms(resized(output.float(), target.shape[1:]), truth)
                for name, term in terms.items():
                    total[name] = total.get(name, 0) + share * (term + spoiled)
        return total

    def _truth(self, target: Tensor, channels: int) -> _Truth:
        """Prepare the labels, without a sync unless there is a boundary term."""
        labels, counted = target.long(), None
        if self.ignore is not None:
            counted = (labels != self.ignore).unsqueeze(1)
            labels = labels.masked_fill(~counted.squeeze(1), 0)
        # On a GPU a label out of range would end the process in a device assertion.
        labels = labels.clamp(0, max(2, channels) - 1)
        masks = distances = None
        if self.weights.keys() & set(REGION_TERMS):
            first, stop = (1, 2) if channels == 1 else (0, channels)
            masks = self._region_channels(one_hot(labels, first, stop, counted))
            if "boundary" in self.weights:
                distances = signed_distance(masks, counted)
        return _Truth(labels, counted, masks, distances)

    def _terms(self, logits: Tensor, truth: _Truth) -> dict[str, Tensor]:
        """Return the terms of one output, (B, K, *spatial) float32."""
        terms = self._pixel_terms(logits, truth)
        if truth.masks is None:
            return terms
        maps = torch.sigmoid(logits) if logits.shape[1] == 1 else torch.softmax(logits, dim=1)
        weights = self._region_weights(logits.shape[1])
        maps, counted = self._region_channels(maps), truth.counted
        if counted is not None:
            maps = torch.where(counted, maps, torch.zeros_like(maps))
        for name in self.weights:
            if name == "dice":
                losses = dice_loss(maps, truth.masks)
            elif name == "iou":
                losses = iou_loss(maps, truth.masks)
            elif name == "tversky":
                losses = tversky_loss(maps, truth.masks, *self.tversky)
            elif name == "ssim":
                losses = ssim_loss(maps, truth.masks, counted)
            elif name == "ms_ssim":
                losses = ms_ssim_loss(maps, truth.masks, counted)
            elif name == "boundary" and truth.distances is not None:
                losses = boundary_loss(maps, truth.distances, counted)
            else:
                continue
            terms[name] = (
                losses.mean() if weights is None else (losses * weights).sum() / weights.sum()
            )
        return {name: terms[name] for name in self.weights}

    def _pixel_terms(self, logits: Tensor, truth: _Truth) -> dict[str, Tensor]:
        logits = two_classes(logits)
        weights = self.class_weights
        check_count(weights, "class_weights", logits.shape[1])
        counted = None if truth.counted is None else truth.counted.squeeze(1)
        terms = {}
        if "ce" in self.weights:
            terms["ce"] = cross_entropy(
                logits, truth.labels, counted, weights, self.label_smoothing
            )
        if "focal" in self.weights:
            terms["focal"] = focal_loss(logits, truth.labels, counted, weights, self.focal_gamma)
        return terms

    def _is_region(self, label: int) -> bool:
        return label != self.ignore and (label > 0 or self.include_background)

    def _region_channels(self, maps: Tensor) -> Tensor:
        """Return the channels of the classes that count in the region terms."""
        if maps.shape[1] == 1:
            if self.ignore == 1:
                raise ValueError("ignore is 1, the one foreground class: no region is left")
            return maps
        kept = [label for label in range(maps.shape[1]) if self._is_region(label)]
        if not kept:
            raise ValueError(f"ignore is {self.ignore}, the one class that counts in regions")
        if kept[-1] - kept[0] + 1 == len(kept):
            return maps[:, kept[0] : kept[-1] + 1]
        # Indexing by a list would copy it to the device.
        return torch.cat([maps[:, label : label + 1] for label in kept], dim=1)

    def _region_weights(self, channels: int) -> Tensor | None:
        weights = self.region_weights
        check_count(weights, "region_weights", max(2, channels))
        if weights is None:
            return None
        if channels == 1:
            return weights[1:]
        return self._region_channels(weights.unsqueeze(0)).squeeze(0)

    def extra_repr(self) -> str:
        """Show the weights and options in `print(model)`."""
        shown = [f"{name}={weight:g}" for name, weight in self.weights.items()]
        for name, weights in (("class", self.class_weights), ("region", self.region_weights)):
            if weights is not None:
                shown.append(f"{name}_weights={[round(w, 6) for w in weights.tolist()]}")
        if self.label_smoothing:
            shown.append(f"label_smoothing={self.label_smoothing:g}")
        if "focal" in self.weights:
            shown.append(f"focal_gamma={self.focal_gamma:g}")
        if "tversky" in self.weights:
            names = ("alpha", "beta", "gamma")
            shown += [f"tversky_{n}={v:g}" for n, v in zip(names, self.tversky, strict=True)]
        if self.ignore is not None:
            shown.append(f"ignore={self.ignore}")
        return ", ".join(
            [
                *shown,
                f"include_background={self.include_background}",
                f"supervision={self.supervision!r}",
            ]
        )

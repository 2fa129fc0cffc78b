"""NSDropout: for each class, drop the channels that respond more in training than in validation.

`class_sums` are the statistics, `class_masks` the choice, `nsdropout` the rule without memory,
`NSDropout` the module. It needs labels in every training step and activations of the validation
set; the module says how it gets them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from medseg_reg.regularizers.base import (
    Regularizer,
    check_choice,
    check_count,
    check_map,
    check_rate,
    register,
)
from medseg_reg.regularizers.kernels.elements import drop_elements

__all__ = ["NSDropout", "class_masks", "class_sums", "nsdropout"]

_EVAL_MODES = ("none", "mean_mask", "true_label")
_MEMORY = ("validation_means", "masks", "validation_sums")


def class_sums(x: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Sums of a map over the examples of each class, and in the last column their number.

    Args:
        x: feature map.
        labels: class of every pixel, or of every sample: then an example is a sample and its
            value the mean over its pixels. A label outside 0..classes-1 belongs to no class.
        classes: number of classes.

    Shapes:
        x (B, C, *spatial) with one to three spatial axes; labels (B,) or (B, *size) of any size,
            brought to that of the map by nearest neighbour; the result (classes, C + 1), float32.

    Raises:
        ValueError: labels of another shape or of floating-point kind, or a bad input.

    Example:
        >>> import torch
        >>> class_sums(torch.tensor([[[1.0, 2.0, 4.0]]]), torch.tensor([[0, 1, 1]]), classes=2)
        tensor([[1., 1.],
                [6., 2.]])
    """
    check_map(x, "class_sums")
    check_count(classes, "classes", "class_sums")
    with torch.no_grad():
        return _sums(x, _members(x, labels, classes, "class_sums"))


def class_masks(difference: Tensor, p: float = 0.2, faithful: bool = False) -> Tensor:
    """For each class, False for the p*C channels of largest (signed) difference.

    Args:
        difference: mean in training less mean in validation. Single values that are NaN or
            infinite count as smallest; a class with nothing else draws its channels at random.
        p: share of channels, in [0, 1).
        faithful: Python's round(p*C) channels; by default p*C is rounded up or down at random for
            each class, with mean p*C.

    Shapes:
        difference (classes, C); the result alike, bool.

    Raises:
        ValueError: ``p`` outside [0, 1), or a difference of another shape.

    Example:
        >>> import torch
        >>> class_masks(torch.tensor([[0.1, -0.9, 0.3, 0.2]]), p=0.5)
        tensor([[ True,  True, False, False]])
    """
    p = check_rate(p, "class_masks")
    if difference.dim() != 2:
        raise ValueError(f"class_masks: expected (classes, C), got shape {tuple(difference.shape)}")
    with torch.no_grad():
        score = difference.detach().float()
        finite = score.isfinite()
        known = finite.any(1, keepdim=True)
        score = torch.where(finite, score, -torch.inf)
        score = torch.where(known, score, torch.rand_like(score))
        order = score.argsort(dim=1, descending=True, stable=True)
        channels = score.shape[1]
        if faithful:
            return order.argsort(dim=1) >= round(p * channels)
        number = (p * channels + torch.rand_like(score[:, :1])).floor()
        return order.argsort(dim=1) >= number


def nsdropout(
    x: Tensor,
    labels: Tensor,
    validation_means: Tensor,
    p: float = 0.2,
    training: bool = True,
    *,
    faithful: bool = False,
) -> Tensor:
    """Drops, at the pixels of each class, its most over-active channels; see `NSDropout`.

    Args:
        x: feature map.
        labels: as in `class_sums`.
        validation_means: mean of every channel over the validation examples of a class; NaN for
            a class that had none.
        p: share of channels to drop, in [0, 1).
        faithful: as in `class_masks`.
        training: identity if False.

    Shapes:
        x (B, C, *spatial); labels (B,) or (B, *size); validation_means (classes, C).

    Example:
        >>> import torch
        >>> x = torch.tensor([[[1.0], [5.0]], [[2.0], [2.0]]])  # two samples of two features
        >>> nsdropout(x, torch.tensor([0, 1]), torch.tensor([[1.0, 1], [1, 3]]), p=0.5)[..., 0]
        tensor([[2., 0.],
                [0., 4.]])
    """
    p = check_rate(p, "nsdropout")
    if not training or p == 0.0:
        return x
    check_map(x, "nsdropout")
    _check_means(validation_means, x, "nsdropout")
    with torch.no_grad():
        members = _members(x, labels, len(validation_means), "nsdropout")
        keep = class_masks(_difference(_sums(x, members), validation_means), p, faithful)
        factor = _factor(x, members, keep, 1.0 - p)
    return x * factor


def _members(x: Tensor, labels: Tensor, classes: int, owner: str) -> Tensor:
    """Ones (B, classes, N) where an example is of a class; N pixels, or 1 for labelled samples."""
    if labels.dtype.is_floating_point or labels.dtype.is_complex:
        raise ValueError(
            f"{owner}: labels are whole numbers, one class each; got {labels.dtype}. "
            "Convert them with labels.long()"
        )
    sizes = tuple(x.shape[2:])
    if labels.shape[:1] != x.shape[:1] or labels.dim() not in (1, x.dim() - 1):
        raise ValueError(
            f"{owner}: the map {tuple(x.shape)} needs labels ({len(x)},) or "
            f"({len(x)}, *size) with {len(sizes)} spatial axes, got shape {tuple(labels.shape)}"
        )
    labels = labels.to(x.device)
    if labels.dim() > 1:
        for axis, size in enumerate(sizes, start=1):
            given = labels.shape[axis]
            if given != size:  # the label below the centre of each pixel
                centre = (2 * torch.arange(size, device=x.device) + 1) * given // (2 * size)
                labels = labels.index_select(axis, centre)
    number = torch.arange(classes, device=x.device)
    labels = labels.flatten(1) if labels.dim() > 1 else labels[:, None]
    return (labels[:, None] == number.view(-1, 1)).float()


def _sums(x: Tensor, members: Tensor) -> Tensor:
    """The sums (classes, C) and, as last column, the numbers of examples."""
    rows = x.detach().float().flatten(2)
    if members.shape[2] != rows.shape[2]:
        rows = rows.mean(2, keepdim=True)
    with torch.autocast(_device_type(x), enabled=False):
        # a transposed product of a channels_last map is many times slower than this copy
        total = torch.bmm(members, rows.contiguous().transpose(1, 2)).sum(0)
    return torch.cat([total, members.sum((0, 2))[:, None]], 1)


def _difference(sums: Tensor, validation_means: Tensor) -> Tensor:
    """Mean of each class less that in validation; NaN for a class that is absent in either."""
    return sums[:, :-1] / sums[:, -1:] - validation_means.to(sums)


def _factor(x: Tensor, members: Tensor, keep: Tensor, share: float) -> Tensor:
    """Factor keep / share by the class of a pixel, 1 for one of no class; broadcasts to x."""
    with torch.autocast(_device_type(x), enabled=False):
        table = keep.float().t().expand(len(x), -1, -1)
        factor = torch.bmm(table, members) / share + (1.0 - members.sum(1, keepdim=True))
    sizes = x.shape[2:] if factor.shape[2] == x.shape[2:].numel() else [1] * (x.dim() - 2)
    return factor.view(*x.shape[:2], *sizes).to(x.dtype)


def _device_type(x: Tensor) -> str:
    return "cpu" if x.is_meta else x.device.type  # autocast knows no meta device


def _check_means(means: Tensor, x: Tensor, owner: str) -> None:
    if means.dim() != 2 or means.shape[1] != x.shape[1]:
        raise ValueError(
            f"{owner}: the map has {x.shape[1]} channels, the validation means have shape "
            f"{tuple(means.shape)}, expected (classes, {x.shape[1]}); one layer serves one place"
        )


@register("nsdropout")
class NSDropout(Regularizer):
    """Drops, at the pixels of each class, the channels that respond more than in validation.

    For every class c and channel, d_c = mean(x | class c) - mean_val(x | class c), signed. The p*C
    channels of largest d_c are zeroed at the pixels of class c and the others divided by 1 - p;
    pixels of no class (a label outside 0..classes-1, for example to be ignored) stay as they are.
    Before the first validation, and in steps without labels, it is ordinary element dropout. The
    means of a class come from all samples of the batch, so samples depend on each other.

    Whoever trains has to tell it, because no label passes through a network:

    * before each training step set ``labels`` (keep them until the backward pass is done, if
      activations are checkpointed) or None;
    * while validating set ``recording`` and, before each pass, ``labels``; then call
      `finish_validation`. Between processes, add up ``validation_sums`` before that.

    Args:
        p: share of channels to drop per class, in [0, 1).
        classes: number of classes.
        eval_mode: what ``eval()`` does once there are masks. "none": nothing, the very same tensor.
            "mean_mask": x times the mean over the classes of mask / (1 - p). "true_label": the
            published inference, x times the last mask of the TRUE label, unscaled: see below.
        faithful: drop exactly Python's round(p*C) channels, as published. By default p*C is
            rounded up or down at random for each class, with mean p*C, so that the rate is p for
            any number of channels. The inference is chosen by ``eval_mode`` alone.

    Attributes:
        labels: class of each pixel or sample for the next pass, see `class_sums`.
        recording: whether passes in ``eval()`` add to ``validation_sums``.
        validation_sums: sums and counts of the running validation, (classes, C + 1).
        validation_means: what training compares with, (classes, C); NaN for a class never seen:
            such a class draws its channels at random.
        masks: last masks, True where kept, (classes, C); a class absent from a batch keeps its.

    Results of "true_label" are invalid for reporting (`valid_for_reporting` is False): a mask that
    the test label chooses tells the network that label. Test accuracies measured on scikit-learn's
    digits (MLP, 200 training samples, steps on all of them with a validation after each, 60 epochs,
    p = .5, mean of three seeds; ``benchmarks/nsdropout_leak.py``):

    =================================  =======  =================  =========================
    trained with                       no mask  true label's mask  wrong label's mask: it
                                                                   predicts that label
    =================================  =======  =================  =========================
    ordinary dropout                   .93
    NSDropout                          .23      1.00               .99
    RANDOM fixed masks, one per class  .14      1.00               1.00
    =================================  =======  =================  =========================

    Random masks, which know no validation data, do as well, and on noise with random labels they
    reach .97 where chance is .10: the gain is the leak. With steps of 40 samples the masks never
    settle: nothing leaks, nothing is gained (p = .2: .90 without mask, dropout .93 with steps on
    all). A mode that takes predicted labels is not offered: a layer would need the network's output
    before it.

    Shapes:
        (B, C, *spatial) with one to three spatial axes; the output is alike. Features of a fully
        connected layer are (B, C, 1) with labels (B,): then the rule is the paper's.

    Raises:
        ValueError: a bad parameter, labels that are missing where they must be read, or do not
            fit the map, or an input of another shape or kind.

    Paper:
        J. Shunk, "Neuron-Specific Dropout: A Deterministic Regularization Technique to Prevent
        Neural Networks from Overfitting & Reduce Dependence on Large Training Samples", arXiv
        2201.06938, 2022. As its code, d_c is signed, while the text speaks of the values farthest
        from the validation mean. The published backward pass forgets the factor 1 / (1 - p); here
        it is the derivative. Maps and dense labels are an extension.

    Example:
        >>> import torch
        >>> layer, x = NSDropout(p=0.5, classes=2), torch.rand(4, 8, 6, 6)
        >>> layer.eval().recording, layer.labels = True, torch.randint(2, (4, 12, 12))
        >>> layer(x) is x  # validation
        True
        >>> layer.finish_validation()
        >>> layer.measured_rate(x, layer.train()(x))
        0.5
    """

    stochastic = False  # given the labels, chance decides the rounding alone
    unit = "channel, at the pixels of a class"
    paper = "Shunk, arXiv 2022"
    needs = "labels and validation activations"
    labels: Tensor | None
    validation_sums: Tensor | None
    validation_means: Tensor | None
    masks: Tensor | None

    def __init__(
        self,
        p: float = 0.2,
        classes: int = 2,
        eval_mode: Literal["none", "mean_mask", "true_label"] = "none",
        faithful: bool = False,
    ) -> None:
        super().__init__(p)
        self.classes = check_count(classes, "classes", type(self).__name__)
        self.eval_mode = check_choice(eval_mode, "eval_mode of nsdropout", _EVAL_MODES)
        self.faithful = bool(faithful)
        self.recording = False
        self.labels = None
        self.validation_sums = self.validation_means = self.masks = None

    @property
    def valid_for_reporting(self) -> bool:
        """Whether evaluation is free of test labels; False for ``eval_mode="true_label"``."""
        return self.eval_mode != "true_label"

    def forward(self, x: Tensor) -> Tensor:
        """As every regularizer; in ``eval()`` it may record, and does what ``eval_mode`` says."""
        if self.training:
            return super().forward(x)
        if self.recording:
            self._record(x)
        if self.p == 0.0 or self.eval_mode == "none" or self.masks is None:
            return x
        check_map(x, type(self).__name__)
        keep = self.masks.to(x.device)
        if self.eval_mode == "mean_mask":
            factor = keep.float().mean(0) / (1.0 - self.p)
            return x * factor.view(-1, *[1] * (x.dim() - 2)).to(x.dtype)
        members = _members(x, self._labels("true_label"), self.classes, type(self).__name__)
        return x * _factor(x, members, keep, 1.0)

    def regularize(self, x: Tensor) -> Tensor:
        """The rule with this layer's memory; ordinary dropout as long as that is empty."""
        if self.labels is None or self.validation_means is None:
            return drop_elements(x, self.p)
        _check_means(self.validation_means, x, type(self).__name__)
        with torch.no_grad():
            members = _members(x, self.labels, self.classes, type(self).__name__)
            sums = _sums(x, members)
            keep = class_masks(_difference(sums, self.validation_means), self.p, self.faithful)
            if self.masks is not None:
                keep = torch.where(sums[:, -1:] > 0, keep, self.masks.to(x.device))
            if not x.is_meta:  # inferring a shape is no training step
                self.masks = keep
            factor = _factor(x, members, keep, 1.0 - self.p)
        return x * factor

    def finish_validation(self) -> None:
        """Makes the recorded sums the means that training compares with, and clears them.

        A class without examples keeps its former means. Does nothing if nothing was recorded.
        """
        if self.validation_sums is None:
            return
        count = self.validation_sums[:, -1:]
        means = (self.validation_sums[:, :-1] / count).float()  # NaN for a class without examples
        if self.validation_means is not None:
            means = torch.where(count > 0, means, self.validation_means.to(means.device))
        self.validation_means, self.validation_sums = means, None

    def memory(self) -> dict[str, Tensor]:
        """The validation means, the masks, and the sums of a validation under way."""
        held = {name: getattr(self, name) for name in _MEMORY}
        return {name: value for name, value in held.items() if value is not None}

    def load_memory(self, memory: Mapping[str, Tensor]) -> None:
        """Restores what `memory` returned; what it does not hold is forgotten."""
        owner = type(self).__name__
        for name, value in memory.items():
            if name not in _MEMORY:
                raise ValueError(f"{owner} remembers {', '.join(_MEMORY)}; got {name!r}")
            if value.dim() != 2 or len(value) != self.classes:
                raise ValueError(
                    f"{owner}: {name} must have shape ({self.classes}, ...), one row per class; "
                    f"got {tuple(value.shape)}"
                )
        for name in _MEMORY:
            setattr(self, name, memory.get(name))

    def _record(self, x: Tensor) -> None:
        sums = class_sums(x, self._labels("recording"), self.classes)
        # float32 loses counts above 16 million
        sums = sums.to(torch.float32 if x.device.type == "mps" else torch.float64)
        if self.validation_sums is not None:
            _check_means(self.validation_sums[:, :-1], x, type(self).__name__)
            sums = sums + self.validation_sums.to(sums)
        self.validation_sums = sums

    def _labels(self, reader: str) -> Tensor:
        if self.labels is None:
            raise ValueError(
                f"{type(self).__name__}: {reader} reads labels, but none were set; assign "
                "layer.labels before the pass"
            )
        return self.labels

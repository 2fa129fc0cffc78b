"""The divergence of a network's classes from those of a teacher, for each pixel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from medseg_reg.losses.labels import check_coarse, check_logits, resized, two_classes
from medseg_reg.losses.weights import supervision_shares


def distillation_loss(
    logits: Tensor | Sequence[Tensor],
    teacher: Tensor,
    temperature: float = 1.0,
    supervision: str | tuple[float, ...] = "equal",
    counted: Tensor | None = None,
) -> Tensor:
    r"""Return the distance of a network's classes from those of a teacher, in float32.

    .. math::
        L = \tau^2 \, \frac{1}{N} \sum_n \sum_c q_{nc} (\log q_{nc} - \log p_{nc}),
        \quad q = \operatorname{softmax}(t / \tau), \; p = \operatorname{softmax}(z / \tau)

    The factor keeps the gradients of different temperatures alike. One channel of logits x stands
    for the two classes (0, x), of either network. Coarser outputs of deep supervision are
    interpolated linearly, and their losses averaged as in `MixedLoss`. The teacher gets no
    gradient.

    Args:
        logits: z, (B, K, *spatial), or a list of them, the finest first.
        teacher: t, of the shape of the finest.
        temperature: tau, above 0.
        supervision: weights of the outputs.
        counted: which pixels count, bool (B, *spatial); None for all. It is 0 if none does.

    Raises:
        ValueError: shapes or classes do not match, or the temperature is not above 0.

    Papers:
        G. Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, 2015;
        H. Touvron et al., "Training data-efficient image transformers & distillation through
        attention", ICML 2021, arXiv:2012.12877, whose code divides by the number of classes too.

    Example:
        >>> logits = torch.tensor([0.0, 0.0]).view(1, 2, 1, 1)
        >>> teacher = torch.tensor([0.0, 1.0986123]).view(1, 2, 1, 1)
        >>> round(distillation_loss(logits, teacher).item(), 4)
        0.1308
    """
    if temperature <= 0:
        raise ValueError(f"expected a temperature above 0, got {temperature}")
    outputs = [logits] if isinstance(logits, Tensor) else list(logits)
    shares = supervision_shares(supervision, len(outputs))
    check_logits(outputs[0])
    for output in outputs[1:]:
        check_coarse(output, outputs[0])
    with torch.autocast(teacher.device.type, enabled=False):
        truth = torch.log_softmax(two_classes(teacher.detach().float()) / temperature, dim=1)
        total = truth.new_zeros(())
        for output, share in zip(outputs, shares, strict=True):
            found = two_classes(resized(output.float(), teacher.shape[2:]))
            if found.shape != truth.shape:
                raise ValueError(
                    f"logits have the shape {tuple(output.shape)}, the teacher's "
                    f"{tuple(teacher.shape)}: expected the same images and classes"
                )
            found = torch.log_softmax(found / temperature, dim=1)
            total = total + share * temperature**2 * _divergence(found, truth, counted)
    return total


def _divergence(found: Tensor, truth: Tensor, counted: Tensor | None) -> Tensor:
    """Return the mean over the pixels that count of KL(truth, found), both logarithms."""
    each = F.kl_div(found, truth, reduction="none", log_target=True).sum(1)
    if counted is None:
        return each.mean()
    return (each * counted).sum() / counted.sum().clamp_min(1)

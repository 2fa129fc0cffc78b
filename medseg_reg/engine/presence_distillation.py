"""A teacher for a classifier of slices: what it says goes to the distillation token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from medseg_reg.config_regularization import DistillationSpec
from medseg_reg.engine.origins import Origin
from medseg_reg.losses import presence_bce, presence_divergence, presence_logits


class SegmentationTeacher:
    """Says by a segmentation which classes an image shows, see `presence_logits`.

    It is no module, so that the network is neither trained nor kept with its pupil.

    Args:
        network: of a segmentation; it is set to evaluation and loses its gradients.
        pixels: the fewest pixels of a class that count.
    """

    def __init__(self, network: nn.Module, pixels: int = 1) -> None:
        self.network = network.eval().requires_grad_(False)
        self.pixels = pixels

    def __call__(self, image: Tensor) -> Tensor:
        """Return logits (B, foreground classes) for images (B, C, H, W)."""
        self.network.to(image.device)
        return presence_logits(self.network(image), self.pixels)


class PresenceDistillation:
    r"""What a teacher adds to the loss of a classifier.

    .. math::
        L_\text{soft} &= (1 - \lambda) L(z, y)
            + \lambda \tau^2 \operatorname{KL}(\operatorname{Bern}(t / \tau) \,\|\,
            \operatorname{Bern}(z' / \tau)) \\
        L_\text{hard} &= (1 - \lambda) L(z, y) + \lambda L(z', [t > 0])

    with z the logits of the class token and z' those of the distillation token, which are the same
    where there is none; t the teacher's, y the labels, Bern of the sigmoid, and L the binary
    cross-entropy `presence_bce` with the weights of the run. An image may show several classes: a
    Bernoulli variable for each, where the paper has one class and a softmax. Published: hard, with
    lambda 1/2. Pairs of an image and a class that are not known count in neither part.

    Args:
        teacher: maps images (B, C, H, W) to logits (B, K); called without gradients.
        spec: kind, temperature and weight.
        weights: of the classes, (K,).
        origin: what is known of the run of the teacher.

    Paper:
        H. Touvron et al., "Training data-efficient image transformers & distillation through
        attention" (DeiT), ICML 2021, arXiv:2012.12877.

    Example:
        >>> spec = DistillationSpec(teacher="runs/unet", kind="hard")
        >>> part = PresenceDistillation(lambda image: torch.tensor([[3.0]]), spec)
        >>> taught = torch.zeros(1, 1)
        >>> loss = part.mixed(torch.tensor(1.0), torch.rand(1, 1, 4, 4), torch.ones(1, 1), taught)
        >>> round(loss.item(), 4)
        0.8466
    """

    def __init__(
        self,
        teacher: Callable[[Tensor], Tensor],
        spec: DistillationSpec,
        weights: Tensor | None = None,
        origin: Origin | None = None,
    ) -> None:
        self.teacher, self.spec, self.weights, self.origin = teacher, spec, weights, origin

    def mixed(self, loss: Tensor, image: Tensor, targets: Tensor, taught: Tensor) -> Tensor:
        """Return the loss with the teacher's share.

        Args:
            loss: L of the labels.
            image: what the network saw.
            targets: y, (B, K), NaN where it is not known.
            taught: z', (B, K).
        """
        weight = self.spec.weight
        if weight == 0:
            return loss
        with torch.no_grad():
            teacher = self.teacher(image)
        known = ~targets.isnan()
        if self.spec.kind == "hard":
            theirs = (teacher > 0).float().masked_fill(~known, torch.nan)
            weights = None if self.weights is None else self.weights.to(taught.device)
            told = presence_bce(taught, theirs, weights)
        else:
            told = presence_divergence(taught, teacher, self.spec.temperature, known)
        return (1 - weight) * loss + weight * told

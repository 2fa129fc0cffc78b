"""Distillation: a network also learns from a finished run, its teacher.

H. Touvron et al., "Training data-efficient image transformers & distillation through attention"
(DeiT), ICML 2021, arXiv:2012.12877, for the class of an image; here for each pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from medseg_reg.config import Config, RunConfig
from medseg_reg.config_regularization import DistillationSpec
from medseg_reg.data.splits import Splits
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.earlier_run import check_earlier, load_earlier, same_run
from medseg_reg.engine.origins import Origin
from medseg_reg.engine.run_directory import DataFacts, RunDirectory
from medseg_reg.errors import MedsegError
from medseg_reg.losses import distillation_loss
from medseg_reg.networks.build import check_input_size, predicted_labels

_KEY = "regularization.error.distillation.teacher"


class Distillation:
    r"""What a teacher adds to the loss of a training.

    .. math::
        L_\text{soft} &= (1 - \lambda) L(z, t)
            + \lambda \tau^2 \operatorname{KL}(q(\tau) \,\|\, p(\tau)) \\
        L_\text{hard} &= (1 - \lambda) L(z, t) + \lambda L(z, \arg\max_c y_c)

    with z the logits of the network, y those of the teacher for the same images, p and q their
    classes at the temperature, see `distillation_loss`, t the labels, and L the loss of the run.
    Ignored pixels count in neither part.

    It is no module and holds none where a module would find it, so that the teacher is neither
    trained, nor in checkpoints, nor in the weights of the run.

    Args:
        teacher: a network; it is set to evaluation and loses its gradients.
        spec: kind, temperature and weight.
        supervision: weights of the outputs of the network under deep supervision.
        ignored: a label of pixels whose class is not known.
        origin: what is known of the run of the teacher.

    Example:
        >>> spec = DistillationSpec(teacher="runs/unet", weight=0.25)
        >>> part = Distillation(torch.nn.Conv2d(1, 2, 1), spec)
        >>> image, logits = torch.rand(1, 1, 4, 4), torch.zeros(1, 2, 4, 4)
        >>> labels = torch.zeros(1, 4, 4, dtype=torch.uint8)
        >>> part.mixed(torch.tensor(1.0), image, labels, logits, lambda *_: 0).item() > 0.75
        True
    """

    def __init__(
        self,
        teacher: nn.Module,
        spec: DistillationSpec,
        supervision: str | tuple[float, ...] = "equal",
        ignored: int | None = None,
        origin: Origin | None = None,
    ) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.spec, self.supervision, self.ignored = spec, supervision, ignored
        self.origin = origin

    def to(self, device: torch.device) -> None:
        """Move the teacher to a device."""
        self.teacher.to(device)

    def mixed(
        self,
        loss: Tensor,
        image: Tensor,
        labels: Tensor,
        output: Any,
        loss_of: Callable[[Any, Tensor], Tensor],
    ) -> Tensor:
        """Return the loss with the teacher's share.

        Args:
            loss: L of the true labels.
            image: what the network saw, (B, C, *spatial).
            labels: of these, (B, *spatial).
            output: what it returned for that: logits, of several levels, or guided.
            loss_of: L of an output and labels.
        """
        weight = self.spec.weight
        if weight == 0:
            return loss
        with torch.no_grad():
            teacher = self.teacher(image)
        known = None if self.ignored is None else labels != self.ignored
        if self.spec.kind == "hard":
            theirs = predicted_labels(teacher)
            told = loss_of(output, theirs if known is None else torch.where(known, theirs, labels))
        else:
            logits, spec = getattr(output, "logits", output), self.spec  # of guided ones too
            told = distillation_loss(logits, teacher, spec.temperature, self.supervision, known)
        return (1 - weight) * loss + weight * told


def load_teacher(
    config: Config, facts: DataFacts, splits: Splits, store: SliceStore
) -> Distillation | None:
    """Load the teacher that a configuration names, if it names any, see `teacher_network`."""
    error = config.regularization.error
    if error.distillation is None:
        return None
    network, origin = teacher_network(config, facts, splits, store)
    ignored = config.data.ignore_label
    return Distillation(network, error.distillation, error.supervision, ignored, origin)


def teacher_network(
    config: RunConfig, facts: DataFacts, splits: Splits, store: SliceStore
) -> tuple[nn.Module, Origin | None]:
    """Load the network of the teacher that a configuration names; say what is known of it.

    Random states are not what they were afterwards.

    Raises:
        MedsegError: as of `check_teacher`; or it reads the labels of what it is tested on.
    """
    origin = check_teacher(config, facts, splits, store)
    path = config.regularization.error.distillation.teacher  # type: ignore[union-attr]
    return load_earlier(RunDirectory(path), _KEY), origin


def check_teacher(
    config: RunConfig, facts: DataFacts, splits: Splits, store: SliceStore
) -> Origin | None:
    """Return what is known of the teacher that a configuration names, if it names any.

    Raises:
        MedsegError: it is no finished run, was trained for other classes, channels or
            intensities, or has learned from cases that this run validates or tests on.
    """
    spec = config.regularization.error.distillation
    if spec is None:
        return None
    return check_earlier(RunDirectory(spec.teacher), _KEY, "teacher", config, facts, splits, store)


def check_teacher_size(
    network: Any, spec: DistillationSpec, channels: int, size: Sequence[int]
) -> None:
    """Refuse a size of images that the network of a teacher cannot take.

    Raises:
        MedsegError: names the size, and one that works.
    """
    try:
        check_input_size(network, channels, size)
    except MedsegError as error:
        raise MedsegError(f"{_KEY}: {spec.teacher}: {error}") from None


class Taught(Protocol):
    """What has a teacher."""

    spec: DistillationSpec
    origin: Origin | None


def same_teacher(distillation: Taught | None, note: Path) -> dict[str, Any] | None:
    """Return what a run notes of its teacher, or make sure that it is still the same.

    Args:
        distillation: with a teacher of a run; None for none.
        note: the file of the run that has the note, if it was written already.

    Raises:
        MedsegError: the teacher has other weights than when the training began.
    """
    if distillation is None:
        return None
    teacher = RunDirectory(distillation.spec.teacher)
    return same_run(teacher.path, teacher.weights, note, _KEY, distillation.origin)

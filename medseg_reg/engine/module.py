"""The training and validation steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from medseg_reg.config import Config
from medseg_reg.engine.distillation import Distillation
from medseg_reg.engine.training_module import TrainingModule
from medseg_reg.errors import MedsegError
from medseg_reg.losses import MixedLoss
from medseg_reg.metrics import confusion_counts, dice, iou
from medseg_reg.networks.build import predicted_labels
from medseg_reg.networks.guided import GuidedLogits, presence_loss


class SegmentationModule(TrainingModule):
    """A network, its loss, and the scores of its validation.

    Validation scores are per case, from counts summed over all its slices, at the network's
    resolution; the final evaluation scores at the resolution of the source.

    Args:
        network: maps images (B, C, H, W) to logits (B, K, H, W); in training also to a list of
            them, for deep supervision, or to `GuidedLogits`.
        loss: the loss of logits, or of a list of logits, and labels.
        config: the run's configuration.
        val_cases: names of the validation cases, in the order of their indices.
        classes: number of classes, the background counted.
        distillation: what a teacher adds to the loss.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: MixedLoss,
        config: Config,
        val_cases: Sequence[str],
        classes: int,
        distillation: Distillation | None = None,
    ) -> None:
        super().__init__(network, config)
        self.config: Config = config
        self.loss = loss
        self.distillation = distillation
        self.classes = classes
        self.val_cases = list(val_cases)
        self.val_loss = torch.zeros(2, dtype=torch.float64)
        self.val_counts = torch.zeros(0)

    def on_fit_start(self) -> None:
        """Take the teacher along to the device."""
        if self.distillation is not None:
            self.distillation.to(self.device)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the loss of a batch; stop the run if it is not a number."""
        image = self._image(batch)
        output = (self.compiled or self.network)(image)
        try:
            loss = self._loss_of(output, batch["mask"])
        except ValueError as error:
            raise MedsegError(
                f"{self._shown(batch)}: {error}. `python -m medseg_reg.data.verify` tells which "
                "files of the store were changed."
            ) from None
        taught = None
        if self.distillation is not None:
            taught = self.distillation.mixed(loss, image, batch["mask"], output, self._loss_of)
        return self.counted(loss, batch, batch_idx, taught)

    def _loss_of(self, output: Any, labels: Tensor) -> Tensor:
        """Return the loss of what the network returned: logits, of several levels, or guided."""
        if isinstance(output, GuidedLogits):
            # Added without a weight, as in the paper.
            presence = presence_loss(output.presence, labels, self.loss.ignore)
            return self._loss_of(output.logits, labels) + presence
        loss: Tensor = self.loss(output, labels)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Begin to count."""
        self.val_loss.zero_()
        shape = (len(self.val_cases), self.classes, 3)
        self.val_counts = torch.zeros(shape, dtype=torch.int64, device=self.device)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Add the counts of a batch of slices to those of their cases."""
        logits = self.network(self._image(batch))
        size = len(batch["mask"])
        loss = float(self.loss(logits, batch["mask"]))
        self.val_loss += torch.tensor([loss * size, size], dtype=torch.float64)
        counts = confusion_counts(
            predicted_labels(logits), batch["mask"], self.classes, self.loss.ignore
        )
        self.val_counts.index_add_(0, batch["case"], counts)

    def on_validation_epoch_end(self) -> None:
        """Score each case, and log the mean over cases and classes without the background."""
        # On the CPU, because not every accelerator has the float64 of the scores.
        counts = self._over_processes(self.val_counts).cpu()
        loss = self._over_processes(self.val_loss)
        empty = self.config.evaluation.empty
        # Of a case with ignored pixels alone nothing is known.
        counts = counts[counts.flatten(1).any(dim=1)]
        self.epoch_scores = {
            "val_loss": float(loss[0] / loss[1]),
            "val_dice": float(dice(counts, empty)[:, 1:].nanmean()),
            "val_iou": float(iou(counts, empty)[:, 1:].nanmean()),
        }
        for name, value in self.epoch_scores.items():
            self.log(name, value, prog_bar=name == "val_dice")

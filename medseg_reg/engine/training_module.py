"""What every training has in common: optimizer, learning rate, penalties, sums of losses."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from medseg_reg.config import RunConfig
from medseg_reg.data.dataset import SliceDataset
from medseg_reg.engine.compiling import compiled_pass
from medseg_reg.engine.memory_format import choose_memory_format
from medseg_reg.engine.precision import choose_accelerator, choose_precision
from medseg_reg.engine.schedule import learning_rate_factor
from medseg_reg.errors import MedsegError
from medseg_reg.regularizers.protocols import PenaltyGiver

# Batches between two looks at the loss on an accelerator.
CHECK_EVERY = 10


# Tables that are looked up and added, not weights that multiply: the published codes of ViT, Swin
# and their kin exempt them. Timm, MONAI and torchvision call them so.
_LOOKED_UP = (
    "cls_token",
    "dist_token",
    "mask_token",
    "pos_embed",
    "pos_embedding",
    "position_embeddings",
    "reg_token",
    "relative_position_bias_table",
)


def decaying_group(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the group of an optimizer to which weight decay applies: weights that multiply."""
    return optimizer.param_groups[0]


class TrainingModule(L.LightningModule):
    """A network that is trained, and what its trainings have in common whatever the loss is.

    Args:
        network: gets images (B, C, H, W).
        config: the run's configuration.

    Attributes:
        selected_by: the score of the validation that is highest in the best epoch.
    """

    selected_by = "val_dice"

    def __init__(self, network: nn.Module, config: RunConfig) -> None:
        super().__init__()
        self.network, self.config = network, config
        self.penalized = [m for m in network.modules() if isinstance(m, PenaltyGiver)]
        self.l1 = config.regularization.penalty.l1
        accelerator = choose_accelerator(config.training.accelerator)
        compiling = config.training.compile
        self.memory_format = choose_memory_format(
            config.training.memory_format, network, accelerator
        )
        # A plain function, so that the network is not registered twice.
        self.compiled = compiled_pass(network, compiling, accelerator) if compiling else None
        self.epoch_scores: dict[str, float] = {}
        # Kept in checkpoints, so that an epoch may be resumed in its middle.
        self.train_loss = torch.zeros(2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer; decay applies to weights that multiply alone, see `PenaltySpec`."""
        spec, decay = self.config.optimizer, self.config.regularization.penalty.weight_decay
        penalized = set(self._weights())
        others = [p for p in self.network.parameters() if p not in penalized]
        # The first group is that of `decaying_group`.
        groups: list[dict[str, Any]] = [
            {"params": self._weights(), "weight_decay": decay},
            {"params": others, "weight_decay": 0.0},
        ]
        if spec.name == "sgd":
            nesterov = spec.nesterov and spec.momentum > 0
            return torch.optim.SGD(
                groups, lr=spec.lr, momentum=spec.momentum, nesterov=nesterov, fused=self._fused()
            )
        kind = torch.optim.AdamW if spec.name == "adamw" else torch.optim.Adam
        return kind(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=self._fused())

    def _fused(self) -> bool | None:
        """Whether one kernel does the whole step; None leaves it to torch."""
        clip = self.config.regularization.optimization.gradient_clip
        spec = self.config.training
        mixed = choose_precision(spec.precision, choose_accelerator(spec.accelerator)) != "32-true"
        # A fused optimizer would take off the scale of a float16 loss after the clipping, so
        # Lightning refuses the two together in any mixed precision.
        return True if self.device.type in ("cpu", "cuda") and not (mixed and clip) else None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the learning rate of this batch."""
        done = self.current_epoch + batch_idx / self.trainer.num_training_batches
        factor = learning_rate_factor(self.config.schedule, done, self.config.training.epochs)
        for group in self.optimizers().param_groups:  # type: ignore[union-attr]
            group["lr"] = self.config.optimizer.lr * factor

    def counted(
        self, loss: Tensor, batch: dict[str, Any], batch_idx: int, optimized: Tensor | None = None
    ) -> Tensor:
        """Add the loss of a batch to the epoch's, and penalties to what is optimized.

        Args:
            loss: of the labels.
            batch: for the message.
            batch_idx: its number in the epoch.
            optimized: what is minimized where it is not this loss, as with a teacher.

        Raises:
            MedsegError: it is not a finite number.
        """
        # The sum stays on the device: reading it makes the host wait for an accelerator.
        self.train_loss = self.train_loss.to(loss.device)
        self.train_loss += torch.stack([loss.detach(), torch.ones_like(loss)])
        on_cpu = loss.device.type == "cpu"
        if (on_cpu or (batch_idx + 1) % CHECK_EVERY == 0) and not torch.isfinite(
            self.train_loss[0]
        ):
            raise MedsegError(self._not_finite(batch if on_cpu else None))
        return self.with_penalties(loss if optimized is None else optimized)

    def with_penalties(self, loss: Tensor) -> Tensor:
        """Add to a loss what parts of the network ask for in this pass, and the L1 penalty."""
        for part in self.penalized:
            if part.penalty is not None:
                loss, part.penalty = loss + part.penalty, None
        return loss if self.l1 == 0 else loss + self.l1_penalty()

    def l1_penalty(self) -> Tensor:
        """Return l1 * sum |w| over the weights of convolutions."""
        norms = [torch.linalg.vector_norm(w, ord=1) for w in self._weights()]
        return self.l1 * torch.stack(norms).sum()

    def on_train_epoch_start(self) -> None:
        """Begin an epoch; not called when one is resumed in its middle."""
        self.train_loss.zero_()
        self.epoch_scores = {}

    def on_train_epoch_end(self) -> None:
        """Log the mean loss (of the labels, no penalties), the learning rate and the penalty."""
        loss = self._over_processes(self.train_loss)
        self.epoch_scores["train_loss"] = float(loss[0] / loss[1])
        self.epoch_scores["lr"] = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]
        names = ["train_loss", "lr"]
        if self.l1 > 0:
            self.epoch_scores["l1"] = float(self.l1_penalty().detach())
            names.append("l1")
        for name in names:
            self.log(name, self.epoch_scores[name], prog_bar=name == "train_loss")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the sums of an unfinished epoch."""
        checkpoint["train_loss"] = self.train_loss.clone()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the sums of an unfinished epoch."""
        self.train_loss = checkpoint["train_loss"].clone()

    def _over_processes(self, sums: Tensor) -> Tensor:
        """Return sums over all processes; every process gets the same."""
        if self.trainer.world_size == 1:
            return sums
        total = sums.to(self.device, copy=True)
        torch.distributed.all_reduce(total)
        return total

    def _weights(self) -> list[nn.Parameter]:
        """Return what penalties apply to: no biases, normalization layers, tables of positions."""
        return [
            p
            for name, p in self.network.named_parameters()
            if p.ndim > 1 and name.rpartition(".")[2] not in _LOOKED_UP
        ]

    def _image(self, batch: dict[str, Any]) -> Tensor:
        image: Tensor = batch["image"]
        return image.contiguous(memory_format=self.memory_format)

    def _shown(self, batch: dict[str, Any]) -> str:
        """Name the slices of a training batch."""
        dataset: SliceDataset = self.trainer.datamodule.train  # type: ignore[attr-defined]
        pairs = zip(batch["case"].tolist(), batch["slice"].tolist(), strict=True)
        return ", ".join(f"{dataset.cases[case]} #{number}" for case, number in pairs)

    def _not_finite(self, batch: dict[str, Any] | None) -> str:
        where = f"in the last {CHECK_EVERY} batches"
        if batch is not None:
            where = f"on the slices {self._shown(batch)}"
        return (
            f"epoch {self.current_epoch + 1}: the loss is not a finite number {where}. "
            "Lower optimizer.lr, set regularization.optimization.gradient_clip, or use "
            "training.precision=32. Checkpoints of earlier epochs are kept."
        )

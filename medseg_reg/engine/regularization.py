"""Everything about regularizers that changes while a network is trained.

Rates follow their schedules, layers that take part in some steps are told in which, layers that
need labels get them, and what layers remember goes into the checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from medseg_reg.engine.layer_memory import layers_of, memory_of, restore_memory
from medseg_reg.engine.rates import PlacedEntry, rate_factor
from medseg_reg.engine.training_module import decaying_group
from medseg_reg.errors import MedsegError
from medseg_reg.networks.token_labels import TokenLabels
from medseg_reg.regularizers.protocols import LabelReader, LabelTaker, StepTaker

# Sets the coins apart from the order of the data, which is drawn from (seed, epoch).
_COINS = 0x636F696E


def step_coin(seed: int, step: int) -> float:
    """Return the coin of an optimizer step, uniform in [0, 1): the same in every process."""
    return float(np.random.default_rng([_COINS, seed, step]).random())


class RegularizationControl(Callback):
    """Steers the layers of a network through a training.

    Before each batch, from the number n of optimizer steps done and N of the whole training:

    * a layer with a schedule gets the rate p * factor(n / N);
    * a layer that takes part in some steps is told whether it does: the coin of step n is below
      its rate. Where it does and asks for it, the optimizer's weight decay is magnified until the
      step is over;
    * a layer, or another part of the network, that reads labels gets those of the batch.

    A validation feeds the layers that learn from held-out data. Rates and coins have no state:
    accumulated batches share them, and a resumed run goes on with them.

    Args:
        network: the network with its layers.
        entries: the entries of the configuration, placed.
        seed: the seed of the run.
        ignored: a label of pixels whose class is not known. To a layer that asks where there is
            foreground it is background; to one that learns from classes it is none of them.
    """

    def __init__(
        self,
        network: nn.Module,
        entries: Sequence[PlacedEntry],
        seed: int,
        ignored: int | None = None,
    ) -> None:
        self.network, self.entries, self.seed = network, list(entries), seed
        self.ignored = ignored
        self.scheduled = {
            entry: [(network.get_submodule(one.path), one.p) for one in entry.placements]
            for entry in entries
            if entry.spec.schedule.name != "constant"
        }
        layers = list(layers_of(network).values())
        self.takers = [layer for layer in layers if isinstance(layer, StepTaker)]
        self.readers = [layer for layer in layers if isinstance(layer, LabelReader)]
        self.labelled = [m for m in network.modules() if isinstance(m, LabelTaker)]
        self.steps = 0
        self._decay: float | None = None
        self._restored: dict[str, Any] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the steps to come, and go on from a checkpoint if there is one."""
        self.steps = int(trainer.estimated_stepping_batches)
        if self._restored is not None:
            self._require_same(self._restored["description"])
            self._restore_memory(trainer)
            self._restored = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set rates, participation, weight decay and labels for a batch."""
        step = trainer.global_step
        self.set_rates(step)
        if self.takers:
            self._choose(step, trainer.optimizers[0])
        self._give_labels(batch["mask"])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take back what was set for one batch."""
        self._give_labels(None)
        for layer in self.takers:
            layer.taking_part = None
        if self._decay is not None:
            decaying_group(trainer.optimizers[0])["weight_decay"] = self._decay
            self._decay = None

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to record held-out passes."""
        for layer in self.readers:
            layer.validation_sums, layer.recording = None, True

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Give the labels of a held-out batch."""
        self._give_labels(batch["mask"])

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take the labels back."""
        self._give_labels(None)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the records of all processes up, and let the layers use them."""
        for layer in self.readers:
            layer.recording = False
            if trainer.world_size > 1 and layer.validation_sums is not None:
                torch.distributed.all_reduce(layer.validation_sums)
            layer.finish_validation()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Log the rates of the epoch's last step."""
        for key, rate in self.rates(trainer.global_step - 1).items():
            pl_module.epoch_scores[key] = rate
            pl_module.log(key, rate)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep how far the schedules are, what they are, and what the layers remember."""
        memory: list[Any] = [memory_of(self.network)]
        if trainer.world_size > 1:
            memory = memory * trainer.world_size
            torch.distributed.all_gather_object(memory, memory[0])
        checkpoint["regularization"] = {
            "description": self.description(),
            "progress": trainer.global_step,
            "memory": memory,
        }

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on with what layers remember, and hold the state back until training starts."""
        # Checkpoints from before there were schedules have none.
        self._restored = checkpoint.get("regularization")
        if self._restored is not None:
            # Once here, as no training starts where all epochs are done, and once when the
            # network is on its device.
            self._restore_memory(trainer)

    def description(self) -> dict[str, Any]:
        """Return all that decides the rates, as plain types."""
        return {
            "steps": self.steps,
            "entries": [entry.description() for entry in self.entries],
        }

    def rates(self, step: int) -> dict[str, float]:
        """Return the rate of each scheduled entry in an optimizer step, by its key."""
        return {
            entry.key: entry.p * rate_factor(entry.spec.schedule, step / self.steps)
            for entry in self.scheduled
        }

    def set_rates(self, step: int) -> None:
        """Give each layer with a schedule its rate in an optimizer step."""
        for entry, layers in self.scheduled.items():
            factor = rate_factor(entry.spec.schedule, step / self.steps)
            for layer, p in layers:
                layer.p = p * factor  # type: ignore[assignment]

    def _choose(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        coin, decays = step_coin(self.seed, step), []
        for layer in self.takers:
            layer.taking_part = coin < layer.p
            if layer.taking_part and layer.magnified_weight_decay is not None:
                decays.append(layer.magnified_weight_decay)
        if decays:
            group = decaying_group(optimizer)
            self._decay, group["weight_decay"] = group["weight_decay"], max(decays)

    def _give_labels(self, labels: Tensor | None) -> None:
        known = labels
        if labels is not None and self.ignored is not None:
            known = labels.masked_fill(labels == self.ignored, 0)
        for layer in self.labelled:
            layer.labels = labels if isinstance(layer, LabelReader | TokenLabels) else known

    def _restore_memory(self, trainer: L.Trainer) -> None:
        memories = (self._restored or {})["memory"]
        own = memories[min(trainer.global_rank, len(memories) - 1)]
        restore_memory(self.network, own, "the checkpoint")

    def _require_same(self, found: dict[str, Any]) -> None:
        wanted = self.description()
        if found != wanted:
            raise MedsegError(
                f"the checkpoint was written under other schedules of the rates ({found}, now "
                f"{wanted}). Train into another directory with `run=DIR`."
            )

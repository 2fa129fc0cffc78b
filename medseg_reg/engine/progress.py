"""The progress bar of a training: one line an epoch, with the loss and the validation DICE."""

from __future__ import annotations

import sys
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm


class EpochBar(TQDMProgressBar):
    """Lightning's bar without its noise: no bar for the validation, no version number.

    Where the output is a file, it is refreshed a few times an epoch instead of at each batch.
    """

    def on_train_epoch_start(self, trainer: L.Trainer, *arguments: Any) -> None:
        """Start the bar of an epoch, numbered from 1."""
        super().on_train_epoch_start(trainer, *arguments)
        self.train_progress_bar.set_description(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        )
        if not sys.stdout.isatty():
            self._refresh_rate = max(1, int(self.total_train_batches) // 4)

    def init_validation_tqdm(self) -> Tqdm:
        """Return a bar that is not shown."""
        return Tqdm(disable=True)

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return loss and validation DICE."""
        shown = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in shown.items() if name != "v_num"}

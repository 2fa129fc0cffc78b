"""Checkpoints that survive a crash at any moment and from which a run goes on exactly.

A checkpoint holds weights, optimizer, loops, position in the data, random states and the best
score so far. It is written to a temporary file, flushed and renamed; the one before is kept.
Lightning alone replays the first epoch's order and random numbers after a resume.
"""

from __future__ import annotations

import io
import math
import os
import random
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from medseg_reg.engine.layer_memory import save_memory
from medseg_reg.engine.metrics_table import MetricsTable
from medseg_reg.engine.signals import StopRequest
from medseg_reg.errors import Interrupted, MedsegError
from medseg_reg.files import replacing, write_bytes

# Optimizer steps between two questions to the other processes whether to stop or save.
ASK_EVERY = 10
LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.safetensors"
# What layers remembered when the weights were best.
BEST_MEMORY = "best_memory.safetensors"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, and reads one without running code from it."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write a checkpoint; the last one becomes the previous one."""
        path = Path(path)
        # By way of memory, because torch's own writer tells a full disk from no other fault.
        content = io.BytesIO()
        torch.save(checkpoint, content)
        with replacing(path) as temporary:
            temporary.write_bytes(content.getbuffer())
            if path.exists():
                # A second name, not a move: at no moment is there no last checkpoint.
                spare = path.with_name(f".{PREVIOUS}.link")
                spare.unlink(missing_ok=True)
                try:
                    os.link(path, spare)
                except OSError:  # a file system without hard links
                    shutil.copyfile(path, spare)
                os.replace(spare, path.with_name(PREVIOUS))

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, plain types and tensors alone."""
        return read_checkpoint(Path(path), map_location)


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint; one that is damaged or that holds code is an error that names it."""
    try:
        content: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        # torch raises many types for a damaged file, none of which says which file it was.
        first = str(error).strip().split("\n")[0][:160]
        raise MedsegError(
            f"{path}: cannot be read as a checkpoint ({type(error).__name__}: {first})."
        ) from None
    return content


def usable_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that can be read, or None where there is none at all.

    Raises:
        MedsegError: there are checkpoints, and all are damaged.
    """
    candidates = [folder / name for name in (LAST, PREVIOUS) if (folder / name).exists()]
    problems = []
    for path in candidates:
        try:
            read_checkpoint(path)
        except MedsegError as error:
            problems.append(str(error))
            print(f"warning: {error} Trying the one before.")
        else:
            return path
    if problems:
        raise MedsegError(
            f"{problems[0]} No other is left: delete {folder.parent} to train from the start."
        )
    return None


class RunCheckpoint(Checkpoint):
    """Saves the state after each epoch, and on request between batches; keeps the best weights.

    It runs after all other callbacks, so the state includes what they did.

    Args:
        folder: where the checkpoints go.
        table: the table of the epochs' scores, which gets a row before each save.
        stop: asked after each batch whether the run is to stop.
        minutes: save between batches when the last save is older.
    """

    def __init__(
        self, folder: Path, table: MetricsTable, stop: StopRequest, minutes: float | None
    ) -> None:
        self.folder, self.table, self.stop = folder, table, stop
        self.seconds = float("inf") if minutes is None else 60 * minutes
        self.best_score, self.best_epoch = float("-inf"), -1
        self._saved = self._epoch_began = time.monotonic()
        self._random: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the best score so far and the table's rows."""
        return {
            "best_score": self.best_score,
            "best_epoch": self.best_epoch,
            "rows": self.table.rows,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the best score so far and the table's rows."""
        self.best_score = state_dict["best_score"]
        self.best_epoch = state_dict["best_epoch"]
        self.table.rows = list(state_dict["rows"])

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the random states of all processes."""
        checkpoint["random"] = gather_random_states(trainer)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Hold the random states back until training starts; setting up draws numbers."""
        self._random = checkpoint["random"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the random states; stop at once if early stopping had already decided so."""
        self.stop.install()
        self._saved = self._epoch_began = time.monotonic()
        if self._random is None:
            torch.manual_seed(torch.initial_seed() + trainer.global_rank)
        else:
            set_random_states(self._random, trainer.global_rank)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EarlyStopping) and callback.stopped_epoch:
                trainer.should_stop = True

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock of the epoch."""
        self._epoch_began = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save between batches when asked to stop or when it is time."""
        last = batch_idx + 1 >= trainer.num_training_batches
        between_steps = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if last or not between_steps:
            return
        step = (batch_idx + 1) // trainer.accumulate_grad_batches
        stopping, due = self._asked(trainer, step - 1)
        if stopping or due:
            self._require_finite(pl_module, trainer.current_epoch)
            self._save(trainer)
        if stopping:
            done = f"epoch {trainer.current_epoch + 1}, batch {batch_idx + 1}"
            raise Interrupted(f"{done}. {self._how_to_go_on()}")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Add the epoch to the table, keep the weights if they are the best, save."""
        epoch, scores = trainer.current_epoch, pl_module.epoch_scores
        self._require_finite(pl_module, epoch)
        if trainer.is_global_zero:
            self.table.add(epoch + 1, scores, time.monotonic() - self._epoch_began)
        score = scores.get(pl_module.selected_by)
        if score is not None:
            # Under the policy `nan` there may be no score at all, which any other beats.
            score = float("-inf") if math.isnan(score) else score
            if score > self.best_score or self.best_epoch < 0:
                self.best_score, self.best_epoch = score, epoch
                if trainer.is_global_zero:
                    save_memory(pl_module.network, self.folder / BEST_MEMORY)
                    save_weights(pl_module.network, self.folder / BEST)
        self._save(trainer)
        if epoch + 1 < (trainer.max_epochs or 0) and self._asked(trainer, 0)[0]:
            raise Interrupted(f"after epoch {epoch + 1}. {self._how_to_go_on()}")

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.folder / LAST)
        self._saved = time.monotonic()

    def _require_finite(self, pl_module: Any, epoch: int) -> None:
        """Never replace a good checkpoint by one from which no training can go on."""
        state = pl_module.network.state_dict()
        if not all(bool(torch.isfinite(v).all()) for v in state.values()):
            raise MedsegError(
                f"epoch {epoch + 1}: the weights are not finite numbers any more. Lower "
                "optimizer.lr, or set regularization.optimization.gradient_clip. The last "
                f"checkpoint in {self.folder} is kept."
            )

    def _asked(self, trainer: L.Trainer, step: int) -> tuple[bool, bool]:
        """Whether to stop, and whether it is time to save; the same answer in all processes."""
        own = [self.stop.requested, time.monotonic() - self._saved > self.seconds]
        if trainer.world_size == 1:
            return own[0], own[1]
        if step % ASK_EVERY:
            return False, False
        answers = torch.tensor(own, dtype=torch.int32, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(answers, torch.distributed.ReduceOp.MAX)
        return bool(answers[0]), bool(answers[1])

    def _how_to_go_on(self) -> str:
        return f"A checkpoint is in {self.folder}; run the same command again to go on."


def gather_random_states(trainer: L.Trainer) -> dict[str, Any]:
    """Return the random states as tensors and plain types; torch's for each process."""
    own = torch.get_rng_state()
    drawn = np.random.get_state(legacy=False)["state"]
    state = {
        "torch": _of_all_processes(trainer, own),
        "numpy": [drawn["key"].tolist(), int(drawn["pos"])],
        "python": list(random.getstate()[1]),
    }
    if trainer.strategy.root_device.type == "cuda":
        state["cuda"] = _of_all_processes(trainer, torch.cuda.get_rng_state())
    return state


def set_random_states(state: dict[str, Any], rank: int) -> None:
    """Set the random states that `gather_random_states` returned."""
    torch.set_rng_state(_of_process(state["torch"], rank))
    keys, position = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, 0, 0.0))
    random.setstate((3, tuple(state["python"]), None))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_of_process(state["cuda"], rank))


def _of_process(states: Tensor, rank: int) -> Tensor:
    # A copy: torch reads the state from the start of the storage, which of a row is another's.
    return states[min(rank, len(states) - 1)].cpu().clone()


def _of_all_processes(trainer: L.Trainer, own: Tensor) -> Tensor:
    if trainer.world_size == 1:
        return own[None]
    own = own.to(trainer.strategy.root_device)
    gathered = [torch.empty_like(own) for _ in range(trainer.world_size)]
    torch.distributed.all_gather(gathered, own)
    return torch.stack(gathered).cpu()


def save_weights(network: nn.Module, path: Path) -> None:
    """Write the weights of a network as safetensors, whole or not at all."""
    save_tensors(network.state_dict(), path)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors by name as safetensors, whole or not at all."""
    weights: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        # A tensor that a network has under two names (MONAI's DynUNet) is written twice.
        weights[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    write_bytes(path, save(weights))


def load_weights(network: nn.Module, path: Path) -> None:
    """Read the weights of a network; the error for a wrong or damaged file names it."""
    try:
        network.load_state_dict(load_file(path))
    except FileNotFoundError:
        raise MedsegError(f"{path}: does not exist. Has the training been finished?") from None
    except (SafetensorError, RuntimeError, OSError) as error:
        first = " ".join(str(error).split())[:160]
        raise MedsegError(f"{path}: does not hold the weights of this network ({first}).") from None

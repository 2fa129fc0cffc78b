"""A pre-training without labels: a masked autoencoder on the slices of a store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medseg_reg.config import RunConfig
from medseg_reg.config_pretraining import PretrainingConfig, load_pretraining
from medseg_reg.data.dataset import SliceDataset
from medseg_reg.data.ignored import require_ignored
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.beginning import (
    begin,
    data_of_run,
    note_data,
    nothing_left_behind,
    require_machine,
)
from medseg_reg.engine.checkpoint import save_tensors
from medseg_reg.engine.fit import seed_everything, train
from medseg_reg.engine.metrics_table import MetricsTable
from medseg_reg.engine.network import build_plain_network, load_run_pretrained
from medseg_reg.engine.origins import weights_origin
from medseg_reg.engine.ranks import is_first_process
from medseg_reg.engine.reconstructions import write_reconstructions
from medseg_reg.engine.run_directory import DataFacts, RunDirectory
from medseg_reg.engine.training_module import TrainingModule
from medseg_reg.files import read_json, wait_for, write_json
from medseg_reg.networks.build import check_input_size
from medseg_reg.networks.masked_autoencoder import MaskedAutoencoder, reconstruction_loss
from medseg_reg.networks.pretrained import PretrainedReport
from medseg_reg.networks.token_encoder import token_encoder

# The error on held-out slices, and that of one constant patch in the place of each hidden one.
SCORES = ("val_loss", "val_mean_patch")


class PretrainingDirectory(RunDirectory):
    """The run directory of a pre-training; its weights are those of the encoder.

    summary.json          error on the validation slices, and that of a constant patch
    reconstructions.png   slices, what is visible of them, and what was filled in
    """

    kind, command = "pre-training", "pretrain"

    @property
    def summary(self) -> Path:
        """The errors."""
        return self.path / "summary.json"

    def _load(self, path: Path) -> RunConfig:
        return load_pretraining(path)


class PretrainingModule(TrainingModule):
    """A masked autoencoder and its error.

    A validation hides the same patches each time, so that its epochs can be compared.

    Args:
        network: the autoencoder.
        config: the run's configuration.
    """

    network: MaskedAutoencoder

    def __init__(self, network: MaskedAutoencoder, config: PretrainingConfig) -> None:
        super().__init__(network, config)
        # Sums over batches of the two scores, each times its hidden patches, and of these.
        self.val_sums = torch.zeros(3, dtype=torch.float64)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the error of a batch; stop the run if it is not a number."""
        image = self._image(batch)
        prediction, hidden = (self.compiled or self.network)(image)
        loss = reconstruction_loss(prediction, self.network.targets(image), hidden)
        return self.counted(loss, batch, batch_idx)

    def on_validation_epoch_start(self) -> None:
        """Begin to count."""
        self.val_sums.zero_()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Add the errors of a batch, and those of its own mean patch, the best constant."""
        image = self._image(batch)
        with same_masks(image.device, batch_idx):
            prediction, hidden = self.network(image)
        target = self.network.targets(image)
        mean = target[hidden].mean(0).expand_as(target)
        losses = [float(reconstruction_loss(one, target, hidden)) for one in (prediction, mean)]
        count = int(hidden.sum())
        self.val_sums += torch.tensor([*(loss * count for loss in losses), count])

    def on_validation_epoch_end(self) -> None:
        """Log the mean over the hidden patches of all slices."""
        sums = self._over_processes(self.val_sums).tolist()
        for name, value in zip(SCORES, sums, strict=False):
            self.epoch_scores[name] = value / sums[2]
            self.log(name, self.epoch_scores[name], prog_bar=name == "val_loss")


@contextmanager
def same_masks(device: torch.device, number: int) -> Iterator[None]:
    """Draw what a number decides in a block; the random numbers after it are as without it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(number)
        yield


def pretrain(config: PretrainingConfig) -> PretrainingDirectory:
    """Pre-train, or go on where an interrupted run stopped; a finished run is left as it is.

    Raises:
        MedsegError: something in configuration, data or run directory is wrong.
        Interrupted: a signal asked to stop; a checkpoint is kept.
    """
    run = PretrainingDirectory(config.run_path)
    config = run.goes_on_with(config)
    store = SliceStore(config.data.store)
    if run.is_done(config, store):
        return run
    if config.data.ignore_label is not None:  # not needed here, but a wrong one is told
        require_ignored(store, config.data.ignore_label)
    fresh = not run.path.exists()
    splits, data, facts = data_of_run(run, config, store)
    seed_everything(config.seed)
    example = data.train[0]["image"][None]
    network, pretrained = build_autoencoder(config, facts, tuple(example.shape[2:]), run.begun)
    origin = weights_origin(config, splits, store, judged=False) if pretrained else None
    require_machine(config)
    if is_first_process():
        begin(run, config, network, data, pretrained, origin, copies=1)
        note_data(run, facts, data)
    else:
        wait_for(run.path / "splits.json")
    module = PretrainingModule(network, config)
    with nothing_left_behind(run, fresh):
        trainer = train(run, config, module, data, own=[], scores=SCORES)
        if trainer.is_global_zero:
            _finish(run, module, data.val)
        trainer.strategy.barrier()
    return run


def build_autoencoder(
    config: PretrainingConfig, facts: DataFacts, size: tuple[int, ...], begun: bool = False
) -> tuple[MaskedAutoencoder, PretrainedReport | None]:
    """Build the autoencoder of a configuration, with new weights or those of a file.

    Args:
        config: of the run.
        facts: of its data.
        size: rows and columns of the images.
        begun: whether its weights are in a checkpoint already, so that no file is needed.

    Raises:
        MedsegError: the network cannot be pre-trained so.
    """
    network = build_plain_network(config.network, facts)
    check_input_size(network, facts.channels, size)
    report = None if begun else load_run_pretrained(network, config)
    factor = int(network.factor)
    masking = dict(config.masking)
    encoder = token_encoder(network)
    return MaskedAutoencoder(encoder, facts.channels, size, factor=factor, **masking), report


def _finish(run: PretrainingDirectory, module: PretrainingModule, held_out: SliceDataset) -> None:
    """Write what a finished run has; the weights last, because they say that it is finished."""
    network = module.network.cpu().eval()
    with same_masks(torch.device("cpu"), 0):
        write_reconstructions(network, held_out, run.path / "reconstructions.png")
    rows = MetricsTable.read(run.path / "metrics.csv")
    last = next(row for row in reversed(rows) if SCORES[0] in row)
    visible = network.patches - network.hidden_patches
    summary = {"epoch": int(last["epoch"]), **{name: last[name] for name in SCORES}}
    write_json(run.summary, {**summary, "patches": network.patches, "visible": visible})
    save_tensors(network.encoder.weights(), run.weights)


def headline(run: PretrainingDirectory) -> str:
    """Say in a few lines how well patches are filled in, and what to do with the weights."""
    found = read_json(run.summary)
    return (
        f"run directory: {run.path}\n"
        f"{found['visible']} of {found['patches']} patches visible; error on the others, on "
        f"validation slices: {found['val_loss']:.4f}, of a constant patch "
        f"{found['val_mean_patch']:.4f}. See reconstructions.png.\n"
        f"Train with network.pretrained={run.weights}"
    )

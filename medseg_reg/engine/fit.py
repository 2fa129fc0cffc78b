"""One training run, from a configuration to a finished run directory."""

from __future__ import annotations

import logging
import random
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn

from medseg_reg.config import Config, RunConfig
from medseg_reg.config_network import ForeignSpec
from medseg_reg.data.ignored import require_ignored
from medseg_reg.data.mix_token import MixToken
from medseg_reg.data.module import SliceDataModule
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.beginning import (
    begin,
    data_of_run,
    first_weights,
    note_data,
    nothing_left_behind,
    require_machine,
)
from medseg_reg.engine.checkpoint import (
    BEST,
    BEST_MEMORY,
    AtomicCheckpointIO,
    RunCheckpoint,
    save_weights,
    usable_checkpoint,
)
from medseg_reg.engine.coarse import keep_coarse, load_coarse
from medseg_reg.engine.compiling import told_in_a_line
from medseg_reg.engine.distillation import (
    Distillation,
    check_teacher_size,
    load_teacher,
    same_teacher,
)
from medseg_reg.engine.layer_memory import save_memory
from medseg_reg.engine.metrics_table import SCORES, MetricsTable
from medseg_reg.engine.module import SegmentationModule
from medseg_reg.engine.network import build_run_network, own_rates_note
from medseg_reg.engine.precision import choose_accelerator, choose_precision
from medseg_reg.engine.progress import EpochBar
from medseg_reg.engine.ranks import is_first_process
from medseg_reg.engine.regularization import RegularizationControl
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.engine.signals import StopRequest
from medseg_reg.engine.training_module import TrainingModule
from medseg_reg.errors import Interrupted, MedsegError
from medseg_reg.files import replacing, wait_for, write_json
from medseg_reg.insertion import measure
from medseg_reg.losses import MixedLoss, ms_ssim_note
from medseg_reg.networks.build import Network, check_input_size, parameter_count
from medseg_reg.networks.token_labels import finest_patch


def fit(config: Config) -> RunDirectory:
    """Train, or go on where an interrupted run stopped; a finished run is left as it is.

    Raises:
        MedsegError: something in configuration, data or run directory is wrong.
        Interrupted: a signal asked to stop; a checkpoint is kept.
    """
    run = RunDirectory(config.run_path)
    config = run.goes_on_with(config)
    store = SliceStore(config.data.store)
    if run.is_done(config, store):
        return run
    require_ignored(store, config.data.ignore_label)
    fresh = not run.path.exists()
    splits, data, facts = data_of_run(run, config, store)
    distillation = load_teacher(config, facts, splits, store)
    coarse = load_coarse(run, config, facts, splits, store)
    seed_everything(config.seed)  # after these two, which draw numbers
    network, entries = build_run_network(config, facts, coarse)
    placements = [placement for entry in entries for placement in entry.placements]
    example = data.train[0]["image"][None]
    size = tuple(example.shape[2:])
    _require_trainable(config, network, distillation, (facts.channels, *size))
    data.mixing = _mixing(config, network, (1, facts.channels, *size))
    loss = _loss(config, len(facts.classes))
    report = run.path / "placement.json"
    teacher = same_teacher(distillation, run.path / "teacher.json")
    pretrained, origin = first_weights(run, network, config, splits, store)
    if is_first_process():
        if not report.exists():
            measure(network, example, placements)
        begin(run, config, network, data, pretrained, origin, teacher)
        keep_coarse(run, config, splits, store)
        note_data(run, facts, data)
        if not report.exists():
            write_json(report, [p.as_dict() for p in placements])
    else:
        wait_for(report)
    module = SegmentationModule(network, loss, config, splits.val, len(facts.classes), distillation)
    control = RegularizationControl(network, entries, config.seed, config.data.ignore_label)
    own = [control, *_stopping(config)]
    with nothing_left_behind(run, fresh):
        trainer = train(run, config, module, data, own, [*_notes(config, network, loss, size)])
        if trainer.is_global_zero:
            keep_weights(run, config, module)
        trainer.strategy.barrier()
    return run


def _require_trainable(
    config: Config, network: Network, distillation: Distillation | None, shape: Sequence[int]
) -> None:
    """Refuse images of a shape (C, H, W), or a machine, on which nothing can be trained."""
    check_input_size(network, shape[0], shape[1:], config.data.batch_size)
    if distillation is not None:
        check_teacher_size(distillation.teacher, distillation.spec, shape[0], shape[1:])
    require_machine(config)


def _mixing(config: Config, network: nn.Module, shape: Sequence[int]) -> MixToken | None:
    """Return what mixes the batches of a training, if anything does."""
    spec, key = config.regularization.mix_token, "regularization.mix_token"
    if spec is None:
        return None
    if spec.patch is not None:
        return MixToken(spec.p, spec.alpha, (spec.patch, spec.patch))
    try:
        return MixToken(spec.p, spec.alpha, finest_patch(network, shape, key))
    except MedsegError as error:
        raise MedsegError(f"{error} Or give {key}.patch, as 16.") from None


def train(
    run: RunDirectory,
    config: RunConfig,
    module: TrainingModule,
    data: SliceDataModule,
    own: Sequence[Callback],
    notes: Sequence[str] = (),
    scores: Sequence[str] = SCORES,
) -> L.Trainer:
    """Train from the last checkpoint, or from the start, to the end.

    Args:
        run: where checkpoints and metrics go.
        config: of the run.
        module: what is trained.
        data: the loaders.
        own: callbacks beside those that every training has.
        notes: what is told at the start, by one process.
        scores: columns that the table of the epochs has in any case.

    Returns:
        The trainer, after its work.
    """
    module.network.to(memory_format=module.memory_format)
    with StopRequest() as stop, told_in_a_line():
        saving = RunCheckpoint(
            run.checkpoints,
            MetricsTable(run.path / "metrics.csv", scores),
            stop,
            config.training.checkpoint_minutes,
        )
        trainer = make_trainer(run, config, [*own, saving])
        if trainer.is_global_zero:
            if config.training.compile:
                tuned = config.training.compile == "max-autotune"
                time_needed = "some minutes" if tuned else "up to a minute"
                print(f"note: training.compile: the first step compiles, for {time_needed}")
            for note in (*(one["said"] for one in run.learned_from()), *notes):
                print(f"note: {note}")
            run.write_environment(
                precision=str(trainer.precision),
                memory_format=str(module.memory_format).removeprefix("torch."),
                devices=trainer.num_devices * trainer.num_nodes,
                parameters=parameter_count(module.network),
                started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            )
        checkpoint = usable_checkpoint(run.checkpoints)
        try:
            trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        except SIGTERMException:
            raise Interrupted(
                f"before the next checkpoint; those in {run.checkpoints} are kept, and the same "
                "command goes on from there."
            ) from None
    return trainer


def keep_weights(run: RunDirectory, config: RunConfig, module: TrainingModule) -> None:
    """Write the weights that the configuration selects, and what layers remember."""
    best = run.checkpoints / BEST
    if config.regularization.optimization.select == "best" and best.exists():
        if (memory := run.checkpoints / BEST_MEMORY).exists():
            with replacing(run.memory) as temporary:
                shutil.copyfile(memory, temporary)
        # Last, because its presence says that the training is done.
        with replacing(run.weights) as temporary:
            shutil.copyfile(best, temporary)
    else:
        save_memory(module.network, run.memory)
        save_weights(module.network, run.weights)


def _stopping(config: Config) -> list[Callback]:
    """Return the callback that stops early, if that is asked for."""
    stopping = config.regularization.optimization.early_stopping
    if stopping is None:
        return []
    return [
        EarlyStopping(
            stopping.monitor,
            min_delta=stopping.min_delta,
            patience=stopping.patience,
            mode="min" if stopping.monitor == "val_loss" else "max",
            check_finite=False,
        )
    ]


def make_trainer(run: RunDirectory, config: RunConfig, own: Sequence[Callback]) -> L.Trainer:
    """Return Lightning's trainer for a run, with our `own` callbacks."""
    spec, optimization = config.training, config.regularization.optimization
    accelerator = choose_accelerator(spec.accelerator)
    callbacks = [*own]
    if spec.progress:
        callbacks.append(EpochBar())
    _quieten()
    return L.Trainer(
        accelerator=accelerator,
        devices=spec.devices,
        num_nodes=spec.num_nodes,
        strategy=_strategy(config),
        precision=choose_precision(spec.precision, accelerator),
        max_epochs=spec.epochs,
        accumulate_grad_batches=spec.accumulate,
        gradient_clip_val=optimization.gradient_clip,
        check_val_every_n_epoch=spec.validate_every,
        deterministic=spec.deterministic,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=TensorBoardLogger(run.path, name="", version="tensorboard"),
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        use_distributed_sampler=False,
        enable_progress_bar=spec.progress,
        enable_model_summary=False,
    )


def _strategy(config: RunConfig) -> str:
    if config.training.devices * config.training.num_nodes == 1:
        return "auto"
    # Some have stages of an encoder that their decoder does not read.
    foreign = isinstance(config.network, ForeignSpec)
    return "ddp_find_unused_parameters_true" if foreign else "ddp"


def _loss(config: Config, classes: int) -> MixedLoss:
    error = config.regularization.error
    for key in ("class_weights", "region_weights"):
        weights = getattr(error, key)
        if weights is not None and len(weights) != classes:
            raise MedsegError(
                f"regularization.error.{key}: {len(weights)} weights for {classes} classes. "
                "Give one for each, the background first."
            )
    return MixedLoss(**error.arguments, ignore=config.data.ignore_label)


def _notes(config: Config, network: Network, loss: MixedLoss, size: Sequence[int]) -> Iterator[str]:
    """Give what is to be told of a training on images of a size."""
    if note := own_rates_note(config.network, network):
        yield note
    if "ms_ssim" in loss.weights and (note := ms_ssim_note(size)):
        yield f"regularization.error.ms_ssim: {note}"


def seed_everything(seed: int) -> None:
    """Set the random states from which new weights are drawn."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _quieten() -> None:
    """Leave out Lightning's advertisements and advice that does not apply here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in (
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists.*",
        ".*smaller than the logging interval.*",
        ".*in eval mode at the start of training.*",
        ".*not pin.*",
        # Scores are summed over the processes before they are logged.
        ".*sync_dist=True.*",
        ".*isinstance.treespec, LeafSpec.*",
    ):
        warnings.filterwarnings("ignore", text)

"""The training of a classifier of slices: which classes does a slice show?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medseg_reg.config import RunConfig
from medseg_reg.config_classification import ClassificationConfig, load_classification
from medseg_reg.data.dataset import SliceDataset
from medseg_reg.data.ignored import require_ignored
from medseg_reg.data.splits import Splits
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.beginning import (
    begin,
    data_of_run,
    first_weights,
    note_data,
    nothing_left_behind,
    require_machine,
)
from medseg_reg.engine.checkpoint import load_weights
from medseg_reg.engine.distillation import check_teacher_size, same_teacher, teacher_network
from medseg_reg.engine.fit import keep_weights, seed_everything, train
from medseg_reg.engine.presence_distillation import PresenceDistillation, SegmentationTeacher
from medseg_reg.engine.ranks import is_first_process
from medseg_reg.engine.run_directory import DataFacts, RunDirectory
from medseg_reg.engine.training_module import TrainingModule
from medseg_reg.errors import MedsegError
from medseg_reg.files import wait_for
from medseg_reg.losses import presence_bce, presence_targets
from medseg_reg.metrics import auroc, average_precision
from medseg_reg.networks.slice_classifier import (
    both_logits,
    build_classifier,
    has_distillation_token,
)

# Means over the classes, from all validation slices at once.
SCORES = ("val_loss", "val_auroc", "val_average_precision")


class ClassificationDirectory(RunDirectory):
    """The run directory of a classifier.

    evaluation/   per_patient.csv, per_slice.csv
    """

    kind, command = "classification", "classify"

    def _load(self, path: Path) -> RunConfig:
        return load_classification(path)


class ClassificationModule(TrainingModule):
    """A classifier, its loss, and the scores of its validation.

    Labels of a training batch are made from its masks, after the augmentation; those of the
    validation from the masks of the store.

    Args:
        network: maps images to logits (B, K); in training also to two of them, see
            `build_classifier`.
        config: the run's configuration.
        val: the validation slices.
        weights: of the classes, see `balance_weights`.
        distillation: what a teacher adds to the loss.
    """

    selected_by = "val_average_precision"

    def __init__(
        self,
        network: nn.Module,
        config: ClassificationConfig,
        val: SliceDataset,
        weights: Tensor | None = None,
        distillation: PresenceDistillation | None = None,
    ) -> None:
        super().__init__(network, config)
        self.presence, self.ignore = config.presence, config.data.ignore_label
        self.classes = len(val.store.classes) - 1
        self.class_weights, self.distillation = weights, distillation
        self.val_rows = {item: row for row, item in enumerate(val.items)}
        self.val_targets = presence_table(val, self.presence.pixels)
        self.val_logits = torch.zeros(0)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the loss of a batch; stop the run if it is not a number."""
        image = self._image(batch)
        logits, taught = both_logits((self.compiled or self.network)(image))
        targets = presence_targets(batch["mask"], self.classes, self.ignore, self.presence.pixels)
        loss = self._loss(logits, targets)
        mixed = None
        if self.distillation is not None:
            mixed = self.distillation.mixed(loss, image, targets, taught)
        return self.counted(loss, batch, batch_idx, mixed)

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        weights = self.class_weights
        return presence_bce(logits, targets, None if weights is None else weights.to(logits.device))

    def on_validation_epoch_start(self) -> None:
        """Begin with no logits; each process fills in those of its slices."""
        self.val_logits = torch.zeros(self.val_targets.shape, device=self.device)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Keep the logits of a batch of slices."""
        pairs = zip(batch["case"].tolist(), batch["slice"].tolist(), strict=True)
        rows = [self.val_rows[pair] for pair in pairs]
        self.val_logits[rows] = self.network(self._image(batch)).float()

    def on_validation_epoch_end(self) -> None:
        """Log the loss, and the means over the classes of AUROC and average precision."""
        logits = self._over_processes(self.val_logits).cpu()
        pairs = list(zip(logits.T.numpy(), self.val_targets.T.numpy(), strict=True))
        values = (
            float(self._loss(logits, self.val_targets)),
            _mean([auroc(*pair) for pair in pairs]),
            _mean([average_precision(*pair) for pair in pairs]),
        )
        self.epoch_scores = dict(zip(SCORES, values, strict=True))
        for name, value in self.epoch_scores.items():
            self.log(name, value, prog_bar=name == self.selected_by)


def _mean(values: list[float]) -> float:
    """Return the mean of what is a number, NaN if nothing is."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def classify(config: ClassificationConfig) -> ClassificationDirectory:
    """Train, or go on where an interrupted run stopped; a finished run is left as it is.

    Raises:
        MedsegError: something in configuration, data or run directory is wrong.
        Interrupted: a signal asked to stop; a checkpoint is kept.
    """
    run = ClassificationDirectory(config.run_path)
    config = run.goes_on_with(config)
    store = SliceStore(config.data.store)
    if run.is_done(config, store):
        return run
    require_ignored(store, config.data.ignore_label)
    fresh = not run.path.exists()
    splits, data, facts = data_of_run(run, config, store)
    weights = (
        balance_weights(data.train, config.presence.pixels) if config.presence.balance else None
    )
    distillation = _distillation(config, facts, splits, store, weights)
    seed_everything(config.seed)  # after the teacher, which draws numbers
    network = build_run_classifier(config, facts)
    _require_taught(config, network)
    require_machine(config)
    teacher = same_teacher(distillation, run.path / "teacher.json")
    pretrained, origin = first_weights(run, network, config, splits, store)
    if is_first_process():
        begin(run, config, network, data, pretrained, origin, teacher)
        note_data(run, facts, data)
    else:
        wait_for(run.path / "splits.json")
    module = ClassificationModule(network, config, data.val, weights, distillation)
    with nothing_left_behind(run, fresh):
        trainer = train(run, config, module, data, own=[], scores=SCORES)
        if trainer.is_global_zero:
            keep_weights(run, config, module)
        trainer.strategy.barrier()
    return run


def build_run_classifier(config: ClassificationConfig, facts: DataFacts) -> Any:
    """Build the classifier of a configuration, with new weights; one logit a foreground class."""
    spec, classes = config.network, len(facts.classes) - 1
    # The configuration sees to it that there is a size.
    size = config.data.image.size or ()
    return build_classifier(spec.name, facts.channels, classes, size, **spec.arguments)


def load_run_classifier(run: ClassificationDirectory) -> Any:
    """Return the trained classifier of a finished run, in evaluation mode.

    Raises:
        MedsegError: the training is not finished, or a file is damaged.
    """
    config: Any = run.config()
    run.require_finished()
    network = build_run_classifier(config, run.data_facts())
    load_weights(network, run.weights)
    return network.eval()


def presence_table(data: SliceDataset, pixels: int = 1) -> Tensor:
    """Return which classes the slices of a data set show, by the masks as they are stored.

    Returns:
        (slices, foreground classes), in the order of `data.items`, see `presence_targets`.
    """
    store = data.store
    classes, ignore = len(store.classes) - 1, store.ignore_label
    rows = []
    masks: dict[int, Any] = {}
    for case, number in data.items:
        if case not in masks:  # one at a time: they are files
            masks = {case: store.mask(data.cases[case])}
        labels = torch.from_numpy(np.array(masks[case][number]))[None]
        rows.append(presence_targets(labels, classes, ignore, pixels))
    return torch.cat(rows)


def balance_weights(data: SliceDataset, pixels: int = 1) -> Tensor:
    """Return for each class the number of slices without it over that of slices with it.

    With this weight of the slices that show a class, both kinds weigh the same in the loss. A class
    of which there is one kind alone has the weight 1.

    Returns:
        (foreground classes,), float32.
    """
    table = presence_table(data, pixels)
    with_it, without = (table == 1).sum(0), (table == 0).sum(0)
    weights = without / with_it.clamp_min(1)
    return torch.where((with_it > 0) & (without > 0), weights, torch.ones(()))


def _distillation(
    config: ClassificationConfig,
    facts: DataFacts,
    splits: Splits,
    store: SliceStore,
    weights: Tensor | None,
) -> PresenceDistillation | None:
    """Return what the teacher that a configuration names adds to the loss."""
    spec, size = config.regularization.error.distillation, config.data.image.size
    if spec is None:
        return None
    network, origin = teacher_network(config, facts, splits, store)
    check_teacher_size(network, spec, facts.channels, size or ())
    teacher = SegmentationTeacher(network, config.presence.pixels)
    return PresenceDistillation(teacher, spec, weights, origin)


def _require_taught(config: ClassificationConfig, network: Any) -> None:
    """Refuse a distillation token of which nothing is asked: its new head would be averaged in."""
    spec = config.regularization.error.distillation
    if has_distillation_token(network) and (spec is None or spec.weight == 0):
        raise MedsegError(
            f"network: {config.network.name} has a distillation token, but there is no teacher to "
            "learn from. Name one by regularization.error.distillation, or take the network of "
            "that name without `distilled`."
        )

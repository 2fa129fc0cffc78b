"""What every training begins with: its data, its first weights, and the files that come first."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from medseg_reg.config import RunConfig
from medseg_reg.data.module import SliceDataModule
from medseg_reg.data.splits import Splits, make_splits
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.compiling import require_compilable
from medseg_reg.engine.network import load_run_pretrained
from medseg_reg.engine.origins import Origin, weights_origin
from medseg_reg.engine.precision import choose_accelerator, choose_precision
from medseg_reg.engine.ranks import is_first_process
from medseg_reg.engine.run_directory import DataFacts, RunDirectory
from medseg_reg.engine.seen import Seen
from medseg_reg.errors import Interrupted, MedsegError
from medseg_reg.files import require_space, write_json
from medseg_reg.networks.build import parameter_count
from medseg_reg.networks.pretrained import PretrainedReport


def data_of_run(
    run: RunDirectory, config: RunConfig, store: SliceStore
) -> tuple[Splits, SliceDataModule, DataFacts]:
    """Return the split, the loaders and the facts; a run that has begun keeps its split."""
    splits = run.splits(store) or make_splits(store, config.data.split)
    data = data_module(config, store, splits)
    return splits, data, DataFacts.of(store, data.channels)


def first_weights(
    run: RunDirectory, network: nn.Module, config: RunConfig, splits: Splits, store: SliceStore
) -> tuple[PretrainedReport | None, Origin | None]:
    """Load pretrained weights where a configuration names any; say where they come from.

    A run that goes on has its weights in its checkpoint.
    """
    pretrained = None if run.begun else load_run_pretrained(network, config)
    return pretrained, weights_origin(config, splits, store) if pretrained else None


def begin(
    run: RunDirectory,
    config: RunConfig,
    network: nn.Module,
    data: SliceDataModule,
    pretrained: PretrainedReport | None,
    origin: Origin | None,
    teacher: dict[str, Any] | None = None,
    copies: int = 2,
) -> None:
    """Look at what can still be wrong, then write what a run begins with; for one process.

    Args:
        run: the run.
        config: of it.
        network: that is trained.
        data: the loaders.
        pretrained: what was taken of pretrained weights.
        origin: what is known of these.
        teacher: what the run notes of its teacher.
        copies: how often the weights alone are kept.
    """
    data.train_dataloader()
    # Weights and Adam's two moments in two checkpoints.
    require_space(run.path, 4 * parameter_count(network) * (2 * 3 + copies))
    # All that can be wrong has been looked at: from here on, files are written.
    run.prepare(config)
    run.note_pretrained(pretrained, origin.as_dict() if origin else None)
    if teacher is not None:
        write_json(run.path / "teacher.json", teacher)


def note_data(run: RunDirectory, facts: DataFacts, data: SliceDataModule) -> None:
    """Write down which data a run has, how they are divided, and what it sees of them."""
    run.begin(facts, data.store)
    Seen.of(data.store, data.splits, data.slices_per_epoch).write(run.path)
    data.splits.write(run.path / "splits.json")


def data_module(config: RunConfig, store: SliceStore, splits: Splits) -> SliceDataModule:
    """Return the loaders of a configuration."""
    return SliceDataModule(
        store,
        splits,
        image=config.data.image,
        sampling=config.data.sampling,
        augmentation=[(a.name, a.arguments) for a in config.regularization.data],
        batch_size=config.data.batch_size,
        workers=config.data.workers,
        seed=config.seed,
        resident=config.data.resident,
    )


def require_machine(config: RunConfig) -> None:
    """Refuse a machine that cannot do what a configuration asks for."""
    accelerator = choose_accelerator(config.training.accelerator)
    choose_precision(config.training.precision, accelerator)
    require_compilable(config.training.compile, accelerator)


@contextmanager
def nothing_left_behind(run: RunDirectory, fresh: bool) -> Iterator[None]:
    """Take a `fresh` run away that fails before there is anything to go on from.

    It would refuse a repaired configuration.
    """
    try:
        yield
    except Interrupted:
        raise
    except MedsegError:
        if fresh and is_first_process() and not run.begun:
            shutil.rmtree(run.path)
        raise

"""Train a network, evaluate it, and leave everything in a run directory.

    python -m medseg_reg.train --config configs/demo.yaml
    python -m medseg_reg.train --config configs/pancreas.yaml seed=1 training.devices=2

The same command again goes on where an interrupted run stopped, and leaves a finished run as it
is. Any key of the configuration can be overridden: `key.sub=value`, `list.0.key=value`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from medseg_reg.errors import MedsegError, run_main

if TYPE_CHECKING:
    from medseg_reg.config import RunConfig


def main(arguments: Sequence[str], own_process: bool = False) -> None:
    """Parse the command line, train, evaluate.

    Args:
        arguments: the words of the command line.
        own_process: whether the process is there for this training alone, so that its allocator
            and its number of threads may be set.
    """
    parsed = parse(arguments, "train", __doc__ or "", "configs/")
    # Imported here: they take seconds, and --help needs none of them.
    from medseg_reg.config import load_config
    from medseg_reg.engine.fit import fit
    from medseg_reg.engine.ranks import is_first_process
    from medseg_reg.inference.evaluation import evaluate, headline

    config = load_config(parsed.config, parsed.overrides)
    make_ready(config, own_process)
    run = fit(config)
    if is_first_process():
        print(headline(run, evaluate(run)))


def parse(arguments: Sequence[str], command: str, about: str, folder: str) -> argparse.Namespace:
    """Parse the command line of a command that takes a configuration and overrides.

    Args:
        arguments: the words of the command line.
        command: its module.
        about: a text whose first line says what it does.
        folder: where its configurations lie.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m medseg_reg.{command}", description=about.split("\n")[0]
    )
    parser.add_argument("--config", type=Path, required=True, help=f"a YAML file, as in {folder}")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    return parser.parse_intermixed_args(arguments)


def make_ready(config: RunConfig, own_process: bool) -> None:
    """Make the phantom of a configuration, and set allocator and threads of a process of its own.

    Args:
        config: of the training that comes.
        own_process: whether the process is there for this training alone.

    Raises:
        MedsegError: see `make_phantom`.
    """
    from medseg_reg.engine.host import prepare_process  # seconds, which --help does not need

    make_phantom(config)
    if own_process:
        prepare_process(config.training.keep_memory)


def make_phantom(config: RunConfig) -> None:
    """Generate and convert the phantom of a configuration where its store is missing.

    Raises:
        MedsegError: the store holds other data, or a phantom of other numbers.
    """
    spec, store = config.data.phantom, config.data.store
    if spec is None:
        return
    # Imported here: a run on real data needs no converter.
    from data_prep.phantom import make_demo

    try:
        make_demo(store, **spec.model_dump())
    except MedsegError as error:
        hint = "\nTo train on what is there, set data.phantom=null." if store.exists() else ""
        raise MedsegError(f"data.phantom: {error}{hint}") from None


def command() -> None:
    """Run as the installed command `medseg-train`."""
    run_main(partial(main, own_process=True))


if __name__ == "__main__":
    command()

"""Pre-train the transformer of a network without labels: a masked autoencoder.

    python -m medseg_reg.pretrain --config configs/pretraining/bagls_small_unetr.yaml
    python -m medseg_reg.train --config configs/bagls_small_unetr.yaml \
        network.pretrained=runs/pretraining/bagls_small_unetr/weights.safetensors

The same command again goes on where an interrupted run stopped, and leaves a finished run as it
is. Any key of the configuration can be overridden: `key.sub=value`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from medseg_reg.errors import run_main
from medseg_reg.train import make_ready, parse


def main(arguments: Sequence[str], own_process: bool = False) -> None:
    """Parse the command line, pre-train, and say how well it went.

    Args:
        arguments: the words of the command line.
        own_process: whether the process is there for this training alone, so that its allocator
            and its number of threads may be set.
    """
    parsed = parse(arguments, "pretrain", __doc__ or "", "configs/pretraining/")
    # Imported here: they take seconds, and --help needs none of them.
    from medseg_reg.config_pretraining import load_pretraining
    from medseg_reg.engine.pretraining import headline, pretrain
    from medseg_reg.engine.ranks import is_first_process

    config = load_pretraining(parsed.config, parsed.overrides)
    make_ready(config, own_process)
    run = pretrain(config)
    if is_first_process():
        print(headline(run))


def command() -> None:
    """Run as the installed command `medseg-pretrain`."""
    run_main(partial(main, own_process=True))


if __name__ == "__main__":
    command()

"""Train a classifier that says which classes a slice shows, and score it.

    python -m medseg_reg.classify --config configs/classification/hippocampus.yaml

The same command again goes on where an interrupted run stopped, and leaves a finished run as it
is. Any key of the configuration can be overridden: `key.sub=value`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from medseg_reg.errors import run_main
from medseg_reg.train import make_ready, parse


def main(arguments: Sequence[str], own_process: bool = False) -> None:
    """Parse the command line, train, evaluate.

    Args:
        arguments: the words of the command line.
        own_process: whether the process is there for this training alone, so that its allocator
            and its number of threads may be set.
    """
    parsed = parse(arguments, "classify", __doc__ or "", "configs/classification/")
    # Imported here: they take seconds, and --help needs none of them.
    from medseg_reg.config_classification import load_classification
    from medseg_reg.engine.classification import classify
    from medseg_reg.engine.ranks import is_first_process
    from medseg_reg.inference.classification import evaluate_classifier, headline

    config = load_classification(parsed.config, parsed.overrides)
    make_ready(config, own_process)
    run = classify(config)
    if is_first_process():
        print(headline(run, evaluate_classifier(run)))


def command() -> None:
    """Run as the installed command `medseg-classify`."""
    run_main(partial(main, own_process=True))


if __name__ == "__main__":
    command()

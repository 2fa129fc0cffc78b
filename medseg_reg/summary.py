"""Show the network of a configuration or of a run: layers, sizes, parameters, multiply-adds.

    python -m medseg_reg.summary --config configs/demo.yaml
    python -m medseg_reg.summary --config configs/demo.yaml --depth 3 network.channels=[8,16]
    python -m medseg_reg.summary --run runs/demo

Nothing is trained or written, and no image is read. Where the store is missing, give the number of
channels and classes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from medseg_reg.errors import run_main

if TYPE_CHECKING:
    from medseg_reg.config import Config
    from medseg_reg.engine.run_directory import DataFacts
    from medseg_reg.networks.reuse import Coarse
    from medseg_reg.networks.summary import Summary


def main(arguments: Sequence[str]) -> None:
    """Parse the command line, build the network, print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m medseg_reg.summary", description=(__doc__ or "").split("\n")[0]
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", type=Path, help="a YAML file, as in configs/")
    source.add_argument("--run", type=Path, help="a run directory")
    parser.add_argument("--depth", type=int, default=2, help="levels of parts shown (default: 2)")
    parser.add_argument("--channels", type=int, help="image channels, where the store is missing")
    parser.add_argument("--classes", type=int, help="classes, the background counted; likewise")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parsed = parser.parse_intermixed_args(arguments)
    # Imported here: they take seconds, and --help needs none of them.
    from medseg_reg.config import load_config
    from medseg_reg.data.store import SliceStore
    from medseg_reg.engine.run_directory import DataFacts, RunDirectory

    given = parsed.channels is not None or parsed.classes is not None
    if parsed.run is not None:
        if given:
            parser.error("a run knows its data: --channels and --classes belong to --config")
        if parsed.overrides:
            parser.error("a run has its configuration: overrides belong to --config")
        from medseg_reg.engine.network import kept_coarse

        run = RunDirectory(parsed.run)
        coarse = kept_coarse(run)
        print(summary_of(run.config(), run.data_facts(), coarse=coarse).table(parsed.depth))
        return
    config = load_config(parsed.config, parsed.overrides)
    path, size = config.data.store, None
    if (path / "manifest.json").exists():
        if given:
            parser.error(f"{path} says what the data are: leave out --channels and --classes")
        store = SliceStore(path)
        row = store.manifest.cases[0]
        facts, size = DataFacts.of(store, row.channels), row.shape[1:3]
    else:
        facts = assumed_facts(parsed.channels or 1, parsed.classes or 2)
    print(summary_of(config, facts, size).table(parsed.depth))
    if size is None:
        print(f"{path} is not there: {facts.channels} channel(s), {len(facts.classes)} classes.")


def summary_of(
    config: Config,
    facts: DataFacts,
    size: Sequence[int] | None = None,
    coarse: Coarse | None = None,
) -> Summary:
    """Return the summary of a run's network for one image of the run's size.

    Args:
        config: the configuration.
        facts: channels and classes of the data.
        size: rows and columns of the slices of the store, where the configuration keeps those.
        coarse: see `build_run_network`.
    """
    from medseg_reg.engine.network import build_run_network
    from medseg_reg.networks.build import usual_size
    from medseg_reg.networks.summary import summarize

    network, _ = build_run_network(config, facts, coarse)
    rows, columns = config.data.image.size or size or usual_size(network)
    return summarize(network, (1, facts.channels, rows, columns))


def assumed_facts(channels: int, classes: int) -> DataFacts:
    """Return what a network must know of data that are not there."""
    from medseg_reg.engine.run_directory import DataFacts

    return DataFacts(
        name="",
        classes=("background", *(f"class {n}" for n in range(1, classes))),
        channels=channels,
        unit="",
        modality="",
        citation="",
        licence="",
        manifest_sha256="",
        conversion={},
    )


if __name__ == "__main__":
    run_main(main)

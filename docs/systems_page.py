"""The text of docs/systems.md, from the registry and from `systems`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from docstring_markdown import cell
from systems import KINDS, LOSSES, NETWORKS, PREDICTION, SLICES, TRAINING, System
from systems_layers import METHODS

from medseg_reg.regularizers import regularizer_class
from medseg_reg.regularizers.catalogue import Entry

TESTS = Path(__file__).parents[1] / "tests"

# In which networks a kind of place is found; any other kind is one of maps.
_WHERE = {
    "attention": "transformers",
    "attention_head": "transformers",
    "block_residual": "ViT, UNETR, DPT",
    "tokens": "ViT, UNETR, DPT",
    "tree_gates": "`network.tree_depth`",
    "routing": "`network.experts`",
}
# Keys of a configuration that are systems too, and an analysis.
_PARTS = (
    "tree_depth",
    "experts",
    "token_selection",
    "token_labels",
    "reuse",
    "masking",
    "slim",
)
# Stands for a method without an entry.
NEW = System("", {}, "told in `docs/systems_layers.py`: nothing yet")
_PAGE = """\
# Systems of the literature, and how they were verified

One line for each method that is here: where it goes, what it was published for, what it was
compared with, and what is missing. "Dense" is a form that gives every pixel an output.

What a system was compared with:

{kinds}

Each comparison is a link to the test file; the test itself is named in `docs/systems_layers.py` or
`docs/systems.py`. Beside it, every layer keeps one contract (realised rate, evaluation, gradients,
precision, export: `tests/regularizers/contract.py`) and is put into networks of MONAI,
segmentation-models-pytorch and timm (`tests/insertion/`). None of this says that a method helps:
for that see [results](results.md) and [studies](studies.md).

## Layers

Those at places of maps go into any network with convolutions.

{layers}

## Networks and experts

{networks}

Networks of other packages come by name: [networks](networks.md), [backbones](backbones.md).

## What a training adds

{training}

## Classifiers of slices

{slices}

See [classification](classification.md).

## What a prediction adds

{prediction}

## Terms of the error function

{losses}

Written by `docs/make_methods.py` from the registry, `docs/systems_layers.py` and `docs/systems.py`.
"""


def systems_page(found: Sequence[Entry]) -> str:
    """Return the page; a method of which nothing is told yet says so.

    Args:
        found: the methods of this package.
    """
    layers = [
        (f"[{one.name}](methods/{one.name}.md)", one.paper, _goes(one), METHODS.get(one.name, NEW))
        for one in found
    ]
    return _PAGE.format(
        kinds="\n".join(f"* **{kind}**: {what};" for kind, what in KINDS.items()).rstrip(";") + ".",
        layers=_table("goes to", layers),
        networks=_table("key", _keyed(NETWORKS)),
        training=_table("key", _keyed(TRAINING)),
        slices=_table("command", _keyed(SLICES)),
        prediction=_table("option", _keyed(PREDICTION)),
        losses=_table("key", _keyed(LOSSES)),
    )


def check_systems(found: Sequence[Entry]) -> None:
    """Compare `systems` with what there is.

    Raises:
        SystemExit: a method, network or loss has no entry, one has no method, or a test is gone.
    """
    _same({one.name for one in found}, METHODS, "method")
    _same({*_own_networks(), *_PARTS}, NETWORKS, "network")
    _same(_terms(), LOSSES, "loss")
    _check_keys(TRAINING)
    _check_options(PREDICTION)
    _check_commands(SLICES)
    parts = (NETWORKS, TRAINING, SLICES, PREDICTION, LOSSES)
    others = [one for part in parts for one in part.values()]
    every = [*METHODS.values(), *(one[2] for one in others)]
    _check_tests(test for one in every for test in one.tests.values())


def _keyed(
    systems: Mapping[str, tuple[str, str, System]],
) -> list[tuple[str, str, str, System]]:
    return [(name, paper, f"`{key}`", one) for key, (name, paper, one) in systems.items()]


def _table(third: str, rows: Iterable[tuple[str, str, str, System]]) -> str:
    lines = [
        f"| system | paper | {third} | published for | form here | verified against | missing |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, paper, where, one in rows:
        tests = ", ".join(
            f"[{kind}](../tests/{test.partition('::')[0]})" for kind, test in one.tests.items()
        )
        kind = "dense" if one.dense else "classifier"
        form = f"{kind}: {one.form}" if one.form else kind
        lines.append(
            f"| {name} | {cell(paper)} | {where} | {one.purpose} | {form} | {tests} "
            f"| {one.missing} |"
        )
    return "\n".join(lines)


def _goes(one: Entry) -> str:
    """Return default places, and the networks that have them if not every one has."""
    kinds = regularizer_class(one.name).place_kinds or one.default_places
    places = ", ".join(f"`{place}`" for place in one.default_places)
    where = dict.fromkeys(_WHERE[kind] for kind in kinds if kind in _WHERE)
    return f"{places}: {'; '.join(where)}" if where else places


def _own_networks() -> Sequence[str]:
    from medseg_reg.config_network import OWN_NAMES

    return OWN_NAMES


def _terms() -> set[str]:
    """Return the terms of the error function, which its keys begin with."""
    from medseg_reg.config_regularization import ErrorSpec

    return set(itertools.takewhile(lambda key: key != "class_weights", ErrorSpec.model_fields))


def _same(wanted: set[str], there: Mapping[str, object], kind: str) -> None:
    """Refuse entries that are missing or too many."""
    if odd := sorted(wanted ^ there.keys()):
        raise SystemExit(
            f"docs/systems*.py: not one entry for each {kind}: {', '.join(odd)}. Say there what it "
            "was verified against."
        )


def _check_keys(named: Iterable[str]) -> None:
    """Refuse keys that no configuration has."""
    from medseg_reg.config_regularization import ErrorSpec, RegularizationSpec

    known = {f"regularization.{key}" for key in RegularizationSpec.model_fields}
    known |= {f"regularization.error.{key}" for key in ErrorSpec.model_fields}
    if odd := sorted(set(named) - known):
        raise SystemExit(f"docs/systems.py: there is no key {', '.join(odd)}")


def _check_options(named: Iterable[str]) -> None:
    """Refuse options that the command for predicting has not."""
    from medseg_reg.predict import parser

    if odd := sorted(set(named) - set(re.findall(r"--[\w-]+", parser().format_usage()))):
        raise SystemExit(f"docs/systems.py: there is no option {', '.join(odd)} of predict")


def _check_commands(named: Iterable[str]) -> None:
    """Refuse commands that do not exist."""
    if odd := [one for one in named if not (TESTS.parent / "medseg_reg" / f"{one}.py").is_file()]:
        raise SystemExit(f"docs/systems.py: there is no command {', '.join(odd)}")


def _check_tests(named: Iterable[str]) -> None:
    """Refuse names of tests that do not exist."""
    for one in named:
        path, _, test = one.partition("::")
        file = TESTS / path
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        if not re.search(rf"^def {re.escape(test)}\(", text, re.MULTILINE):
            raise SystemExit(f"docs/systems*.py: there is no test tests/{one}")

"""What a search has found, as files that other commands read.

trials.csv     one row a trial, the best first
best.yaml      the configuration of the best trial: `python -m medseg_reg.train --config`
method.yaml    its layers, and what the search set below `regularization`: a method of a study
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from medseg_reg.config import Config
from medseg_reg.config_file import write_yaml
from medseg_reg.files import replacing, write_text
from medseg_reg.study.grid import flow
from medseg_reg.study.idle_keys import is_below, leaves
from medseg_reg.study.search.spec import SearchSpec
from medseg_reg.study.search.trials import Trial, configured

_LAYERS = "regularization.architecture"


def write_trials(
    search: SearchSpec, trials: Sequence[Trial], scores: Mapping[int, float]
) -> pd.DataFrame:
    """Write trials.csv, and return the table; no value is `null`, as in the file of a search."""
    rows = [
        {
            "trial": trial.number,
            **{key: "null" if value is None else value for key, value in trial.parameters.items()},
            search.monitor: scores[trial.number],
        }
        for trial in trials
    ]
    columns = ["trial", *search.parameters, search.monitor]
    table = pd.DataFrame(rows, columns=columns)
    table = table.sort_values([search.monitor, "trial"], ascending=[False, True])
    with replacing(search.directory / "trials.csv") as temporary:
        table.to_csv(temporary, index=False)
    return table


def write_best(search: SearchSpec, trial: Trial, score: float) -> None:
    """Write best.yaml and method.yaml."""
    folder = search.directory
    # The seed and the progress bar are those of the file, not of the trial.
    config = configured(search, trial.parameters, {"run": f"{folder.as_posix()}/best/seed{{seed}}"})
    found = "; ".join(f"{key}: {flow(value)}" for key, value in trial.parameters.items())
    head = (
        f"# Trial {trial.number} of a search, {search.monitor} {score:.4f} in validation: {found}\n"
    )
    write_text(folder / "best.yaml", head + config.to_yaml())
    write_text(folder / "method.yaml", head + _method(search, trial, config))


def _method(search: SearchSpec, trial: Trial, config: Config) -> str:
    """Return a method with the layers of a trial, and what the search set beside them."""
    changed = leaves({**search.overrides, **trial.parameters})
    own = [key for key in changed if is_below(key, "regularization") and not is_below(key, _LAYERS)]
    groups = {_list_of(key) for key in own}
    whole = leaves(config.model_dump(mode="json"))
    overrides = {k: v for k, v in whole.items() if any(is_below(k, group) for group in groups)}
    others = {k: v for k, v in trial.parameters.items() if not is_below(k, "regularization")}
    shown = ", ".join(f"{key}: {flow(value)}" for key, value in others.items())
    note = f"# No part of a method, but for 'overrides' of the whole study: {shown}\n"
    layers = [one.model_dump(mode="json") for one in config.regularization.architecture]
    text = write_yaml({"architecture": layers, "overrides": overrides})
    return note + text if others else text


def _list_of(key: str) -> str:
    """Return the key of the list in which a key lies, or the key itself.

    Elsewhere the list may have other entries, so it is taken over whole.

    >>> _list_of("regularization.data.0.p"), _list_of("regularization.error.ce")
    ('regularization.data', 'regularization.error.ce')
    """
    parts = key.split(".")
    numbers = (index for index, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: next(numbers, len(parts))])

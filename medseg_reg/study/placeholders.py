"""Placeholders in a study: earlier runs, or pretrained weights, of its own for each run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from medseg_reg.errors import MedsegError, nearest
from medseg_reg.study.idle_keys import leaves

if TYPE_CHECKING:
    from medseg_reg.study.grid import Spot

# Keys of a run that name what another run has learned.
TEACHER = "regularization.error.distillation.teacher"
COARSE = "network.reuse.run"
WEIGHTS = ("network.pretrained", "network.encoder_weights")
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_PARTS = {"fold": "folds", "split": "splits"}


def filled_sources(content: Any, spot: Spot) -> dict[str, str]:
    """Return runs and weights whose placeholders a run fills with its own place in the study.

    `{dataset}`, `{network}`, `{method}` and `{seed}` stand for those of the run, `{fold}` and
    `{split}` for the number of its fold, or the seed of its split, where the study has several.

    Args:
        content: the configuration of the run, not validated yet.
        spot: where the run stands.

    Raises:
        MedsegError: a placeholder is none of these; names all that there are.

    >>> from medseg_reg.study.grid import Spot
    >>> spot = Spot("bagls", "unetr", "none", seed=3, part="fold2")
    >>> filled_sources({"network": {"pretrained": "mae/fold{fold}/seed{seed}/w.pt"}}, spot)
    {'network.pretrained': 'mae/fold2/seed3/w.pt'}
    """
    given = leaves(content) if isinstance(content, Mapping) else {}
    return {
        key: _filled(key, value, _names(spot))
        for key in (TEACHER, COARSE, *WEIGHTS)
        if isinstance(value := given.get(key), str) and _PLACEHOLDER.search(value)
    }


def _names(spot: Spot) -> dict[str, str]:
    """Return what placeholders stand for."""
    names = {key: str(value) for key, value in spot._asdict().items() if key != "part"}
    for kind in _PARTS:
        if spot.part.startswith(kind):
            names[kind] = spot.part.removeprefix(kind)
    return names


def _filled(key: str, value: str, names: Mapping[str, str]) -> str:
    def filled(found: re.Match[str]) -> str:
        name = found[1]
        if name in names:
            return names[name]
        known = ", ".join(f"{{{one}}}" for one in names)
        if name in _PARTS:
            why = f"{{{name}}} needs '{_PARTS[name]}' in the study."
        else:
            why = f"there is no placeholder {{{name}}}.{nearest(name, names)}"
        raise MedsegError(f"{key}: {value!r}: {why} Known here: {known}.")

    return _PLACEHOLDER.sub(filled, value)

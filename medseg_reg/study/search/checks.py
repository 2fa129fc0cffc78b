"""What can be wrong with the values of a search, looked at before anything runs.

Each value of each parameter is tried beside the first values of all others: whether it makes a
configuration, and, where it decides which network there is or where its layers go, whether they can
be put there. So a search over `places` that has `residual` among them is refused at once with a
network without residual branches.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from medseg_reg.errors import MedsegError
from medseg_reg.study.grid import flow
from medseg_reg.study.idle_keys import is_below
from medseg_reg.study.search.spec import ChoiceSpec, RangeSpec, SearchSpec
from medseg_reg.study.search.trials import configured

if TYPE_CHECKING:
    from medseg_reg.engine.run_directory import DataFacts

_LAYERS = "regularization.architecture"


def check_values(search: SearchSpec) -> None:
    """Refuse a value that makes no configuration with the first values of the others.

    Raises:
        MedsegError: names the key and the value.
    """
    for tried, parameters in _each_value(search):
        with _named(tried):
            configured(search, parameters, {})


def check_networks(search: SearchSpec) -> None:
    """Refuse a network that cannot be built, and layers that cannot be put into it.

    The network of each value of `network`, of layers, and of their places is built, which takes
    some time; its weights are thrown away. The data must be there.

    Raises:
        MedsegError: names the key, the value, and what places there are.
    """
    from medseg_reg.engine.network import build_run_network  # loads torch

    facts = None
    for tried, parameters in _each_value(search):
        if tried and not _decides_places(next(iter(tried))):
            continue
        config = configured(search, parameters, {})
        facts = facts or _facts(search, parameters)
        # Each run tells its notes anew.
        with _named(tried), contextlib.redirect_stdout(io.StringIO()):
            build_run_network(config, facts)


def first_values(search: SearchSpec) -> dict[str, Any]:
    """Return the first value of each parameter."""
    return {key: _values(one)[0] for key, one in search.parameters.items()}


def _each_value(search: SearchSpec) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Go through all values, each with the first of the others; before them the first of all."""
    first = first_values(search)
    yield {}, first
    for key, one in search.parameters.items():
        for value in _values(one)[1:]:
            yield {key: value}, {**first, key: value}


def _values(parameter: ChoiceSpec | RangeSpec) -> tuple[Any, ...]:
    """Return the values of a list, or the ends of a range."""
    if isinstance(parameter, ChoiceSpec):
        return parameter.values
    number = int if parameter.integer else float
    return number(parameter.low), number(parameter.high)


def _decides_places(key: str) -> bool:
    """Whether layers may go elsewhere for it.

    >>> [_decides_places(f"regularization.architecture{end}") for end in (".0.places", ".0.p", "")]
    [True, False, True]
    """
    last = key.rsplit(".", 1)[-1]
    return (
        is_below(key, "network")
        or is_below(_LAYERS, key)
        or (is_below(key, _LAYERS) and (last in ("name", "places") or last.isdigit()))
    )


def _facts(search: SearchSpec, parameters: dict[str, Any]) -> DataFacts:
    """Return what a network must know of the data."""
    from medseg_reg.data.store import SliceStore
    from medseg_reg.engine.run_directory import DataFacts

    store = SliceStore(configured(search, parameters, {}).data.store)
    return DataFacts.of(store, store.manifest.cases[0].channels)


@contextlib.contextmanager
def _named(tried: dict[str, Any]) -> Iterator[None]:
    """Say in an error which value was tried."""
    try:
        yield
    except MedsegError as error:
        shown = ", ".join(f"{key}: {flow(value)}" for key, value in tried.items())
        raise MedsegError(f"{shown or 'the first value of each parameter'}: {error}") from None

"""Regularizers of other packages, which an installed package offers by an entry point.

A package names its class, or a module that registers on import, in its ``pyproject.toml``::

    [project.entry-points."medseg_reg.regularizers"]
    line_dropout = "line_dropout:LineDropout"

They are loaded once, the first time that the registry is asked for names or classes; importing
`medseg_reg.regularizers` loads none. A configuration names layers and nothing else: the code that
it can reach this way is what somebody installed into the environment. ``MEDSEG_REG_PLUGINS=0`` in
the environment loads no plugin at all.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from importlib.metadata import EntryPoint, entry_points

from medseg_reg.regularizers import base

__all__ = ["GROUP", "SWITCH", "PluginWarning", "load_plugins", "origin"]

GROUP = "medseg_reg.regularizers"
SWITCH = "MEDSEG_REG_PLUGINS"

_lock = threading.RLock()
_state = "new"  # then "loading", then "done"
_origins: dict[str, str] = {}


class PluginWarning(UserWarning):
    """An installed plugin could not be used; everything else works."""


def load_plugins() -> None:
    """Loads every installed plugin the first time it is called; afterwards it does nothing.

    A plugin that cannot be used is skipped: one `PluginWarning` for each names its distribution
    and the error. Where two want one name, that of this package wins, then that of the
    distribution first in the alphabet.
    """
    global _state
    if _state == "done":
        return
    with _lock:
        if _state != "new":  # a plugin asks for names while it is imported
            return
        _state = "loading"
        try:
            wanted = os.environ.get(SWITCH, "1") != "0"
            found = sorted(entry_points(group=GROUP), key=_who) if wanted else []
            problems = [problem for entry in found if (problem := _load(entry))]
        finally:
            _state = "done"
    for problem in problems:  # last of all: a filter may turn the first into an exception
        warnings.warn(problem, PluginWarning, stacklevel=4)


def origin(name: str) -> str:
    """The distribution and version that brought a regularizer; empty for this package's own."""
    load_plugins()
    return _origins.get(name, "")


def _who(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value


def _load(entry: EntryPoint) -> str:
    """Loads one plugin, and returns what went wrong, if anything."""
    before = set(base._REGISTRY)
    try:
        loaded = entry.load()
        if entry.attr and loaded not in base._REGISTRY.values():
            base.register(entry.name)(loaded)
    except Exception as error:  # whatever foreign code may raise
        for name in set(base._REGISTRY) - before:
            if base._REGISTRY[name].__module__ not in sys.modules:  # its import failed half-way
                del base._REGISTRY[name]
        return _told(entry, f"raised {type(error).__name__}: {error}")
    package = _package(entry.module)
    brought = [name for name, cls in base._REGISTRY.items() if _package(cls.__module__) == package]
    if not brought:
        return _told(entry, "registered no class; decorate one with @register")
    _origins.update(dict.fromkeys(brought, _who(entry)))
    return ""


def _package(module: str) -> str:
    return module.partition(".")[0]


def _told(entry: EntryPoint, what: str) -> str:
    return (
        f"the plugin {_who(entry)} of medseg_reg is not used: its entry point "
        f"'{entry.name} = {entry.value}' {what}. Repair or uninstall it; the other layers work, "
        f"and {SWITCH}=0 loads no plugin."
    )

"""Reading a configuration file: strict YAML, overrides, and errors a person can act on."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Tag, ValidationError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from medseg_reg.errors import MedsegError, nearest

Key = tuple[str | int, ...]
Lines = dict[Key, int]
# Where the value of a key was written: a line of a file, or an override.
Origins = dict[Key, str]

MAX_BYTES = 1 << 20


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML without anchors: a few lines of them can unfold to gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]  # a gap of its stubs
            raise yaml.MarkedYAMLError(
                problem="aliases (*name) are not allowed; write the value out",
                problem_mark=event.start_mark,
            )
        node: Node | None = super().compose_node(parent, index)
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes every text that `_StrictLoader` would not read as a text."""


# YAML 1.1, which PyYAML follows, takes 1e-3 for a text: a float needs a dot and a sign there.
for _kind in (_StrictLoader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


def write_yaml(content: Any) -> str:
    """Return plain types as YAML that `read_yaml` reads back as they are."""
    text: str = yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def read_yaml(path: Path) -> tuple[Any, Lines]:
    """Read a YAML file; return its content and the line on which each key stands.

    Raises:
        MedsegError: the file is missing, too large, no YAML, or gives a key twice.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise MedsegError(f"{path}: is larger than 1 MiB, so it is no configuration.")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        others = [str(p) for p in sorted(path.parent.glob("*.yaml"))] if path.parent else []
        raise MedsegError(f"{path}: does not exist.{nearest(str(path), others)}") from None
    except (IsADirectoryError, UnicodeDecodeError):
        raise MedsegError(f"{path}: is not a YAML text file.") from None
    return _parse(text, str(path))


def _parse(text: str, origin: str) -> tuple[Any, Lines]:
    try:
        loader = _StrictLoader(text)
        node = loader.get_single_node()
        lines: Lines = {}
        _walk(node, (), lines, origin)
        return loader.construct_document(node) if node else None, lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{origin}:{mark.line + 1}" if mark else origin
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise MedsegError(f"{where}: is not valid YAML: {problem}.") from None
    except RecursionError:
        raise MedsegError(f"{origin}: is not valid YAML: nested too deeply.") from None
    except ValueError as error:  # a date such as 2020-13-45, a number of thousands of digits
        raise MedsegError(f"{origin}: is not valid YAML: {error}.") from None


def _walk(node: Node | None, key: Key, lines: Lines, origin: str) -> None:
    if isinstance(node, MappingNode):
        for name, value in node.value:
            if not isinstance(name, ScalarNode):
                raise MedsegError(f"{origin}:{name.start_mark.line + 1}: a key must be plain text.")
            child = (*key, name.value)
            if child in lines:
                raise MedsegError(
                    f"{origin}:{name.start_mark.line + 1}: '{_dotted(child)}' is given a second "
                    f"time (first in line {lines[child]}). Keep one."
                )
            lines[child] = name.start_mark.line + 1
            _walk(value, child, lines, origin)
    elif isinstance(node, SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*key, index)] = value.start_mark.line + 1
            _walk(value, (*key, index), lines, origin)


def with_overrides(content: Any, overrides: Sequence[str]) -> Any:
    """Apply `key.sub=value` overrides; values are YAML, a number in the key is a list index."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise MedsegError(f"override '{override}': expected key.sub=value, as in seed=1.")
        value, _ = _parse(text, f"override '{override[:80]}'")
        content = _set(content, key.split("."), value, override)
    return content


def origins(path: Path, lines: Lines, overrides: Sequence[str]) -> Origins:
    """Return where each key was written; an override hides the lines that it replaces."""
    found = {key: f"{path}:{line}" for key, line in lines.items()}
    for override in overrides:
        parts = override.partition("=")[0].split(".")
        key = tuple(int(part) if part.isdigit() else part for part in parts)
        found = {other: where for other, where in found.items() if other[: len(key)] != key}
        found[key] = f"override '{override[:80]}'"
    return found


def _set(content: Any, keys: list[str], value: Any, override: str) -> Any:
    if not keys:
        return value
    if isinstance(content, list):
        if not keys[0].isdigit() or int(keys[0]) >= len(content):
            raise MedsegError(
                f"override '{override}': '{keys[0]}' is not an index of a list of "
                f"{len(content)} entries (0 is the first)."
            )
        index = int(keys[0])
        changed = _set(content[index], keys[1:], value, override)
        return [*content[:index], changed, *content[index + 1 :]]
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise MedsegError(f"override '{override}': '{keys[0]}' lies below a single value.")
    return {**content, keys[0]: _set(content.get(keys[0]), keys[1:], value, override)}


def explain(error: ValidationError, model: type[BaseModel], origin: str, places: Origins) -> str:
    """Turn the first three mistakes of a validation into lines that name key, value and mend."""
    shown = []
    for mistake in error.errors()[:3]:
        key, fields = _written_key(mistake["loc"], model)
        parts = (key[:n] for n in range(len(key), 0, -1))
        where = next((places[part] for part in parts if part in places), origin)
        shown.append(f"{where}: {_mistake(mistake, key, list(fields))}")
    if error.error_count() > 3:
        shown[-1] += f" (and {error.error_count() - 3} more)"
    return "\n".join(shown)


def _mistake(mistake: Any, key: Key, choices: list[str]) -> str:
    name = _dotted(key) or "the configuration"
    if mistake["type"] == "extra_forbidden":
        return (
            f"unknown key '{name}'.{nearest(str(key[-1]), choices)} "
            f"Known here: {', '.join(choices)}."
        )
    if mistake["type"] == "missing":
        return f"'{name}' is missing. Add it."
    text = str(mistake["msg"])
    if mistake["type"] == "value_error":
        text = text.removeprefix("Value error, ").removesuffix(".")
    else:
        text = text[:1].lower() + text[1:]
    found = mistake.get("input")
    shown = "" if isinstance(found, dict | BaseModel) else f" (found {found!r})"
    hint = ""
    if mistake["type"] == "literal_error" and isinstance(found, str):
        hint = nearest(found, re.findall(r"'([^']*)'", mistake["ctx"]["expected"]))
    return f"'{name}': {text}{shown}.{hint}"


def _written_key(
    location: tuple[str | int, ...], model: type[BaseModel]
) -> tuple[Key, dict[str, Any]]:
    """Return the key of a location, and the fields of the group in which its last part lies.

    What pydantic adds to a location, the names of union members, is dropped.
    """
    key: list[str | int] = []
    annotation: Any = model
    fields: dict[str, Any] = {}
    for part in location:
        if part in (tagged := _tagged(annotation)):
            annotation = tagged[part]
            continue
        if (values := _values_of_mapping(annotation)) is not None:
            key.append(part)
            annotation = values
            continue
        found = _model_in(annotation)
        known = dict(found.model_fields) if found else {}
        if isinstance(part, int):
            key.append(part)
        elif part in known or part is location[-1]:
            key.append(part)
            fields = known
            annotation = known[part].annotation if part in known else None
    return tuple(key), fields


def _tagged(annotation: Any) -> dict[str | int, Any]:
    """Return the members of a union that have tags, by these."""
    if hasattr(annotation, "__metadata__"):  # a union within `dict[str, ...]` is wrapped
        annotation = typing.get_args(annotation)[0]
    return {
        one.tag: member
        for member in typing.get_args(annotation)
        for one in getattr(member, "__metadata__", ())
        if isinstance(one, Tag)
    }


def _values_of_mapping(annotation: Any) -> Any:
    """Return the type of the values of an annotation such as `dict[str, Model]`, else None."""
    arguments = typing.get_args(annotation)
    return arguments[1] if typing.get_origin(annotation) is dict else None


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Find the model in an annotation such as `tuple[Model, ...]` or `Model | None`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    for argument in typing.get_args(annotation):
        if (found := _model_in(argument)) is not None:
            return found
    return None


def _dotted(key: Key) -> str:
    return ".".join(str(part) for part in key)

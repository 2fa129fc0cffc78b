"""The keys of a configuration, with defaults and values in words, from the models."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from medseg_reg.config import Config


def keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every key with its field; `[]` stands for the entries of a list.

    Of a union of groups every key comes once, with the field of the first that has it.
    """
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        groups, is_list = _groups(field.annotation)
        if not groups or is_list or _optional(field.annotation):
            yield key, field
        seen: set[str] = set()
        for group in groups:
            for inner, one in keys(group, f"{key}[]." if is_list else f"{key}."):
                if inner not in seen:
                    yield inner, one
                seen.add(inner)


def _groups(annotation: Any) -> tuple[list[type[BaseModel]], bool]:
    """Return the models in an annotation, and whether they are the entries of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation], False
    found = [model for argument in typing.get_args(annotation) for model in _groups(argument)[0]]
    return found, bool(found) and typing.get_origin(annotation) is tuple


def _optional(annotation: Any) -> bool:
    return type(None) in typing.get_args(annotation)


def default_of(field: FieldInfo) -> str:
    """Return a default as it is written in YAML."""
    if field.is_required():
        return ""
    if field.default_factory is not None:
        return "of the layer"
    value = field.default
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, BaseModel):
        return ""
    return f"`{json.dumps(value)}`"


def values_of(annotation: Any, metadata: list[Any] | None = None) -> str:
    """Return in words what a key takes."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is typing.Annotated:
        return values_of(arguments[0], list(arguments[1:]))
    if origin in (typing.Union, types.UnionType):
        kinds = [values_of(one, metadata) for one in arguments if one is not type(None)]
        return " or ".join(kinds) + (" or null" if _optional(annotation) else "")
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return f"list of {values_of(arguments[0])}"
        return f"{len(arguments)} of {values_of(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "group"
    names = {int: "whole number", float: "number", bool: "true, false", str: "text", Path: "path"}
    bounds = ", ".join(_bounds(metadata or []))
    return names.get(annotation, str(annotation)) + (f" {bounds}" if bounds else "")


def _bounds(metadata: list[Any]) -> Iterator[str]:
    signs = {
        annotated_types.Ge: ("ge", "≥"),
        annotated_types.Gt: ("gt", ">"),
        annotated_types.Le: ("le", "≤"),
        annotated_types.Lt: ("lt", "<"),
        annotated_types.MultipleOf: ("multiple_of", "a multiple of"),
    }
    for one in metadata:
        if isinstance(one, FieldInfo):
            yield from _bounds(one.metadata)
        elif type(one) in signs:
            attribute, sign = signs[type(one)]
            yield f"{sign} {getattr(one, attribute)}"

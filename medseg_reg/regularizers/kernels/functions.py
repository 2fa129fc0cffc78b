"""Makes ``torch.autograd.Function`` cheaper to call: small maps take less than the call does."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

__all__ = ["differentiable", "with_signature"]

_P = ParamSpec("_P")
_R = TypeVar("_R")


class _Given(inspect.BoundArguments):
    """All arguments of a call, as they were given by position."""

    def __init__(self, given: tuple[Any, ...]) -> None:
        self.given = given

    args = property(lambda self: self.given)
    kwargs = property(lambda _: {})

    def apply_defaults(self) -> None:
        """None is missing."""


class _Complete(inspect.Signature):
    """The signature of a function that is always called with all its arguments, by position."""

    def bind(self, /, *args: Any, **_: Any) -> inspect.BoundArguments:
        return _Given(args)


def with_signature(forward: Callable[_P, _R]) -> Callable[_P, _R]:
    """Keeps the signature of a ``forward`` that stands beside a ``setup_context``.

    Torch reads it by `inspect` at each call and binds the arguments, to fill in defaults: longer
    than many a small map takes. Calls of the function must give all arguments by position.

    Example:
        >>> import inspect
        >>> @with_signature
        ... def forward(x, scale): ...
        >>> inspect.signature(forward).bind(1, 2).args
        (1, 2)
    """
    parameters = inspect.signature(forward).parameters.values()
    forward.__signature__ = _Complete(list(parameters))  # type: ignore[attr-defined]
    return forward


def differentiable(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """The rule of a function for use in a backward pass: with a derivative only if one is asked.

    That is, if autograd was called with ``create_graph=True``.

    Example:
        >>> class Twice(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(x):
        ...         return 2 * x
        >>> with torch.no_grad():
        ...     differentiable(Twice)(3)
        6
    """
    rule: Callable[..., Any] = function.apply if torch.is_grad_enabled() else function.forward
    return rule

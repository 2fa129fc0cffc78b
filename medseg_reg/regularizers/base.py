"""The contract every regularizer keeps, and the closed registry of their names.

A new regularizer is one file: subclass `Regularizer`, write ``regularize``, decorate it with
``@register("its_name")``, and let its test inherit ``RegularizerContract``.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import ClassVar, TypeVar

from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd

__all__ = [
    "Regularizer",
    "build",
    "register",
    "regularizer_class",
    "regularizer_names",
]

_AXES = {1: "W", 2: "H, W", 3: "D, H, W"}


class Regularizer(_DropoutNd):
    """Regularizes a feature map while training; hands back the very same tensor otherwise.

    It subclasses torch's private dropout base because MONAI, MC-dropout tools and model
    summaries look for exactly that class and for the attribute ``p``. Constructor arguments are
    stored under their own names: ``repr``, `build` and configurations rely on it.

    Attributes:
        p: share of units to drop, in [0, 1). A schedule may assign it between steps; every
            assignment is checked. Under ``torch.compile`` the plain dropouts compile anew for each
            value, as torch's own do; Heuristic Dropout and CorrDrop do not.
        stochastic: whether two training passes over one input differ enough for MC-dropout. The
            class attribute describes the default parameters; an instance may differ.
        default_places: where a configuration that names no places puts the layer; a class
            attribute.
        unit: what is dropped, in a few words, for the catalogue; a class attribute.
        paper: authors, venue and year in short, for the catalogue; a class attribute.
        needs: what the method needs besides its input, for the catalogue; empty for nothing.
        spatial_dims: the numbers of spatial axes it works for; a class attribute.
        place_kinds: the kinds of places it is for; empty for any. A class attribute.
        hides_keys: whether what it zeroes among attention weights may as well be left out of the
            softmax, so that it serves an attention whose weights are never computed; a class
            attribute.

    Shapes:
        (B, C, *spatial) with one to three spatial axes, any floating dtype and memory format;
        the output has the same shape, dtype and memory format.

    Raises:
        ValueError: ``p`` outside [0, 1), or, in training, an input of another shape or kind.

    Example:
        >>> import torch
        >>> from medseg_reg.regularizers import build
        >>> layer = build("spatial_dropout", p=0.2).eval()
        >>> x = torch.ones(2, 8, 4, 4)
        >>> layer(x) is x
        True
    """

    stochastic: bool = True
    default_places: tuple[str, ...] = ("between_convs",)
    unit: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    needs: ClassVar[str] = ""
    spatial_dims: ClassVar[tuple[int, ...]] = (1, 2, 3)
    place_kinds: ClassVar[tuple[str, ...]] = ()
    hides_keys: ClassVar[bool] = False

    def __init__(self, p: float = 0.1) -> None:
        """Stores the drop rate.

        Args:
            p: share of units to drop, in [0, 1).
        """
        super().__init__(p=check_rate(p, type(self).__name__))

    def __setattr__(self, name: str, value: object) -> None:
        """Checks every new ``p``: a schedule must not push it out of [0, 1) unnoticed."""
        if name == "p":
            value = check_rate(value, type(self).__name__)
        super().__setattr__(name, value)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``x`` itself in ``eval()`` or at ``p == 0``, else its regularized copy.

        A map without any value, as of an empty batch, is returned as it is too.
        """
        if not self.training or self.p == 0.0:
            return x
        check_map(x, type(self).__name__)
        return self.regularize(x) if x.numel() else x

    def regularize(self, x: Tensor) -> Tensor:
        """The training-time rule; subclasses write this one method."""
        raise NotImplementedError(f"{type(self).__name__} must define regularize(x)")

    def measured_rate(self, x: Tensor, y: Tensor) -> float:
        """The share of units that one training pass ``x -> y`` dropped.

        The default counts the non-zero inputs that became zero (0.0 if there were none); a
        method that alters units without zeroing them overrides it.

        Example:
            >>> import torch
            >>> from medseg_reg.regularizers import Dropout
            >>> Dropout(0.5).measured_rate(torch.ones(1, 1, 4), torch.tensor([[[0., 2, 2, 0]]]))
            0.5
        """
        alive = x != 0
        dropped = alive & (y == 0)
        return float(dropped.sum().item()) / max(int(alive.sum().item()), 1)

    def memory(self) -> dict[str, Tensor]:
        """What the layer remembers between steps, for the checkpoint of a run; mostly nothing.

        It is no part of ``state_dict``: a network has the same keys with and without its layers.
        """
        return {}

    def load_memory(self, memory: Mapping[str, Tensor]) -> None:
        """Restores what `memory` returned.

        Raises:
            ValueError: the memory is not one of this layer.
        """
        if memory:
            raise ValueError(
                f"{type(self).__name__} remembers nothing between steps, got {sorted(memory)}"
            )

    def extra_repr(self) -> str:
        """Every constructor argument with its present value."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in _parameters(type(self)))


def check_rate(p: object, owner: str) -> float:
    """Returns ``p`` as a float, or raises a ValueError that says what is expected."""
    # bool is an int to Python, yet p=True is always a misplaced flag
    valid = isinstance(p, Real) and not isinstance(p, bool) and 0.0 <= float(p) < 1.0
    if not valid:
        raise ValueError(
            f"{owner}: p is the share of units to drop, a number in [0, 1); got {p!r}. "
            "If it was meant as the share to keep, pass 1 - p."
        )
    return float(p)  # type: ignore[arg-type]


def check_map(x: Tensor, owner: str) -> None:
    """Raises a ValueError unless ``x`` is a floating (B, C, *spatial) map, 1 to 3 spatial axes."""
    if x.dim() - 2 not in _AXES:
        expected = " or ".join(f"(B, C, {axes})" for axes in _AXES.values())
        raise ValueError(f"{owner}: expected {expected}, got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(
            f"{owner}: expected a floating-point map, got {x.dtype} "
            f"of shape {tuple(x.shape)}; convert it with x.float()"
        )


def check_number(
    value: object, name: str, owner: str, low: float, *, strict: bool = False, finite: bool = True
) -> float:
    """Returns ``value`` as a float at or (``strict``) above ``low``, or raises a ValueError."""
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else low - 1
    if not (number > low if strict else number >= low) or (finite and number == float("inf")):
        bound = f"{'above' if strict else 'at least'} {low:g}"
        raise ValueError(
            f"{owner}: {name} must be a {'finite ' * finite}number {bound}, got {value!r}"
        )
    return number


def check_count(value: object, name: str, owner: str, high: int | None = None) -> int:
    """Returns ``value`` if it is an int of at least 1 (at most ``high``), or raises ValueError."""
    valid = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not valid or (high is not None and value > high):  # type: ignore[operator]
        limits = "1 or more" if high is None else f"1 to {high}"
        raise ValueError(f"{owner}: {name} must be a whole number, {limits}; got {value!r}")
    return value  # type: ignore[return-value]


def check_choice(value: object, name: str, choices: Iterable[str]) -> str:
    """Returns ``value`` if it is one of ``choices``, or raises a ValueError naming the nearest."""
    choices = tuple(choices)
    if isinstance(value, str) and value in choices:
        return value
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    listed = ", ".join(choices) if choices else "none"
    raise ValueError(f"unknown {name} {value!r}{hint} (choices: {listed})")


_REGISTRY: dict[str, type[Regularizer]] = {}
_R = TypeVar("_R", bound=type[Regularizer])


def register(name: str) -> Callable[[_R], _R]:
    """Enters a `Regularizer` subclass in the registry under ``name``.

    Raises:
        ValueError: the name is no lower-case identifier or is taken by another class, or what is
            registered is no `Regularizer`.
    """
    if not (name.isidentifier() and name == name.lower()):
        raise ValueError(f"a regularizer's name is a lower_case identifier, got {name!r}")

    def enter(cls: _R) -> _R:
        if not (inspect.isclass(cls) and issubclass(cls, Regularizer)):
            raise ValueError(f"{name!r}: {cls!r} is not a subclass of Regularizer")
        if name in _REGISTRY:
            taken = _REGISTRY[name]
            raise ValueError(
                f"{name!r} is already registered for {taken.__name__} of {taken.__module__}; "
                f"choose another name for {cls.__name__} of {cls.__module__}"
            )
        _REGISTRY[name] = cls
        return cls

    return enter


def _with_plugins() -> dict[str, type[Regularizer]]:
    """The registry, with what installed packages offer; see `medseg_reg.regularizers.plugins`."""
    from medseg_reg.regularizers.plugins import load_plugins  # it imports this module

    load_plugins()
    return _REGISTRY


def regularizer_names() -> tuple[str, ...]:
    """All registered names, sorted; those of installed plugins too.

    Example:
        >>> "heuristic_dropout" in regularizer_names()
        True
    """
    return tuple(sorted(_with_plugins()))


def regularizer_class(name: str) -> type[Regularizer]:
    """The class registered under ``name``.

    Raises:
        ValueError: unknown name; the message gives the nearest one and lists all.

    Example:
        >>> regularizer_class("hueristic_dropout")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: unknown regularizer 'hueristic_dropout'; did you mean 'heuristic_dropout'? ...
    """
    return _REGISTRY[check_choice(name, "regularizer", regularizer_names())]


def build(name: str, **parameters: object) -> Regularizer:
    """Makes the regularizer registered under ``name`` with the given parameters.

    Raises:
        ValueError: unknown name or parameter (with the nearest right one), or a bad value.

    Example:
        >>> build("dropout", p=0.3)
        Dropout(p=0.3)
    """
    cls = regularizer_class(name)
    for key in parameters:
        check_choice(key, f"parameter of {name}", _parameters(cls))
    make: Callable[..., Regularizer] = cls
    return make(**parameters)


def _parameters(cls: type[Regularizer]) -> tuple[str, ...]:
    """The names of a class's constructor arguments, in order."""
    return tuple(inspect.signature(cls).parameters)

"""Compiled loops for Heuristic Dropout on CPU, where numba is installed; plain rules elsewhere.

Torch's operators go over a map once for each level of the histogram, and each call costs as long
as thousands of values; a compiled loop takes all sums in one pass. numba comes with
``pip install 'medseg_reg[numba]'`` and needs no compiler. It is imported when the first such map
comes by, and compiles for some seconds, once for an installation: the machine code is kept beside
the package, or in the user's cache. Before a loop is used in a process, it is compared with the
plain rule on a small example; where numba fails or gives another result, a warning says so, and
the plain rules are used. ``MEDSEG_REG_NUMBA=0`` in the environment leaves numba alone.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["filter_planes", "installed", "level_sums", "top_scores"]

_HERE = importlib.util.find_spec("numba") is not None and os.environ.get("MEDSEG_REG_NUMBA") != "0"
_DTYPES = (torch.float32, torch.bfloat16)


def installed() -> bool:
    """Whether numba is there and not to be left alone: then maps that fit are for its loops.

    Example:
        >>> installed() in (True, False)
        True
    """
    return _HERE


def level_sums(x: Tensor, thresholds: tuple[float, ...]) -> Tensor | None:
    """`histogram.level_sums` by a loop; None if the map is not one for it.

    Shapes:
        x (B, C, *spatial); the result (B, C, 1 + len(thresholds)), float32.

    Example:
        >>> import torch
        >>> level_sums(torch.ones(1, 2, 3, dtype=torch.float64), (0.5,)) is None
        True
    """
    return _sums(x, thresholds) if _fits(x, "level_sums") else None


def top_scores(
    x: Tensor, thresholds: tuple[float, ...], k: float, signed: bool, most: int
) -> Tensor | None:
    """The scores of Heuristic Dropout by a loop; None if the map is not one for it.

    They are exact for each channel that may be among the ``most`` highest of its sample. Some of
    the others, which their variance rules out, are -inf, as are scores that are not finite.

    Shapes:
        x (B, C, *spatial); the result (B, C), float32.
    """
    return _top(x, thresholds, k, signed, most) if _fits(x, "top_scores") else None


def filter_planes(x: Tensor, index: Tensor, chosen: Tensor, zero: bool) -> Tensor | None:
    """`planes.filter_channels` by a loop, without a derivative; None if the map is not one for it.

    Shapes:
        x (B, C, *spatial); index and chosen (B, n), integer and bool; the result is alike x.
    """
    return _filter(x, index, chosen, zero) if _fits(x, "filter_planes") else None


def _fits(x: Tensor, name: str) -> bool:
    """Whether a map is on CPU, float32 or bfloat16, dense, not being traced; and the loop sound."""
    if not (_HERE and x.device.type == "cpu" and x.dtype in _DTYPES and 2 < x.dim() < 6):
        return False
    if torch.compiler.is_compiling() or x.numel() == 0:
        return False
    rows = not x.is_contiguous()
    if rows and not x.movedim(1, -1).is_contiguous():
        return False
    try:  # wrappers, as those of torch.func, have no memory of their own
        x.data_ptr()
    except RuntimeError:
        return False
    return _sound(name, x.dtype, rows)


def _sums(x: Tensor, thresholds: tuple[float, ...]) -> Tensor:
    maps, levels = _array(x), _levels(thresholds, x.dtype)
    sums = torch.empty(*x.shape[:2], 1 + len(thresholds))
    if x.is_contiguous():
        planes = maps.reshape(x.shape[0] * x.shape[1], -1)
        _loops().sums_of_planes(planes, levels, sums.numpy().reshape(len(planes), -1))
    else:
        for rows, out in zip(_rows(maps), sums.numpy(), strict=True):
            _loops().sums_of_rows(rows, levels, out)
    return sums


def _top(x: Tensor, thresholds: tuple[float, ...], k: float, signed: bool, most: int) -> Tensor:
    maps, levels = _array(x), _levels(thresholds, x.dtype)
    scores = torch.empty(x.shape[:2])
    if x.is_contiguous():
        planes = maps.reshape(*x.shape[:2], -1)
        _loops().top_of_planes(planes, levels, k, signed, most, scores.numpy())
    else:
        _loops().top_of_rows(_rows(maps), levels, k, signed, scores.numpy())
    return scores


def _filter(x: Tensor, index: Tensor, chosen: Tensor, zero: bool) -> Tensor:
    out = x.detach().clone()
    factor = 3 ** (x.dim() - 2)
    _loops().filter_planes(_array(x), _array(out), index.numpy(), chosen.numpy(), factor, zero)
    return out


def _array(x: Tensor) -> Any:
    """The memory of a map as an array (B, C, d, h, w): the bits of bfloat16, unknown to NumPy."""
    x = x.detach()
    array = (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()
    batch, channels, *sizes = array.shape
    return array.reshape(batch, channels, *[1] * (3 - len(sizes)), *sizes)


def _rows(maps: Any) -> Any:
    """Maps whose channels lie side by side in memory, as (B, pixels, C)."""
    return maps.transpose(0, 2, 3, 4, 1).reshape(len(maps), -1, maps.shape[1])


@functools.cache
def _levels(thresholds: tuple[float, ...], dtype: torch.dtype) -> Any:
    """The thresholds as the loops compare with them: the least value of the type at or above."""
    exact = torch.tensor(thresholds, dtype=torch.float32)
    if dtype == torch.float32:
        return exact.numpy()
    near = exact.to(dtype)
    # the next one up has greater bits if it is positive, and smaller ones if it is negative
    up = (near < exact).to(torch.int16) * torch.where(exact > 0, 1, -1).to(torch.int16)
    return (near.view(torch.int16) + up).numpy()


@functools.cache
def _loops() -> Any:
    """The module of the loops, which imports numba."""
    from medseg_reg.regularizers.kernels import numba_loops

    return numba_loops


@functools.cache
def _sound(name: str, dtype: torch.dtype, rows: bool) -> bool:
    """Whether a loop compiles here and agrees with the plain rule on a small example."""
    trials: dict[str, Callable[[Tensor], None]] = {
        "level_sums": _try_sums,
        "top_scores": _try_top,
        "filter_planes": _try_filter,
    }
    x = torch.linspace(-1.5, 1.5, 2 * 5 * 7 * 9).mul(20).sin().view(2, 5, 7, 9)
    x = (x * torch.linspace(0.2, 1, 5).view(5, 1, 1)).to(dtype)
    try:
        trials[name](x.to(memory_format=torch.channels_last) if rows else x)
    except Exception as error:  # of many types: numba's, LLVM's
        reason = " ".join(str(error).split())[:200]
        warnings.warn(
            f"medseg_reg: the numba loop {name} is not used: {type(error).__name__}: {reason}",
            stacklevel=2,
        )
        return False
    return True


_TRIED = (-0.5, 0.1, 0.7)


def _try_sums(x: Tensor) -> None:
    from medseg_reg.regularizers.kernels.histogram import plain_sums  # it imports this module

    found, expected = _sums(x, _TRIED), plain_sums(x.float(), _TRIED)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if not torch.equal(found[..., 1:], expected[..., 1:]):
        raise ValueError("it counts otherwise than the plain rule")


def _try_top(x: Tensor) -> None:
    from medseg_reg.regularizers.kernels.histogram import plain_sums, scores_of

    scores = scores_of(plain_sums(x.float(), _TRIED), 63, 2.0, True)[2]
    found, expected = _top(x, _TRIED, 2.0, True, 2).topk(2), scores.topk(2)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-4, atol=1e-4)
    if not torch.equal(found.indices, expected.indices):
        raise ValueError("it selects otherwise than the plain rule")


def _try_filter(x: Tensor) -> None:
    from medseg_reg.regularizers.kernels.planes import plain_filter

    index = torch.tensor([[4, 1], [0, 3]])
    chosen = torch.tensor([[True, True], [False, True]])
    for zero in (False, True):
        found, expected = _filter(x, index, chosen, zero), plain_filter(x, index, chosen, zero)
        within = 1e-4 if x.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(found, expected, rtol=within, atol=within)

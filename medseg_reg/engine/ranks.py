"""Which of the processes of a training this one is."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_only


def is_first_process() -> bool:
    """Whether this is the first process of a training, or its only one: it prints and writes.

    >>> is_first_process()
    True
    """
    # Lightning hangs the number onto the function when it is imported.
    return bool(rank_zero_only.rank == 0)  # type: ignore[attr-defined]

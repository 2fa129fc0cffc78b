"""Two processes of one training, for tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_two_processes(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """Do work in two processes that form a group; return what each returns, by rank.

    They are forked, so that they need not import everything again. So it must run before tests
    that a fork harms, see `pytest_collection_modifyitems` in conftest.py.

    Args:
        work: gets the rank; returns something that torch saves without code.
        folder: an empty one.
    """
    mp.start_processes(_one, args=(work, str(folder)), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def _one(rank: int, work: Callable[[int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(work(rank), f"{folder}/{rank}.pt")
    dist.destroy_process_group()

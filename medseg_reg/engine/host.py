"""What a training sets once in its process for the CPU: the memory allocator and the threads."""

from __future__ import annotations

import ctypes
import math
import os
import platform
from pathlib import Path

import torch

# Parameters of glibc's mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER_TRIM = 2**31 - 1
CGROUP = Path("/sys/fs/cgroup")


def prepare_process(keep_memory: bool) -> None:
    """Set threads and, if wanted, the allocator of a process that is there for one training."""
    use_allowed_cores()
    if keep_memory:
        keep_freed_memory()


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next allocation; return whether that was possible.

    By default glibc asks the system for each block of 32 MiB and more, and gives it back when it
    is freed. A training step allocates and frees the same large maps each time, and the system
    fills each of their pages with zeros anew. Afterwards the process holds what it once needed,
    and more of it for gaps between blocks, until it ends. Elsewhere than on glibc nothing is done.

    Source:
        mallopt(3), Linux man-pages: M_MMAP_MAX, M_TRIM_THRESHOLD.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM))


def use_allowed_cores() -> int:
    """Let torch compute with no more threads than the cores that its container may use.

    torch counts the cores of the machine; where a container may use fewer, its threads take turns
    and wait for each other. A number that the user gave, by OMP_NUM_THREADS, is kept.

    Returns:
        The number of threads.
    """
    allowed = core_quota()
    if allowed is not None and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), max(1, math.ceil(allowed))))
    return torch.get_num_threads()


def core_quota(folder: Path = CGROUP) -> float | None:
    """Return the cores that the container may use at a time, or None where nothing limits them.

    Args:
        folder: the mounted control group, of version 2 (cpu.max) or 1 (cpu.cfs_quota_us).
    """
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = (
                (folder / "cpu" / f"cpu.cfs_{name}_us").read_text().strip()
                for name in ("quota", "period")
            )
        except OSError:
            return None
    # `max`, or -1 in version 1: no limit.
    return int(quota) / int(period) if quota.isdigit() and int(period) else None

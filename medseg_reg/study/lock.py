"""One study at a time in a directory."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medseg_reg.errors import MedsegError


@contextmanager
def locked(folder: Path, patience: float = 10.0) -> Iterator[int]:
    """Hold the lock of a directory while the block runs; yield the descriptor that holds it.

    The lock belongs to the open file, not to the process: it ends when the last process that has
    inherited the descriptor has ended, however it ended.

    Args:
        folder: the directory.
        patience: seconds to wait for the processes of a study that has just been killed.

    Raises:
        MedsegError: another study is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        end = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
                    raise MedsegError(
                        f"{folder}: another study is at work there ({holder or 'unknown'}). Wait "
                        "for it, stop it, or choose another directory with `run=DIR`."
                    ) from None
                time.sleep(0.1)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)

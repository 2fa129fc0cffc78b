"""Ctrl-C and SIGTERM: the first asks to stop after a checkpoint, the second stops at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """Notes a signal while its block runs; the handlers that were there come back after it.

    Schedulers such as SLURM send SIGTERM some time before they kill a job.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self.install()
        return self

    def install(self) -> None:
        """Set the handlers, also over those that Lightning has set in the meantime.

        Lightning's own handler for SIGTERM ends the process without a checkpoint, and with
        exit code 0.
        """
        # Only the main thread may set handlers; elsewhere the embedding program decides.
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                before = signal.signal(number, self._note)
                self._before.setdefault(number, before)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        name = signal.Signals(number).name
        print(f"\n{name}: stopping after a checkpoint; once more stops at once.", flush=True)

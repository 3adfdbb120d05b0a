"""Stop on request: signals and the death of the launcher become a flag that the loop reads.

The launcher kills its workers 30 s after SIGTERM, or dies itself and leaves them behind; in both cases the
run saves at its next step and exits with 75.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

POLL_SECONDS = 1.0


class Interrupt:
    """Whether this process has been asked to stop, and why."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._parent = os.getppid()
        self._previous = {
            number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)
        }
        self._done = threading.Event()
        threading.Thread(target=self._watch_parent, name="watch-parent", daemon=True).start()

    @property
    def requested(self) -> bool:
        return self.reason is not None

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: stop at once
        self.reason = signal.Signals(number).name

    def _watch_parent(self) -> None:
        while not self._done.wait(POLL_SECONDS):
            if os.getppid() != self._parent:
                self.reason = "the launcher is gone"
                return

    def close(self) -> None:
        """Restore the former handlers."""
        self._done.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

"""Stop on request: signals and the death of a launcher.

While a run trains, a request is a flag that all ranks agree on at their next step, batch of an evaluation or
sampled token; they save and exit with 75. Where there is nothing to save (setting up, the first compilation),
a request ends the process at once, with 75 as well. The launcher kills its workers 30 s after SIGTERM, or
dies itself and leaves them behind: the processes above this one are watched.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from training.errors import EXIT_PREEMPTED
from training.processes import launchers, lost_launcher

POLL_SECONDS = 1.0
END = 0  # no signal's number
LEAVE_SECONDS = 10.0  # a main thread that doesn't leave at once by then is stuck outside Python


class StopRequested(SystemExit):
    """Raised in the main thread by a request to stop when there is nothing to save."""

    def __init__(self) -> None:
        super().__init__(EXIT_PREEMPTED)


class Interrupt:
    """Whether this process has been asked to stop, and why.

    A signal reaches a thread through a pipe too: the main thread may be in a collective, where Python runs no
    handler.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._requested_at = 0.0
        self._at_once = False
        self._num_interrupts = 0
        self._launchers = launchers()
        if lost := lost_launcher(self._launchers):
            self.reason = f"its launcher, {lost}, is gone"
        numbers = [signal.SIGTERM, signal.SIGINT]
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):  # the last two warn in Slurm's jobs
            if signal.getsignal(number) == signal.SIG_DFL:  # SIGHUP is not under nohup
                numbers.append(number)
        self._previous = {number: signal.signal(number, self._on_signal) for number in numbers}
        self._receiver, self._sender = os.pipe()
        os.set_blocking(self._sender, False)
        self._previous_sender = signal.set_wakeup_fd(self._sender, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="watch-launchers", daemon=True)
        self._thread.start()

    @property
    def requested(self) -> bool:
        return self.reason is not None

    def request(self, reason: str) -> None:
        """Ask this process to stop, from any thread."""
        if not self.requested:
            self.reason, self._requested_at = reason, time.monotonic()
            if self._at_once:  # the main thread's handler raises
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a request raises StopRequested in the main thread instead of waiting to be asked for."""
        if self.requested:
            raise StopRequested
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._num_interrupts += number == signal.SIGINT
        if self._num_interrupts > 1:
            raise KeyboardInterrupt  # asked twice: stop here
        self._note(number)
        if self._at_once:
            self._at_once = False  # once: what is raised now may clean up
            raise StopRequested

    def _note(self, number: int) -> None:
        if not self.requested:
            self.reason, self._requested_at = signal.Signals(number).name, time.monotonic()

    def _watch(self) -> None:
        while True:
            if select.select([self._receiver], [], [], POLL_SECONDS)[0]:
                numbers = os.read(self._receiver, 100)
                if END in numbers:
                    return
                for number in set(numbers) & set(self._previous):
                    self._note(number)
            if not self.requested:
                gone = [process.pid for process in self._launchers if not process.is_running()]
                if gone:
                    self.request(f"the launcher, process {gone[0]}, is gone")
            elif self._at_once and time.monotonic() - self._requested_at > LEAVE_SECONDS:
                os._exit(EXIT_PREEMPTED)

    def close(self) -> None:
        """Restore the former handlers; once asked to stop, the process is leaving and ignores more."""
        signal.set_wakeup_fd(self._previous_sender)
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if self.requested else handler)
        os.write(self._sender, bytes([END]))
        self._thread.join()
        os.close(self._sender)
        os.close(self._receiver)

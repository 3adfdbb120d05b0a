"""Heartbeats: a rank that dies is noticed in seconds, and one that stands still within a limit, by all.

A thread of every rank writes heartbeats/rank00000.json into the run's folder each second: its process, step
and phase, a count of its progress, and the Python stack of its main thread. Files need no connection: they
can be read while a rank is stopped or the network is stuck. Nothing is read while training makes progress.

- A process of this host that is gone while this rank waits: a line names it, and this rank exits with 1.
- A rank that was asked to stop while nothing was to be saved: this rank is asked too.
- No rank has made progress for `limit_seconds` of training, or for half a minute while a signal holds a rank
  of this host: one of the live ranks writes step, phase and stack of each to train.log and stderr; all exit
  with 1, and those of this host that can't are killed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.files import explain_write_errors, read_json_object
from training.distributed import World
from training.errors import EXIT_FAILED, SettingError
from training.interrupt import Interrupt, StopRequested
from training.processes import Process, pid_space, this_process
from training.run_folder import RunFolder

POLL_SECONDS = 1.0
WAITING_SECONDS = 3.0  # a rank without progress for so long looks at the others
GONE_SECONDS = 3.0  # so long may a rank take to fail by itself when another has gone
FROZEN_SECONDS = 5.0  # a rank without a heartbeat for so long has no running thread
STOPPED_SECONDS = 30.0  # a rank of this host that a signal holds for so long is not waited for
SUSPENDED_SECONDS = 10.0  # a wait for the next look that takes so long was a suspension of this process
LOCKED_LIMITS = 10  # a rank whose watching thread doesn't run is ended after so many times the usual limit
LIMIT_BYTES = 2**20


@dataclass(slots=True)
class _Peer:
    """What this rank has seen of another; times are this process's monotonic clock."""

    heartbeat: dict[str, Any] = field(default_factory=dict)
    beat_at: float = 0.0
    progress_at: float = 0.0
    gone_at: float | None = None
    stopped_at: float | None = None

    def update(self, heartbeat: dict[str, Any], now: float) -> None:
        if heartbeat.get("beat") != self.heartbeat.get("beat"):
            self.beat_at = now
        if heartbeat.get("progress") != self.heartbeat.get("progress"):
            self.progress_at = now
        self.heartbeat = heartbeat

    def process(self) -> Process | None:
        """Its process, if it runs on this host."""
        if self.heartbeat.get("host") != socket.gethostname() or self.heartbeat.get("space") != pid_space():
            return None
        return Process(self.heartbeat["pid"], self.heartbeat["started"])


class Watchdog:
    """Watches this rank and its peers, in a `with` statement.

    Args:
        start_id: the same on all ranks of this start, so that files of an earlier one don't count.
        limit_seconds: of training in which no rank makes progress.
    """

    def __init__(
        self, folder: RunFolder, world: World, interrupt: Interrupt, start_id: str, limit_seconds: float
    ) -> None:
        self._folder, self._world, self._interrupt = folder, world, interrupt
        self._limit_seconds = self._usual_limit_seconds = limit_seconds
        self._process = this_process()
        self._fixed = {
            "start": start_id,
            "host": socket.gethostname(),
            "space": pid_space(),
            "pid": self._process.pid,
            "started": self._process.started,
        }
        self._step, self._phase = 0, "setting up"
        self._stopped: str | None = None
        self._progress, self._progress_at, self._beat = 0, time.monotonic(), 0
        self._training = False
        self._peers = {rank: _Peer() for rank in range(world.size) if rank != world.rank}
        self._looked_at = 0.0
        with explain_write_errors(folder.path):
            folder.heartbeats.mkdir(exist_ok=True)
        if self._peers:
            self._write()  # before anything can end this process: the others know whom to look for
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def progress(self, step: int, phase: str, limit_seconds: float = 0.0) -> None:
        """The main thread has made progress: it is at this step and in this phase of training.

        Args:
            limit_seconds: how long this phase may take, if that is more than the usual limit.
        """
        self._progress_at = time.monotonic()  # before the limit, which may be a shorter one
        self._progress += 1
        self._step, self._phase, self._training = step, phase, True
        self._limit_seconds = max(limit_seconds, self._usual_limit_seconds)

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        """End the thread. A rank that leaves in order takes its file along; else it shows that it is gone."""
        self._done.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if error is None or isinstance(error, SettingError):
            with contextlib.suppress(OSError):
                self._path(self._world.rank).unlink(missing_ok=True)
                self._folder.heartbeats.rmdir()
        elif isinstance(error, StopRequested):
            self._stopped = str(self._interrupt.reason)
            self._write()
        elif isinstance(error, RuntimeError):
            self._blame_others()

    def _blame_others(self) -> None:
        """A collective failed: leave like a rank that was asked to stop, or name the ranks that are gone."""
        deadline = time.monotonic() + GONE_SECONDS
        gone: list[int] = []
        while not gone and time.monotonic() < deadline:
            self._look()
            if any(peer.heartbeat.get("stopped") for peer in self._peers.values()):
                raise StopRequested
            gone = [rank for rank, peer in self._peers.items() if peer.gone_at is not None]
            time.sleep(0.1)
        if gone:
            self._say(self._describe(gone))
            raise SystemExit(EXIT_FAILED)

    def _describe(self, ranks: list[int]) -> str:
        """One line on ranks that are gone."""
        seen = {rank: self._peers[rank].heartbeat for rank in ranks}
        return "; ".join(
            f"rank {rank} (process {beat['pid']} on {beat['host']}) is gone, "
            f"last seen at step {beat['step']}, {beat['phase']}"
            for rank, beat in seen.items()
        )

    def _path(self, rank: int) -> Path:
        return self._folder.heartbeats / f"rank{rank:05d}.json"

    def _run(self) -> None:
        while not self._wait():
            now = time.monotonic()
            if self._peers:
                self._write()
            if self._training:  # should this thread stop too, because the main thread holds Python's lock
                faulthandler.dump_traceback_later(LOCKED_LIMITS * self._limit_seconds, exit=True)
            if now - self._progress_at < WAITING_SECONDS or now - self._looked_at < len(self._peers) / 32:
                continue
            self._look()
            self._leave_if_alone(now)
            if not self._training:
                continue
            limit_seconds = self._limit_seconds
            standing_seconds = now - self._progress_at  # there may be progress since
            if standing_seconds > limit_seconds and not self._others_make_progress(now):
                self._report_and_exit(
                    f"no rank has made progress for {limit_seconds:.0f} s: stopping. "
                    "If a step may take longer, raise engine.watchdog_seconds."
                )
            if standing_seconds > STOPPED_SECONDS and self._waits_for_a_stopped_rank(now):
                self._report_and_exit(f"no rank has made progress for {STOPPED_SECONDS:.0f} s: stopping.")

    def _wait(self) -> bool:
        """Wait for the next look; whether it was the last.

        A wait that takes far longer was a suspension of the job (Ctrl-Z, `scontrol suspend`): all limits
        begin anew when it goes on.
        """
        asleep_at = time.monotonic()
        is_done = self._done.wait(POLL_SECONDS)
        now = time.monotonic()
        if now - asleep_at > SUSPENDED_SECONDS:
            self._progress_at = now
            for peer in self._peers.values():
                peer.beat_at = peer.progress_at = now
                peer.stopped_at = None
        return is_done

    def _write(self) -> None:
        self._beat += 1
        state = {
            "step": self._step,
            "phase": self._phase,
            "progress": self._progress,
            "beat": self._beat,
            "stopped": self._stopped,
            "stack": _main_stack(),
        }
        temporary = self._path(self._world.rank).with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(self._fixed | state))
            os.replace(temporary, self._path(self._world.rank))
        except OSError:  # a full disk ends the run elsewhere, with its own message; others may pass
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _look(self) -> None:
        """Read the others' files."""
        now = self._looked_at = time.monotonic()
        for rank, peer in self._peers.items():
            try:
                heartbeat = read_json_object(self._path(rank), LIMIT_BYTES)
            except (DataError, OSError):  # not there yet, it has left in order, or the disk fails for now
                peer.gone_at = None
                continue
            if heartbeat.get("start") != self._fixed["start"]:
                continue
            peer.update(heartbeat, now)
            process = peer.process()
            is_stopped = process is not None and process.is_stopped()
            peer.stopped_at = (peer.stopped_at or now) if is_stopped else None
            if heartbeat["stopped"] is not None:
                self._interrupt.request(f"rank {rank} was asked to stop: {heartbeat['stopped']}")
            elif process is not None and not process.is_running():
                peer.gone_at = peer.gone_at or now

    def _leave_if_alone(self, now: float) -> None:
        gone = [
            rank for rank, peer in self._peers.items() if peer.gone_at and now - peer.gone_at > GONE_SECONDS
        ]
        if gone:
            self._say(self._describe(gone))
            os._exit(EXIT_FAILED)

    def _others_make_progress(self, now: float) -> bool:
        return any(now - peer.progress_at < self._limit_seconds for peer in self._peers.values())

    def _waits_for_a_stopped_rank(self, now: float) -> bool:
        held = [peer.stopped_at for peer in self._peers.values() if peer.stopped_at is not None]
        return any(now - since > STOPPED_SECONDS for since in held)

    def _report_and_exit(self, reason: str) -> None:
        """Say why, and where every rank stands; end this process, and those of this host that are frozen."""
        now = time.monotonic()
        frozen = {rank for rank, peer in self._peers.items() if now - peer.beat_at > FROZEN_SECONDS}
        if any(rank < self._world.rank for rank in self._peers.keys() - frozen):
            time.sleep(GONE_SECONDS)  # a lower rank reports
            os._exit(EXIT_FAILED)
        own = self._fixed | {"step": self._step, "phase": self._phase, "stack": _main_stack()}
        beats = {rank: peer.heartbeat for rank, peer in self._peers.items() if peer.heartbeat}
        beats[self._world.rank] = own
        self._say(reason)
        for rank, beat in sorted(beats.items()):
            note = " (stopped, or its host is gone; its stack as last seen)" if rank in frozen else ""
            where = f"process {beat['pid']} on {beat['host']}, step {beat['step']}, {beat['phase']}"
            self._say(f"rank {rank}: {where}{note}\n{beat['stack']}".rstrip())
        for rank in frozen:
            process = self._peers[rank].process() if self._peers[rank].heartbeat else None
            if process is not None and process.is_running():
                os.kill(process.pid, signal.SIGKILL)
        os._exit(EXIT_FAILED)

    def _say(self, text: str) -> None:
        """To stderr and, from any rank, to train.log."""
        print(text, file=sys.stderr, flush=True)
        with contextlib.suppress(OSError), open(self._folder.log, "a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


def _main_stack() -> str:
    """The Python stack of the main thread."""
    ident = threading.main_thread().ident
    return "".join(traceback.format_stack(sys._current_frames().get(ident or 0)))

"""Which processes are alive, told apart from later ones that were given the same number.

Read from /proc, so on Linux only; elsewhere nothing is known and nobody is taken for dead.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
# A shell above the launcher may go (nohup, a closed terminal): the run is meant to outlive it.
SHELLS = {"sh", "bash", "dash", "zsh", "fish", "ksh", "csh", "tcsh"}


class _Status(NamedTuple):
    name: str
    state: str
    parent: int
    started: int


@dataclass(frozen=True, slots=True)
class Process:
    """A process on this host; `started` is in clock ticks since boot."""

    pid: int
    started: int

    def is_running(self) -> bool:
        """Whether it still exists and is not a zombie."""
        if not PROC.exists():
            return True
        status = _status(self.pid)
        return status is not None and status.started == self.started and status.state not in "ZX"

    def is_stopped(self) -> bool:
        """Whether a signal (SIGSTOP, Ctrl-Z) or a debugger holds it."""
        status = _status(self.pid)
        return status is not None and status.started == self.started and status.state in "Tt"


@functools.cache
def pid_space() -> str:
    """Names what this process's numbers belong to: one boot of one host, and a container's own count there.

    Containers, and copies of a machine, may share a host name.
    """
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {(PROC / 'self/ns/pid').readlink()}"
    except OSError:
        return ""


def this_process() -> Process:
    """The process that asks."""
    return _process(os.getpid()) or Process(os.getpid(), 0)


def launchers() -> list[Process]:
    """The processes above this one, up to the first shell: those that started the run."""
    found: list[Process] = []
    pid = os.getppid()
    while pid > 1:
        status = _status(pid)
        if status is None or status.name in SHELLS:
            break
        found.append(Process(pid, status.started))
        pid = status.parent
    return found


def lost_launcher(above: list[Process]) -> str | None:
    """The launcher that has ended before this process could look, or None; `above`: `launchers()`.

    torchrun starts ranks itself; `deepspeed` starts launch.py, in its own process group, and that starts
    them. An orphan is reparented to process 1, which in a container may be the launcher itself.
    """
    top = above[-1].pid if above else os.getpid()
    status = _status(top)
    if status is None or status.parent != 1:
        return None
    if not above and "TORCHELASTIC_RUN_ID" in os.environ:
        name = "torchrun"
    elif b"deepspeed.launcher.launch" in _command(top) and os.getpgid(top) != top:
        name = "deepspeed"
    else:
        return None
    first = b" ".join(_command(1))
    return None if b"torch" in first or b"deepspeed" in first else name


def _command(pid: int) -> list[bytes]:
    """The words of its command line; empty where there is no such process."""
    try:
        return (PROC / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def _process(pid: int) -> Process | None:
    status = _status(pid)
    return Process(pid, status.started) if status else None


def _status(pid: int) -> _Status | None:
    """Fields of /proc/<pid>/stat; None where there is no such process."""
    try:
        text = (PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    name, _, rest = text.partition("(")[2].rpartition(")")
    fields = rest.split()
    return _Status(name, state=fields[0], parent=int(fields[1]), started=int(fields[19]))

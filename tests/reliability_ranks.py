"""Ranks of tiny runs for the reliability tests: forked from a server that has imported everything once.

`launch` starts the ranks of a run as a launcher does, but in half a second instead of ten. `faults` are
functions of tests/reliability_faults.py, called in the rank before it trains: they patch what is to fail.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import reliability_faults
from training_helpers import ROOT, environment, settings

PRELOADED = ["reliability_preload"]
# no evaluation of its own: what a test needs it switches on
QUICK = ["save_every=1", "keep_checkpoints=3", "eval_tokens=200"]


@dataclass
class Ranks:
    """Processes of one run, rank by rank, and what each wrote to stderr."""

    processes: list[BaseProcess]
    logs: list[Path]

    def wait(self, timeout: float = 120) -> list[int | None]:
        """Exit codes; None for a rank that is still there after `timeout` seconds (it is killed)."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join()
        return codes

    def stderr(self, rank: int = 0) -> str:
        return self.logs[rank].read_text()

    def signal(self, number: int, rank: int) -> None:
        os.kill(self.processes[rank].pid, number)


@functools.cache
def _server():
    """The fork server, started without what this process has set for other tests."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment())
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    try:
        from multiprocessing import forkserver

        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def launch(
    folder: Path,
    arguments: list[str],
    num_ranks: int = 1,
    faults: dict[int, list[tuple]] | None = None,
    command: str = "train.py",
    **variables: str,
) -> Ranks:
    """Start the ranks of `python COMMAND ARGUMENTS`.

    Args:
        folder: takes the ranks' stderr.
        command: a script, or a module without .py.
        faults: by rank, (name of a function in reliability_faults, arguments…).
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    processes, logs = [], []
    for rank in range(num_ranks):
        log = folder / f"stderr{rank}"
        started = environment(rank, num_ranks, port) | variables
        rank_faults = (faults or {}).get(rank, [])
        process = _server().Process(target=_run_rank, args=(command, arguments, started, log, rank_faults))
        process.start()
        processes.append(process)
        logs.append(log)
    return Ranks(processes, logs)


def train(
    text: Path,
    run_dir: Path,
    *more: str,
    num_ranks: int = 1,
    faults=None,
    stderr: Path | None = None,
    **variables,
) -> Ranks:
    """Start a tiny run in run_dir; `stderr` is a folder for what the ranks write there."""
    arguments = settings(text, run_dir, *QUICK, *more)
    return launch(stderr or run_dir.parent / "stderr", arguments, num_ranks, faults, **variables)


def _run_rank(
    command: str, arguments: list[str], variables: dict[str, str], log: Path, faults: list[tuple]
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the fork server ignores it
    os.environ.clear()
    os.environ.update(variables)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    os.chdir(ROOT)
    sys.argv = [command, *arguments]
    reliability_faults.apply(faults)
    if command.endswith(".py"):
        runpy.run_path(command, run_name="__main__")
    else:
        runpy.run_module(command, run_name="__main__", alter_sys=True)

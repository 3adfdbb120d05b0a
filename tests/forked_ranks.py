"""Ranks of tiny runs, forked from a server that has imported everything once.

`launch` starts the ranks of a command as a launcher does, but in half a second instead of ten. `faults` are
functions of tests/reliability_faults.py, called in the rank before it trains: they patch what is to fail.
Their report is left out (tests/forked_preload.py).
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import runpy
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import reliability_faults

from training.distributed import free_port

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = ["forked_preload"]


def environment(rank: int = 0, num_ranks: int = 1, port: int = 0) -> dict[str, str]:
    """What a launcher would set; nothing for a single process."""
    values = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TRITON_INTERPRET"):
        values.pop(name, None)
    if num_ranks > 1:
        values |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
        values |= {"LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return values


@dataclass
class Ranks:
    """Processes of one run, rank by rank, and the folder that takes what each writes."""

    processes: list[BaseProcess]
    folder: Path

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

    def stdout(self, rank: int = 0) -> str:
        return (self.folder / f"stdout{rank}").read_text()

    def stderr(self, rank: int = 0) -> str:
        return (self.folder / f"stderr{rank}").read_text()

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
    command: list[str],
    num_ranks: int = 1,
    faults: dict[int, list[tuple]] | None = None,
    cwd: Path = ROOT,
    **variables: str,
) -> Ranks:
    """Start the ranks of `python COMMAND`.

    Args:
        folder: takes the ranks' stdout and stderr.
        command: [SCRIPT, …], with the script's path in the repository, [-m, MODULE, …] or [-c, CODE, …].
        faults: by rank, (name of a function in reliability_faults, arguments…).
    """
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    processes = []
    for rank in range(num_ranks):
        started = environment(rank, num_ranks, port) | variables
        logs = [folder / f"stdout{rank}", folder / f"stderr{rank}"]
        rank_faults = (faults or {}).get(rank, [])
        process = _server().Process(target=_run_rank, args=(command, cwd, started, logs, rank_faults))
        process.start()
        processes.append(process)
    return Ranks(processes, folder)


def _run_rank(
    command: list[str], cwd: Path, variables: dict[str, str], logs: list[Path], faults: list[tuple]
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the fork server ignores it
    os.environ.clear()
    os.environ.update(variables)
    for number, log in enumerate(logs, 1):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    os.chdir(cwd)
    reliability_faults.apply(faults)
    match command:
        case ["-c", code, *arguments]:
            sys.argv = ["-c", *arguments]
            exec(code, {"__name__": "__main__"})
        case ["-m", module, *arguments]:
            sys.argv = [module, *arguments]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case _:
            sys.argv = command
            runpy.run_path(str(ROOT / command[0]), run_name="__main__")

"""Ranks, devices, and the small messages between them.

Gradients travel through DeepSpeed. Flags and objects travel over a gloo group of their own, which needs no
GPU, so asking "shall we stop?" at every step costs no GPU synchronisation.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _abort_process_group as abort_process_group

from training.errors import EXIT_FAILED, SettingError

JOIN_SECONDS = 50.0  # a rank that comes later than this after another ends the start
JOIN_POLL_SECONDS = 0.1
T = TypeVar("T")
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_set_here: list[str] = []  # the variables that `_start` has set in place of a launcher


def check_launcher() -> None:
    """Refuse a half-set launcher environment.

    Raises:
        SettingError: some of RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are set, others not.
    """
    missing = [name for name in LAUNCHER_VARIABLES if name not in os.environ]
    if "RANK" in os.environ and missing:
        raise SettingError(
            f"RANK is set but {', '.join(missing)} not. "
            "Start with deepspeed or torchrun, which set all of them, or unset RANK for one process."
        )


def is_first() -> bool:
    """Whether the launcher made this the first rank; for words before there is a World."""
    return os.environ.get("RANK", "0") == "0"


def is_restart() -> bool:
    """Whether torchrun has started these ranks again after a failure (--max-restarts)."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


@dataclass(slots=True)
class World:
    """This process among the others.

    Attributes:
        device: where this rank computes.
        control: gloo group for flags and objects; None with one rank.
    """

    rank: int
    size: int
    device: torch.device
    control: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this rank prints and writes."""
        return self.rank == 0

    def log(self, text: str) -> None:
        """A line on the first rank's stderr."""
        if self.is_first:
            print(text, file=sys.stderr, flush=True)

    def max(self, value: int) -> int:
        """The largest value of any rank, on every rank."""
        if self.size == 1:
            return value
        largest = torch.tensor(value)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.control)
        return int(largest.item())

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise fp64 sums over ranks."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank, in rank order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def from_first(self, value: Any) -> Any:
        """The first rank's value, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def on_all(self, work: Callable[[], T]) -> T:
        """This rank's result of `work`; an error of a user's on any rank is raised on all."""
        problem = None
        try:
            value = work()
        except SettingError as error:
            problem = str(error)
        problems = [text for text in self.gather(problem) if text is not None]
        if problems:
            raise SettingError(problems[0])
        return value

    def on_first(self, work: Callable[[], Any]) -> Any:
        """What `work` returns on the first rank, on every rank; an error of a user's is raised on all."""
        problem, value = None, None
        if self.is_first:
            try:
                value = work()
            except SettingError as error:
                problem = str(error)
        problem, value = self.from_first((problem, value))
        if problem is not None:
            raise SettingError(problem)
        return value


@contextmanager
def process_group(timeout_minutes: float, join_seconds: float = JOIN_SECONDS) -> Iterator[World]:
    """The process group that the launcher describes, or a group of one, for the block.

    A rank that leaves the block, or by a `SettingError`, leaves in order with all others. By any other error
    it leaves alone: its connections are aborted, as NCCL's orderly end waits for every rank of the host, and
    those may be waiting for this one.

    A group of one is described in the environment too, where DeepSpeed looks.

    Args:
        timeout_minutes: how long a collective may take before the run ends.
        join_seconds: how long to wait for the other ranks before saying which are missing and leaving.
    """
    leave = abort_process_group
    try:
        yield _start(timeout_minutes, join_seconds)
        leave = dist.destroy_process_group
    except SettingError:
        leave = dist.destroy_process_group
        raise
    finally:
        if dist.is_initialized():
            leave()
        while _set_here:
            os.environ.pop(_set_here.pop(), None)


def _start(timeout_minutes: float, join_seconds: float) -> World:
    check_launcher()
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(free_port())
        _set_here.extend(LAUNCHER_VARIABLES)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
    store = _meet(rank, size, join_seconds)
    timeout = timedelta(minutes=timeout_minutes)
    store.set_timeout(timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    control = dist.new_group(backend="gloo", timeout=timeout) if size > 1 else None
    return World(rank, size, device, control)


def _meet(rank: int, size: int, join_seconds: float) -> dist.Store:
    """Wait until every rank has come to the store; returns it.

    Raises:
        SettingError: the port can't be used.
        SystemExit: ranks are missing; stderr says which.
    """
    try:
        store = _open_store(rank, size, join_seconds)
    except dist.DistNetworkError as error:
        where = f"MASTER_PORT={os.environ['MASTER_PORT']} on {os.environ['MASTER_ADDR']}"
        if rank > 0 and "timed out" in str(error):
            _leave(f"rank 0 was not at {where} within {join_seconds:.0f} s (engine.join_seconds).")
        raise SettingError(
            f"{where} can't be used ({str(error)[:60]}…). "
            "Another job may hold it: give the launcher another --master_port."
        ) from None
    deadline = time.monotonic() + join_seconds
    try:
        store.set(f"rank {rank}", "is here")
        num_ranks = store.add("ranks", 1)
        while num_ranks < size and time.monotonic() < deadline:
            time.sleep(JOIN_POLL_SECONDS)
            num_ranks = store.add("ranks", 0)
        missing = [] if num_ranks == size else [r for r in range(size) if not store.check([f"rank {r}"])]
    except (dist.DistNetworkError, dist.DistStoreError):
        _leave("rank 0 has left before all ranks had come: see what it said.")
    if missing:
        names = ", ".join(map(str, missing))
        _leave(f"rank {names} of {size} did not come within {join_seconds:.0f} s (engine.join_seconds).")
    return store


def _open_store(rank: int, size: int, join_seconds: float) -> dist.Store:
    """The store that the first rank holds, or under torchrun its agent.

    An agent's outlives the ranks: keys of each restart, and of each run of `train.py -m`, are its own.
    """
    held_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        size,
        is_master=rank == 0 and not held_by_torchrun,
        timeout=timedelta(seconds=join_seconds / 2),  # it tries twice
        wait_for_workers=False,
        multi_tenant=True,
    )
    start = " ".join(os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "MULTIRUN_POINT"))
    return dist.PrefixStore(f"start {start}", store)


def _leave(reason: str) -> NoReturn:
    """End this process, whose group can't be formed."""
    print(f"stopping: {reason}", file=sys.stderr, flush=True)
    raise SystemExit(EXIT_FAILED)


def free_port() -> int:
    """A port of this host that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

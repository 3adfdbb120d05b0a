"""Ranks, devices, and the small messages between them.

Gradients travel through DeepSpeed. Flags and objects travel over a gloo group of their own, which needs no
GPU, so asking "shall we stop?" at every step costs no GPU synchronisation.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from training.errors import USER_ERRORS, SettingError

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


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

    def max(self, value: int) -> int:
        """The largest value of any rank, on every rank."""
        if self.size == 1:
            return value
        largest = torch.tensor(value)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.control)
        return int(largest.item())

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank; every rank gets the same answer."""
        return bool(self.max(int(flag)))

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

    def on_first(self, work: Callable[[], Any]) -> Any:
        """What `work` returns on the first rank, on every rank; an error of a user's is raised on all."""
        problem, value = None, None
        if self.is_first:
            try:
                value = work()
            except USER_ERRORS as error:
                problem = str(error)
        problem, value = self.from_first((problem, value))
        if problem is not None:
            raise SettingError(problem)
        return value


def start(timeout_minutes: float) -> World:
    """Join the process group that the launcher describes, or form a group of one.

    Args:
        timeout_minutes: how long a collective may take before the run ends.
    """
    check_launcher()
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(_free_port())
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    try:
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout)
    except dist.DistNetworkError as error:
        raise SettingError(
            f"MASTER_PORT={os.environ['MASTER_PORT']} on {os.environ['MASTER_ADDR']} can't be used "
            f"({str(error)[:60]}…). Another job may hold it: give the launcher another --master_port."
        ) from None
    control = dist.new_group(backend="gloo", timeout=timeout) if size > 1 else None
    return World(rank, size, device, control)


def stop() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

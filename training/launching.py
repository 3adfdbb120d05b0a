"""Commands in processes of their own on free GPUs: starting, finding and stopping them.

Every process that such a command starts carries a folder in the environment variable SWEEP_POINT. That is how
a launcher's workers are found when they have to stop, also those that a killed command left behind.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from training.distributed import free_port
from training.errors import SettingError

ROOT = Path(__file__).resolve().parent.parent
MARKER = "SWEEP_POINT"
POLL_SECONDS = 0.2
STOP_SECONDS = 60.0  # from SIGTERM to SIGKILL; DeepSpeed's launcher gives its workers 30
FREE_SHARE = 0.95  # a GPU with this much of its memory free is not used by others
TAIL_BYTES = 64 * 2**10  # of a log, where the reason of a failure is looked for


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU, or one place on the CPU (`id` None)."""

    id: str | None  # as CUDA_VISIBLE_DEVICES takes it
    name: str


def free_devices() -> list[Device]:
    """The GPUs that are not in use, or one place on the CPU where there is no GPU.

    Raises:
        SettingError: there are GPUs, but all are in use.
    """
    if not torch.cuda.is_available():
        return [Device(None, f"CPU {_cpu_name()}, {os.cpu_count()} cores")]
    # in a process of its own: asking for free memory takes some of it until the process ends
    answer = subprocess.run(
        [sys.executable, "-c", _ASK_GPUS], capture_output=True, text=True, check=True, env=os.environ
    )
    gpus = json.loads(answer.stdout.splitlines()[-1])
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = names or [str(index) for index in range(len(gpus))]
    free = [
        Device(name, gpu["name"])
        for name, gpu in zip(names, gpus, strict=False)
        if gpu["free"] >= FREE_SHARE * gpu["total"]
    ]
    if not free:
        raise SettingError(f"all {len(gpus)} GPUs are in use: wait, or name others in CUDA_VISIBLE_DEVICES.")
    return free


_ASK_GPUS = """
import json, torch
gpus = []
for index in range(torch.cuda.device_count()):
    free, total = torch.cuda.mem_get_info(index)
    own = 2**30  # what this query itself takes, at most
    name = torch.cuda.get_device_name(index)
    gpus.append({"name": name, "free": min(free + own, total), "total": total})
print(json.dumps(gpus))
"""


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def device_groups(devices: list[Device], num_gpus: int) -> list[tuple[Device, ...]]:
    """The devices in groups of `num_gpus`, for one command each.

    Raises:
        SettingError: there are not enough for one.
    """
    if devices[0].id is None:
        return [(devices[0],)]
    groups = [
        tuple(devices[start : start + num_gpus]) for start in range(0, len(devices) - num_gpus + 1, num_gpus)
    ]
    if not groups:
        raise SettingError(f"sweep.num_gpus={num_gpus}, but {len(devices)} GPU(s) are free here.")
    return groups


def device_text(devices: Sequence[Device]) -> str:
    """Devices as tables name them: "2 x NVIDIA H200"."""
    return devices[0].name if len(devices) == 1 else f"{len(devices)} x {devices[0].name}"


def launch_command(
    program: list[str], launcher: str, num_ranks: int, devices: Sequence[Device]
) -> tuple[list[str], dict[str, str]]:
    """How to start `program` (a script, or "--module" and a module, and arguments), and its variables."""
    environment: dict[str, str] = {}
    on_gpu = devices[0].id is not None
    if on_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(device.id) for device in devices)
    else:
        environment["DS_ACCELERATOR"] = "cpu"
        environment["OMP_WAIT_POLICY"] = "passive"  # spinning threads starve each other on a busy machine
        if "OMP_NUM_THREADS" not in os.environ:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // num_ranks))
    if launcher == "python":
        return [sys.executable, *program], environment
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(free_port())]
    if not on_gpu:  # on GPUs the launcher takes their number from CUDA_VISIBLE_DEVICES
        command += ["--num_accelerators", str(num_ranks)]
    return [*command, *program], environment


def start_process(
    command: list[str], variables: dict[str, str], folder: Path, log: Path, cwd: Path | None = None
) -> subprocess.Popen:
    """Start a command whose processes `processes_of([folder])` finds; what they print goes to `log`.

    It has a session of its own: Ctrl-C reaches the caller alone, which then stops it.
    """
    with open(log, "wb") as output:
        return subprocess.Popen(
            command,
            cwd=cwd,
            env=os.environ | variables | {MARKER: str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def processes_of(folders: list[Path]) -> list[psutil.Process]:
    """Living processes that carry one of the folders in SWEEP_POINT, each with its `info`.

    Zombies and other users' processes are left out, since their environment can't be read.
    """
    marks = {str(folder) for folder in folders}
    processes = psutil.process_iter(["environ", "cmdline"])
    return [process for process in processes if (process.info["environ"] or {}).get(MARKER) in marks]


def stop_processes(folders: list[Path], patience_seconds: float = STOP_SECONDS) -> None:
    """End all processes with these folders: SIGTERM, and SIGKILL for those that stay.

    Args:
        patience_seconds: between the two; 0 for SIGKILL at once.
    """
    signals = [(signal.SIGTERM, patience_seconds)] if patience_seconds else []
    for number, patience in [*signals, (signal.SIGKILL, STOP_SECONDS)]:
        deadline = time.monotonic() + patience
        for process in processes_of(folders):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        while processes_of(folders):
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS)
        else:
            return


def last_lines(log: Path) -> list[str]:
    """The last lines of a command's output, without empty ones and those of DeepSpeed's launcher."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and "[launch.py:" not in line and "[runner.py:" not in line]


def commit() -> str | None:
    """The checkout's commit, with "+" if files differ from it; None outside a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None

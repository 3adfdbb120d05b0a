"""Runs the points of a sweep, each in a process of its own, as many at once as there are free GPUs for.

Every process of a point carries the point's folder in the environment variable SWEEP_POINT. That is how a
launcher's workers are found when they have to stop, also those that a killed sweep left behind.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from training.config import override
from training.distributed import free_port
from training.errors import EXIT_PREEMPTED, SettingError
from training.memory import OUT_OF_MEMORY
from training.metrics import last_step
from training.run_folder import RunFolder
from training.sweep import Manifest, Point, SweepDefinition, measure

ROOT = Path(__file__).resolve().parent.parent
MARKER = "SWEEP_POINT"
POLL_SECONDS = 0.2
STOP_SECONDS = 60.0  # from SIGTERM to SIGKILL; DeepSpeed's launcher gives its workers 30
FREE_SHARE = 0.95  # a GPU with this much of its memory free is nobody else's
TAIL_BYTES = 64 * 2**10  # of a log, where the reason of a failure is looked for
TAIL_LINES = 5


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU, or one place for a point on the CPU (`id` None)."""

    id: str | None  # as CUDA_VISIBLE_DEVICES takes it
    name: str


def free_devices() -> list[Device]:
    """The GPUs that nobody uses, or one place on the CPU where there is no GPU.

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
    own = 2**30  # what this very question takes, at most
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
    """The devices in groups for one point each.

    Raises:
        SettingError: not one point has enough GPUs.
    """
    if devices[0].id is None:
        return [(devices[0],)]
    groups = [
        tuple(devices[start : start + num_gpus]) for start in range(0, len(devices) - num_gpus + 1, num_gpus)
    ]
    if not groups:
        raise SettingError(f"sweep.num_gpus={num_gpus}, but {len(devices)} GPU(s) are free here.")
    return groups


def point_command(
    point: Point, folder: Path, launcher: str, num_ranks: int, devices: Sequence[Device]
) -> tuple[list[str], dict[str, str]]:
    """The command line of a point, and the environment variables that it needs beside the usual ones."""
    train = [str(ROOT / "train.py"), *point.settings, override("run_dir", folder)]
    return launch_command(train, launcher, num_ranks, devices)


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


@dataclass(slots=True)
class Job:
    """A point that is running."""

    point: Point
    process: subprocess.Popen
    devices: tuple[Device, ...]
    started: float


class Runner:
    """Runs points and keeps the manifest up to date.

    Args:
        folder: the sweep's; point NAME has its run in points/NAME and its output in points/NAME.log.
        groups: devices, one group for each point that runs at a time.
        command: makes a point's command and environment: `command(point, folder, devices)`.
        changed: called after every change of the manifest, with the point and its record.
        tick: called several times a second with the running points and their folders.
        keep_checkpoints: of points that are done; otherwise they are removed.
    """

    def __init__(
        self,
        folder: Path,
        sweep: SweepDefinition,
        manifest: Manifest,
        groups: list[tuple[Device, ...]],
        command: Callable[[Point, Path, Sequence[Device]], tuple[list[str], dict[str, str]]],
        changed: Callable[[Point, dict], None],
        tick: Callable[[list[tuple[Point, Path]]], None] = lambda _: None,
        keep_checkpoints: bool = False,
    ) -> None:
        self.points_folder = folder.resolve() / "points"
        self.sweep, self.manifest = sweep, manifest
        self.free, self.command, self.changed, self.tick = list(groups), command, changed, tick
        self.keep_checkpoints = keep_checkpoints
        self.jobs: list[Job] = []
        self.stop_signal: int | None = None

    def run(self, points: list[Point]) -> bool:
        """Run all `points`; True if they are finished, False if SIGINT or SIGTERM stopped them."""
        previous = {
            number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)
        }
        waiting = list(points)
        try:
            while (waiting or self.jobs) and self.stop_signal is None:
                while waiting and self.free:
                    self._start(waiting.pop(0), self.free.pop())
                time.sleep(POLL_SECONDS)
                self.tick([(job.point, self.points_folder / job.point.name) for job in self.jobs])
                for job in list(self.jobs):
                    if job.process.poll() is not None or self._has_all(job):
                        self._finish(job)
            return self.stop_signal is None
        finally:
            self._stop_all()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _) -> None:
        self.stop_signal = number

    def _start(self, point: Point, devices: tuple[Device, ...]) -> None:
        folder = self.points_folder / point.name
        folder.mkdir(parents=True, exist_ok=True)
        run = RunFolder(folder)
        is_done = self.manifest.records[point.name]["status"] == "done"  # and to be measured again
        if is_done or not self.sweep.save_every:
            shutil.rmtree(run.checkpoints, ignore_errors=True)
        if not run.has_checkpoint():
            run.metrics.unlink(missing_ok=True)  # of an earlier try: this one starts at its first step
        command, variables = self.command(point, folder, devices)
        process = start_process(command, variables, folder, folder.with_name(f"{point.name}.log"))
        self.jobs.append(Job(point, process, devices, time.monotonic()))
        self._record(point, {"status": "running", "device": device_text(devices), "commit": commit()})

    def _has_all(self, job: Job) -> bool:
        """Whether a running point has measured everything: what is left is a checkpoint that nobody keeps."""
        key = "valid_loss" if self.sweep.evaluate else "loss"
        metrics = RunFolder(self.points_folder / job.point.name).metrics
        return not self.keep_checkpoints and last_step(metrics, key) >= self.sweep.steps

    def _finish(self, job: Job) -> None:
        """Record how a point ended, and free its devices."""
        folder = self.points_folder / job.point.name
        has_all = job.process.poll() is None and self._has_all(job)
        stop_processes([folder], 0 if has_all else STOP_SECONDS)  # a launcher can end before its workers do
        ended = job.process.wait()
        code = 0 if has_all else ended
        tail = last_lines(folder.with_name(f"{job.point.name}.log"))
        measured = measure(folder, self.sweep)
        error = None
        if code == 0 and measured is not None:
            status = "done"
            if measured["loss"] is None:
                status, error = "failed", "diverged: loss or gradient of the last step is not finite"
        elif self.stop_signal is not None or code == EXIT_PREEMPTED:
            status = "stopped"
        elif reasons := [line for line in tail if any(sign in line for sign in OUT_OF_MEMORY)]:
            status, error = "oom", reasons[-1]
        else:
            status, error = "failed", " | ".join([*tail[-TAIL_LINES:], _ending(code)])
        wanted = self.keep_checkpoints if status == "done" else self.sweep.save_every > 0  # to resume from
        if not wanted:
            shutil.rmtree(RunFolder(folder).checkpoints, ignore_errors=True)
        record = {
            "status": status,
            "exit_code": code,
            "seconds": round(time.monotonic() - job.started, 1),
            "error": error,
            "measured": measured if status == "done" else None,
        }
        self.jobs.remove(job)
        self.free.append(job.devices)
        self._record(job.point, record)

    def _record(self, point: Point, values: dict) -> None:
        record = self.manifest.records[point.name]
        record.update(values)
        self.manifest.save()
        self.changed(point, record)

    def _stop_all(self) -> None:
        """End what still runs; with SIGKILL where its checkpoint would be of no use."""
        patience_seconds = STOP_SECONDS if self.sweep.save_every else 0
        stop_processes([self.points_folder / job.point.name for job in self.jobs], patience_seconds)
        for job in list(self.jobs):
            job.process.wait()
            self._finish(job)


def _ending(code: int) -> str:
    """A process's exit code in words; DeepSpeed's launcher passes on that of a killed worker modulo 256."""
    code = code - 256 if code > 256 - signal.NSIG else code
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def stop_processes(folders: list[Path], patience_seconds: float = STOP_SECONDS) -> None:
    """End all processes of the points with these folders: SIGTERM, and SIGKILL for those that stay.

    Args:
        patience_seconds: between the two; 0 for SIGKILL at once.
    """
    signals = [(signal.SIGTERM, patience_seconds)] if patience_seconds else []
    for number, patience in [*signals, (signal.SIGKILL, STOP_SECONDS)]:
        deadline = time.monotonic() + patience
        for pid in processes_of(folders):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        while processes_of(folders):
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS)
        else:
            return


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


def processes_of(folders: list[Path]) -> list[int]:
    """Living processes that carry one of the folders in SWEEP_POINT; zombies have no environment."""
    marks = {f"{MARKER}={folder}".encode() for folder in folders}
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = entry.read_bytes().split(b"\0")
        except OSError:  # ended, or another user's
            continue
        if not marks.isdisjoint(variables):
            found.append(int(entry.parent.name))
    return found


def last_lines(log: Path) -> list[str]:
    """The last lines of a point's output, without empty ones and those of DeepSpeed's launcher."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL_BYTES))
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and "[launch.py:" not in line and "[runner.py:" not in line]


def device_text(devices: Sequence[Device]) -> str:
    """Devices as tables name them: "2 x NVIDIA H200"."""
    return devices[0].name if len(devices) == 1 else f"{len(devices)} x {devices[0].name}"


def commit() -> str | None:
    """The checkout's commit, with "+" if files differ from it; None outside a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None

"""Runs the points of a sweep, each in a process of its own, as many in parallel as fit on the free GPUs."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from training.config import override
from training.errors import EXIT_PREEMPTED
from training.launching import (
    ROOT,
    STOP_SECONDS,
    Device,
    commit,
    device_text,
    last_lines,
    launch_command,
    start_process,
    stop_processes,
)
from training.metrics import last_step
from training.out_of_memory import OUT_OF_MEMORY
from training.run_folder import RunFolder
from training.sweep import Manifest, Point, SweepDefinition, measure

POLL_SECONDS = 0.2
TAIL_LINES = 5  # of a log: what is kept of a failure


def point_command(
    point: Point, folder: Path, launcher: str, num_ranks: int, devices: Sequence[Device]
) -> tuple[list[str], dict[str, str]]:
    """The command line of a point, and the environment variables to set for it."""
    train = [str(ROOT / "train.py"), *point.settings, override("run_dir", folder)]
    return launch_command(train, launcher, num_ranks, devices)


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
        """Whether a running point has logged all that is measured, and only its last save is left.

        A work-around: train.py always saves at its last step, which takes long for a large model, and without
        keep_checkpoints that checkpoint would only be deleted. So the point is ended before it is written.
        """
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
        elif (own_code := _own_code(code)) == -signal.SIGKILL:
            status, error = "failed", "killed by signal 9, as by a system that is out of memory"
        else:
            ending = f"killed by signal {-own_code}" if own_code < 0 else f"exit code {own_code}"
            status, error = "failed", " | ".join([*tail[-TAIL_LINES:], ending])
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
        """End what still runs, with SIGKILL if no checkpoint of it is wanted."""
        patience_seconds = STOP_SECONDS if self.sweep.save_every else 0
        stop_processes([self.points_folder / job.point.name for job in self.jobs], patience_seconds)
        for job in list(self.jobs):
            job.process.wait()
            self._finish(job)


def _own_code(code: int) -> int:
    """A worker's exit code, negative for a signal; DeepSpeed's launcher passes it on modulo 256."""
    return code - 256 if code > 256 - signal.NSIG else code

"""Runs a sweep in its folder, or what is missing of it, and says on the screen how it goes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from training.errors import EXIT_PREEMPTED, SettingError
from training.launching import Device, device_groups, free_devices, stop_processes
from training.metrics import read_metrics
from training.run_folder import RunFolder
from training.sweep import FINISHED, STATUSES, Manifest, Point, SweepDefinition
from training.sweep_report import write_results
from training.sweep_runner import Runner, point_command
from training.tables import duration


def run_sweep(
    folder: Path,
    sweep: SweepDefinition,
    points: list[Point],
    *,
    launcher: str = "deepspeed",
    retry: Sequence[str] = (),
    keep_checkpoints: bool = False,
    finished: Callable[[], None] = lambda: None,
) -> int:
    """Run the points that are missing and write the results whenever one ends.

    Args:
        points: of `sweep`, as `expand` lists them.
        retry: statuses to run again.
        finished: called when a point has ended and its results are written.

    Returns:
        0 if all points are done or out of memory, 1 if one failed, 75 if stopped.

    Raises:
        SettingError: the folder holds another sweep or is in use, or too few GPUs are free.
    """
    lock = RunFolder(folder)
    lock.lock()
    try:
        if lock.holds_run():
            raise SettingError(f"run_dir={folder} holds a run: choose another folder for the sweep.")
        manifest = Manifest(folder, sweep, points)
        manifest.save()
        missing = manifest.missing(points, list(retry))
        stop_processes([folder.resolve() / "points" / point.name for point in missing])  # a killed sweep's
        if missing:

            def results() -> None:
                write_results(folder, sweep, manifest, points)
                finished()

            _run(folder, manifest, sweep, points, missing, launcher, keep_checkpoints, results)
        write_results(folder, sweep, manifest, points)
    finally:
        lock.unlock()
    statuses = [manifest.records[point.name]["status"] for point in points]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in STATUSES if status in statuses)
    print(f"{folder / 'table.md'}: {counts}", file=sys.stderr)
    if any(status not in FINISHED for status in statuses):
        print("stopped; run the same command to go on.", file=sys.stderr)
        return EXIT_PREEMPTED
    return 1 if "failed" in statuses else 0


def _run(
    folder: Path,
    manifest: Manifest,
    sweep: SweepDefinition,
    points: list[Point],
    missing: list[Point],
    launcher: str,
    keep_checkpoints: bool,
    results: Callable[[], None],
) -> None:
    """Run the missing points, and rewrite the results whenever one ends."""

    def command(point: Point, point_folder: Path, devices: Sequence[Device]):
        return point_command(point, point_folder, launcher, sweep.num_gpus, devices)

    def changed(point: Point, record: dict) -> None:
        progress.changed(point, record)
        if record["status"] in FINISHED:
            results()

    groups = device_groups(free_devices(), sweep.num_gpus)
    progress = Progress(len(points), len(missing), sweep.steps)
    runner = Runner(folder, sweep, manifest, groups, command, changed, progress.tick, keep_checkpoints)
    try:
        runner.run(missing)
    finally:
        progress.close()


class Progress:
    """A bar over all points on a terminal, and one line for each point that ends."""

    def __init__(self, num_points: int, num_missing: int, steps: int) -> None:
        self.num_points, self.num_done, self.steps = num_points, num_points - num_missing, steps
        self.bar = None
        self.shown = 0.0
        if sys.stderr.isatty():
            self.bar = tqdm(total=num_points, initial=self.num_done, unit="point", dynamic_ncols=True)
        if self.num_done:
            self.say(f"{self.num_done} of {num_points} points are finished already")

    def say(self, text: str) -> None:
        """One line on the screen."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def changed(self, point: Point, record: dict) -> None:
        """Count a point that ended, and say how."""
        if record["status"] not in FINISHED:
            return
        self.num_done += 1
        if self.bar is not None:
            self.bar.update()
        self.say(f"[{self.num_done}/{self.num_points}] {point.name}: {outcome(record)}")

    def tick(self, running: list[tuple[Point, Path]]) -> None:
        """Show in the bar how far the running points are, every second."""
        if self.bar is None or time.monotonic() - self.shown < 1:
            return
        self.shown = time.monotonic()
        steps = [(point, read_metrics(RunFolder(folder).metrics)) for point, folder in running]
        texts = [f"{point.name} {lines[-1]['step'] if lines else 0}/{self.steps}" for point, lines in steps]
        self.bar.set_postfix_str(", ".join(texts))

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def outcome(record: dict) -> str:
    """How a point ended, in one line."""
    if record["status"] != "done":
        return f"{record['status']} after {duration(record['seconds'])}: {record['error']}"
    measured = record["measured"]
    mfu = "" if measured["mfu"] is None else f", MFU {measured['mfu']:.1%}"
    loss = f"loss {measured['loss']:.4f}"
    if measured["valid_loss"] is not None:
        loss = f"validation loss {measured['valid_loss']:.4f}"
    return (
        f"{measured['tokens_per_second']:,.0f} tokens/s{mfu}, {measured['peak_memory_gib']:.1f} GiB, "
        f"{loss} ({duration(record['seconds'])})"
    )

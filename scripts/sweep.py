"""Train every point of a sweep and write its table, CSV and plots.

    python -m scripts.sweep sweep=seq_len run_dir=outputs/s            the paper's table, on this machine
    python -m scripts.sweep sweep=seq_len_demo                         in miniature, on a CPU
    python -m scripts.sweep sweep=seq_len sweep.seq_lens=[1024,8192] dry_run=true

Each point is a run of train.py in a process and a folder of its own (run_dir/points/). The same command again
runs what is missing. Results: table.md, results.csv, plots/, and sweep.json, where every point's state is.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from training.config import run_command
from training.errors import EXIT_PREEMPTED, SettingError
from training.memory import GPU_MEMORY_GIB, find_gpu
from training.metrics import duration, read_metrics
from training.run_folder import RunFolder
from training.sweep import FINISHED, STATUSES, Manifest, Point, SweepDefinition, expand
from training.sweep_forecast import forecast
from training.sweep_report import write_results
from training.sweep_runner import Device, Runner, free_devices, places, point_command, stop_processes

LAUNCHERS = ("deepspeed", "python")


@dataclass(kw_only=True, slots=True)
class SweepConfig:
    """What to measure, and how to run it."""

    run_dir: str = "outputs/sweep"
    launcher: str = "deepspeed"
    retry: list[str] = field(default_factory=list)
    keep_checkpoints: bool = False
    dry_run: bool = False
    gpu: str | None = None
    sweep: SweepDefinition = field(default_factory=SweepDefinition)

    def __post_init__(self) -> None:
        if self.launcher not in LAUNCHERS:
            raise SettingError(f"launcher={self.launcher!r} is unknown. Allowed: {', '.join(LAUNCHERS)}.")
        if self.launcher == "python" and self.sweep.num_gpus > 1:
            raise SettingError(f"sweep.num_gpus={self.sweep.num_gpus} needs launcher=deepspeed.")
        unknown = sorted(set(self.retry) - set(FINISHED))
        if unknown:
            raise SettingError(
                f"retry={self.retry}: {unknown[0]} is unknown. Allowed: {', '.join(FINISHED)}."
            )
        if self.gpu is not None and find_gpu(self.gpu) is None:
            raise SettingError(f"gpu={self.gpu} is unknown. Allowed: {', '.join(GPU_MEMORY_GIB)}, or null.")


def main(config: SweepConfig) -> int:
    """Run what is missing; 0 if all points are done or out of memory, 1 if one failed, 75 if stopped."""
    points = expand(config.sweep)
    folder = Path(config.run_dir)
    if config.dry_run:
        print(forecast(config.sweep, points, config.gpu))
        return 0
    lock = RunFolder(folder)
    lock.lock()
    try:
        manifest = Manifest(folder, config.sweep, points)
        manifest.save()
        missing = manifest.missing(points, config.retry)
        stop_processes([folder.resolve() / "points" / point.name for point in missing])  # a killed sweep's
        if missing:
            _run(config, folder, manifest, points, missing)
        write_results(folder, config.sweep, manifest, points)
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
    config: SweepConfig, folder: Path, manifest: Manifest, points: list[Point], missing: list[Point]
) -> None:
    """Run the missing points, and rewrite the results whenever one ends."""

    def command(point: Point, point_folder: Path, devices: Sequence[Device]):
        return point_command(point, point_folder, config.launcher, config.sweep.num_gpus, devices)

    def changed(point: Point, record: dict) -> None:
        progress.changed(point, record)
        if record["status"] in FINISHED:
            write_results(folder, config.sweep, manifest, points)

    groups = places(free_devices(), config.sweep.num_gpus)
    progress = Progress(len(points), len(missing), config.sweep.steps)
    runner = Runner(
        folder, config.sweep, manifest, groups, command, changed, progress.tick, config.keep_checkpoints
    )
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
    loss = measured["loss"] if measured["valid_loss"] is None else measured["valid_loss"]
    return (
        f"{measured['tokens_per_second']:,.0f} tokens/s{mfu}, {measured['peak_memory_gib']:.1f} GiB, "
        f"loss {loss:.4f} ({duration(record['seconds'])})"
    )


if __name__ == "__main__":
    sys.argv = ["dry_run=true" if argument == "--dry-run" else argument for argument in sys.argv]
    run_command(main, SweepConfig, __doc__, "sweep")

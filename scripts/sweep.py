"""Train every point of a sweep and write its table, CSV and plots.

    python -m scripts.sweep sweep=seq_len run_dir=outputs/s            the paper's table, on this machine
    python -m scripts.sweep sweep=seq_len_demo                         in miniature, on a CPU
    python -m scripts.sweep sweep=seq_len sweep.seq_lens=[1024,8192] dry_run=true

Each point is a run of train.py in a process and a folder of its own (run_dir/points/). The same command again
runs what is missing. Results: table.md, results.csv, plots/, and sweep.json, where every point's state is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from training.command import run_command
from training.errors import SettingError
from training.gpus import require_gpu
from training.sweep import FINISHED, SweepDefinition, expand
from training.sweep_command import run_sweep
from training.sweep_forecast import forecast

LAUNCHERS = ("deepspeed", "python")


@dataclass(kw_only=True, slots=True)
class SweepConfig:
    """What to measure, and how to run it."""

    run_dir: str = "outputs/sweep"  # folder of the points, their results and sweep.json
    launcher: str = "deepspeed"  # deepspeed; python: one process a point, without DeepSpeed's launcher
    retry: list[str] = field(default_factory=list)  # statuses to run again: failed, oom, done
    keep_checkpoints: bool = False  # of finished points
    dry_run: bool = False  # list the points with predicted memory and time
    gpu: str | None = None  # dry run: predict for this GPU instead of the machine's
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
        if self.gpu is not None:
            require_gpu(self.gpu)


def main(config: SweepConfig) -> int:
    """Run what is missing; 0 if all points are done or out of memory, 1 if one failed, 75 if stopped."""
    points = expand(config.sweep)
    folder = Path(config.run_dir)
    if config.dry_run:
        print(forecast(config.sweep, points, config.gpu))
        return 0
    return run_sweep(
        folder,
        config.sweep,
        points,
        launcher=config.launcher,
        retry=config.retry,
        keep_checkpoints=config.keep_checkpoints,
    )


if __name__ == "__main__":
    run_command(main, SweepConfig, __doc__, "sweep")

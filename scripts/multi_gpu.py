"""Training on several GPUs against one: losses, speed and memory at every ZeRO stage, and a killed rank.

    python -m scripts.multi_gpu run_dir=outputs/multi_gpu
    python -m scripts.multi_gpu run_dir=outputs/multi_gpu counts=[1,4]   without the runs on two of four GPUs

or, rehearsed on a CPU,

    python -m scripts.multi_gpu num_gpus=2 models=[tnl-tiny] seq_len=128 batch_tokens=2048 steps=12 \\
        skip_steps=3 kill_after=3 'settings=["tokenizer=bytes"]'

Trains every model for the same steps on the same data: on one GPU with the reference engine, and on each
larger number of GPUs (counts) with each engine. Then a rank is killed (SIGKILL), and the run continues with
half of the GPUs, and after that with all of them again.

Results after every run: table.md, results.csv, plot.png. The same command again runs what is missing.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from training.command import run_command
from training.errors import EXIT_PREEMPTED, SettingError
from training.launching import free_devices
from training.multi_gpu_report import write_multi_gpu_report
from training.rank_kill import RankKill
from training.sweep import FINISHED, SweepDefinition, expand
from training.sweep_command import run_sweep

TOKENS_PER_GPU = 65536
# The runs are the first steps of a longer one, whose warm-up has the default's 1,000 steps. In a shorter one
# learning rates are large early, and another rounding of a single weight grows to 2e-2 of loss in 30 steps.
SCHEDULE_STEPS = 10_000
ENGINES = ("zero0", "zero1", "zero2", "zero3")
PARTS = ("runs", "kill")


@dataclass(kw_only=True, slots=True)
class MultiGpuConfig:
    """What to run, and on how many GPUs."""

    run_dir: str = "outputs/multi_gpu"  # folder of the runs and their results
    num_gpus: int | None = None  # the most to use; null: all that are free. On a CPU: ranks
    counts: list[int] = field(default_factory=list)  # GPU counts to run; empty: 1, 2, 4, … and num_gpus
    models: list[str] = field(default_factory=lambda: ["tnl-385m", "tnl-1b"])  # as sweep.models
    engines: list[str] = field(default_factory=lambda: list(ENGINES))  # engine= choices on several GPUs
    reference_engine: str = "zero1"  # of the runs on one GPU
    seq_len: int = 8192  # tokens of a sequence
    batch_tokens: int | None = None  # tokens of a step in every run; null: 65536 for each of num_gpus
    steps: int = 50  # optimizer steps of every run
    skip_steps: int = 10  # first steps left out of speeds
    settings: list[str] = field(default_factory=list)  # of every run: data, tokenizer, micro_batch_size
    parts: list[str] = field(default_factory=lambda: list(PARTS))  # what to do, in this order
    kill_after: int = 10  # steps; the first model's run is saved then, killed, and resumed from there
    kill_engine: str = "zero1"  # of the run that is killed; one of engines
    retry: list[str] = field(default_factory=list)  # statuses to run again: failed, oom, done

    def __post_init__(self) -> None:
        for key, allowed in (("parts", PARTS), ("retry", FINISHED)):
            unknown = sorted(set(getattr(self, key)) - set(allowed))
            if unknown:
                raise SettingError(
                    f"{key}={getattr(self, key)}: {unknown[0]} is unknown. Allowed: {', '.join(allowed)}."
                )
        for key in ("models", "engines", "parts"):
            if not getattr(self, key):
                raise SettingError(f"{key} is empty: give at least one, as {key}=[...].")
        if self.kill_engine not in self.engines:
            raise SettingError(f"kill_engine={self.kill_engine} must be one of engines={self.engines}.")
        if self.num_gpus is not None and self.num_gpus < 2:
            raise SettingError(f"num_gpus={self.num_gpus} must be at least 2, or null.")
        if "kill" in self.parts and not 3 <= self.kill_after <= (self.steps - 2) // 2:
            raise SettingError(
                f"kill_after={self.kill_after} must be at least 3, and twice that and two steps more must "
                f"fit into steps={self.steps}; or leave the kill out: parts=[runs]."
            )


def main(config: MultiGpuConfig) -> int:
    """Run what is missing; 0 if all is done, 1 if a run failed, 75 if stopped."""
    num_gpus = config.num_gpus or _num_free()
    sweeps = {count: _sweep(config, num_gpus, count) for count in gpu_counts(config.counts, num_gpus)}
    points = {count: expand(sweep) for count, sweep in sweeps.items()}
    folder = Path(config.run_dir)
    uninterrupted = next(p for p in points[num_gpus] if p.crossed["engine"] == config.kill_engine)
    curve = folder / f"gpus_{num_gpus}" / "points" / uninterrupted.name
    kill = RankKill(folder / "kill", uninterrupted, curve, num_gpus, config.kill_after)

    def report() -> None:
        shown = "kill" in config.parts or kill.result["legs"]
        write_multi_gpu_report(folder, sweeps, points, kill if shown else None)

    codes = []
    for part in config.parts:
        if part == "kill":
            codes.append(kill.run(report))
            continue
        for count, sweep in sweeps.items():
            part_folder = folder / f"gpus_{count}"
            codes.append(run_sweep(part_folder, sweep, points[count], retry=config.retry, finished=report))
            if codes[-1] == EXIT_PREEMPTED:
                return EXIT_PREEMPTED
    report()
    print(f"{folder / 'table.md'}", file=sys.stderr)
    return max(codes)


def _num_free() -> int:
    devices = free_devices()
    if devices[0].id is None:
        raise SettingError("there is no GPU here: give num_gpus=2 to rehearse on CPU ranks, as --help shows.")
    if len(devices) < 2:
        raise SettingError(f"{len(devices)} GPU is free here, and this needs at least 2.")
    return len(devices)


def gpu_counts(counts: list[int], num_gpus: int) -> list[int]:
    """`counts` in order, or if there are none 1, 2, 4, … and `num_gpus`.

    Raises:
        SettingError: the reference on one GPU is missing, or `num_gpus`, or a count is out of range.
    """
    if not counts:
        counts = [2**power for power in range(num_gpus.bit_length())] + [num_gpus]
    elif min(counts) != 1 or max(counts) != num_gpus:
        raise SettingError(
            f"counts={counts} must lie between 1 and num_gpus={num_gpus} and include both: one GPU is the "
            "reference, and the run on all is killed and resumed."
        )
    return sorted(set(counts))


def _sweep(config: MultiGpuConfig, num_gpus: int, count: int) -> SweepDefinition:
    """The runs on `count` GPUs."""
    engines = [config.reference_engine] if count == 1 else config.engines
    return SweepDefinition(
        name=f"{count} GPU" + ("s" if count > 1 else ""),
        models=config.models,
        seq_lens=[config.seq_len],
        batch_tokens=config.batch_tokens or TOKENS_PER_GPU * num_gpus,
        steps=config.steps,
        skip_steps=config.skip_steps,
        num_gpus=count,
        settings=[f"schedule.total_steps={SCHEDULE_STEPS}", *config.settings],
        cross=[f"engine={','.join(engines)}"],
    )


if __name__ == "__main__":
    run_command(main, MultiGpuConfig, __doc__)

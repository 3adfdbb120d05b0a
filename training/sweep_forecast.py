"""What a sweep would take, from its settings alone: micro-batch, memory and time of each point, roughly."""

from __future__ import annotations

from dataclasses import replace

import psutil
import torch

from training.gpus import Gpu, require_gpu
from training.launching import device_groups, free_devices
from training.memory import memory_parts
from training.micro_batch import largest_micro_batch, resolve_micro_batch
from training.planning import predicted_tokens_per_second, with_vocabulary
from training.sweep import Point, SweepDefinition
from training.tables import aligned_table, duration

ASSUMED_MFU = 0.4
ASSUMED_CPU_FLOPS = 1e11  # FLOP/s of a rank without a GPU
START_SECONDS = {True: 60.0, False: 10.0}  # on a GPU or not: imports, data and compilation
CPU_PROCESS_GIB = 0.6  # libraries, which count as memory on a CPU


def forecast(sweep: SweepDefinition, points: list[Point], gpu_name: str | None) -> str:
    """A table of the points, and how long all of them take.

    Args:
        gpu_name: the GPU to predict for; None for what this machine has free.
    """
    devices = [] if gpu_name else free_devices()
    gpu = None
    if gpu_name or devices[0].id is not None:
        gpu = require_gpu(gpu_name or devices[0].name)
    at_once = len(device_groups(devices, sweep.num_gpus)) if devices else 1
    flops = ASSUMED_MFU * gpu.peak_flops if gpu else ASSUMED_CPU_FLOPS
    rows = []
    total_seconds = 0.0
    for point in points:
        micro_batch, memory = _memory(point, sweep.num_gpus, gpu)
        speed = predicted_tokens_per_second(with_vocabulary(point.config), sweep.num_gpus, flops)
        seconds = START_SECONDS[gpu is not None] + sweep.steps * sweep.batch_tokens / speed
        total_seconds += seconds
        rows.append((point.name, str(micro_batch), memory, f"{speed:,.0f}", duration(seconds)))
    columns = ("point", "micro-batch", "memory GiB", "tokens/s", "time")
    assumed = f"{ASSUMED_MFU:.0%} MFU on {gpu.name}" if gpu else f"{ASSUMED_CPU_FLOPS:.0e} FLOP/s on the CPU"
    return (
        f"{aligned_table(columns, rows, '<')}\n"
        f"{len(points)} points, {at_once} at a time: about {duration(total_seconds / at_once)}, "
        f"at an assumed {assumed}."
    )


def _memory(point: Point, num_ranks: int, gpu: Gpu | None) -> tuple[int, str]:
    """The micro-batch that a point will take, and its predicted peak in GiB."""
    config = with_vocabulary(point.config)
    if gpu is None:
        config = replace(config, engine=config.engine.with_precision())
    if gpu is None or config.micro_batch_size != "auto":
        size = resolve_micro_batch(config, num_ranks, torch.device("cpu"), None)
    else:
        size = max(1, largest_micro_batch(config, num_ranks, gpu.memory_gib * 2**30))
    peak_gib = sum(memory_parts(config, num_ranks, size).values()) / 2**30
    if gpu is None:
        peak_gib += CPU_PROCESS_GIB
    memory_gib = gpu.memory_gib if gpu else psutil.virtual_memory().total / 2**30 / num_ranks
    return size, f"{peak_gib:.1f}" + (" (OOM?)" if peak_gib > memory_gib else "")

"""The micro-batch: how many sequences each device computes at a time, set or as many as fit.

A step's sequences are dealt out evenly to the ranks, and each rank's part evenly to its micro-steps.
"""

from __future__ import annotations

import torch

from training.errors import SettingError
from training.memory import memory_parts
from training.train_config import TrainConfig

CPU_MICRO_BATCH_TOKENS = 8192  # larger micro-batches gain nothing on a CPU
USABLE_SHARE = 0.9  # of a GPU's memory: the rest is CUDA's context and fragmentation


def resolve_micro_batch(
    config: TrainConfig, world_size: int, device: torch.device, previous: int | None, step: int = 0
) -> int:
    """Sequences per device and micro-step: the setting, `previous` (the run's before), or what fits.

    Args:
        step: the first to be taken (from 0).

    Raises:
        SettingError: the step's sequences can't be dealt out evenly.
    """
    per_rank = sequences_per_rank(config, world_size, step)
    check_micro_batch(config, per_rank)
    if config.micro_batch_size != "auto":
        return config.micro_batch_size
    if previous:
        limit = previous
    elif device.type == "cuda":
        limit = largest_micro_batch(config, world_size, torch.cuda.get_device_properties(device).total_memory)
    else:
        limit = CPU_MICRO_BATCH_TOKENS // config.seq_len
    return max(size for size in divisors(per_rank) if size <= max(limit, 1))


def largest_micro_batch(config: TrainConfig, num_ranks: int, memory_bytes: float) -> int:
    """Sequences of the largest micro-batch that fits in `memory_bytes`; 0 if not even one does."""
    fitting = [
        size
        for size in divisors(config.sequences_of_step() // num_ranks)
        if sum(memory_parts(config, num_ranks, size).values()) <= USABLE_SHARE * memory_bytes
    ]
    return max(fitting, default=0)


def sequences_per_rank(config: TrainConfig, num_ranks: int, step: int = 0) -> int:
    """Sequences of one rank's part of a step (from 0); where the batch grows, later parts are multiples.

    Raises:
        SettingError: the step's sequences can't be dealt out evenly.
    """
    sequences = config.sequences_of_step(step)
    if sequences % num_ranks:
        grows = sequences < config.sequences_per_step
        key = "schedule.ramp_batch_tokens" if grows else "batch_tokens"
        raise SettingError(
            f"{key}={sequences * config.seq_len} is {sequences} sequences of {config.seq_len} tokens a step, "
            f"which {num_ranks} ranks can't share evenly: use a multiple of {config.seq_len * num_ranks}."
        )
    return sequences // num_ranks


def check_micro_batch(config: TrainConfig, per_rank: int, source: str = "") -> None:
    """Refuse a `micro_batch_size` that does not divide the `per_rank` sequences of a rank's step.

    Args:
        source: where it was set, for the error.

    Raises:
        SettingError: names the sizes that do.
    """
    size = config.micro_batch_size
    if size != "auto" and per_rank % size:
        allowed = ", ".join(map(str, divisors(per_rank)))
        raise SettingError(
            f"micro_batch_size={size}{source} does not divide the {per_rank} sequences of a rank's step. "
            f"Allowed: {allowed}, or auto; for a resumed run only auto."
        )


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [size for size in range(1, number + 1) if number % size == 0]

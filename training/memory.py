"""What a run needs of memory, counted from the model, and the micro-batch that fits."""

from __future__ import annotations

import torch

from models.config import ModelConfig
from training.config import TrainConfig
from training.errors import SettingError

CPU_MICRO_BATCH_TOKENS = 8192  # larger micro-batches gain nothing on a CPU
LOSS_BYTES = 3 * 2**30  # one chunk of logits in fp32, their softmax and gradient
SPARE = 0.9  # share of the device's memory that is planned for


def activation_bytes_per_token(config: ModelConfig) -> int:
    """Bytes that one token's activations hold between forward and backward, in bf16 compute.

    A layer keeps, in bf16, its input, norm, q, k, v, u, activated q and k, o, norm(o), gated o, middle
    residual and norm (14 D), and l1, l2 and their product (3 GLU); fp32 copies in norms add about 8 D.
    """
    hidden = config.hidden_size
    layer = 2 * (14 * hidden + 3 * config.glu_size) + 8 * hidden
    if config.activation_checkpointing == "full":
        return 2 * hidden * config.num_layers + layer
    return layer * config.num_layers


def state_bytes_per_parameter(config: TrainConfig, world_size: int) -> float:
    """Bytes a parameter costs on one rank: weight, gradient, fp32 gradient sum, master and two moments."""
    if config.engine.zero_stage == 0 or config.engine.precision == "fp32":
        return 16 if config.engine.zero_stage == 0 else 8 + 16 / world_size
    optimizer = 0 if config.engine.offload_optimizer else 12 / world_size
    gradients = {1: 2 + 4, 2: 2 + 4 / world_size, 3: 6 / world_size}[config.engine.zero_stage]
    weights = 2 / world_size if config.engine.zero_stage == 3 else 2
    return weights + gradients + optimizer


def resolve_micro_batch(config: TrainConfig, world_size: int, device: torch.device, wish: int | None) -> int:
    """Sequences per device and micro-step: the setting, `wish` (what the run used before), or what fits.

    Raises:
        SettingError: the step's sequences can't be dealt out evenly.
    """
    sequences = config.sequences_per_step
    if sequences % world_size:
        raise SettingError(
            f"batch_tokens={config.batch_tokens} is {sequences} sequences of {config.seq_len} tokens a step, "
            f"which {world_size} ranks can't share evenly: use a multiple of {config.seq_len * world_size}."
        )
    per_rank = sequences // world_size
    if config.micro_batch_size != "auto":
        if per_rank % config.micro_batch_size:
            raise SettingError(
                f"micro_batch_size={config.micro_batch_size} does not divide the {per_rank} sequences of a "
                f"rank's step: allowed are {', '.join(map(str, divisors(per_rank)))}, or auto."
            )
        return config.micro_batch_size
    limit = wish or max(1, _fitting_tokens(config, world_size, device) // config.seq_len)
    return max(size for size in divisors(per_rank) if size <= limit)


def _fitting_tokens(config: TrainConfig, world_size: int, device: torch.device) -> int:
    """Tokens of a micro-step whose activations fit beside weights and optimizer state."""
    if device.type != "cuda":
        return CPU_MICRO_BATCH_TOKENS
    total = SPARE * torch.cuda.get_device_properties(device).total_memory
    states = state_bytes_per_parameter(config, world_size) * config.model.num_parameters()
    left = total - states - LOSS_BYTES
    return int(max(left, 0) // activation_bytes_per_token(config.model))


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [size for size in range(1, number + 1) if number % size == 0]

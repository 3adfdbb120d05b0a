"""What a run would need, before it is started: parameters, FLOPs, memory, micro-batch and time. Needs no GPU.

    python -m scripts.plan model=tnl-1b seq_len=8192 engine=zero1 num_gpus=8 gpu=h200 tokens=300e9

Takes every setting of train.py, and gpu (or gpu_memory_gib), num_gpus, assumed_mfu and tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from training.command import reader_may_leave, run_command
from training.errors import SettingError
from training.gpus import require_gpu
from training.memory import memory_parts
from training.metrics import duration
from training.micro_batch import check_micro_batch, largest_micro_batch, sequences_per_rank
from training.out_of_memory import ways_to_fit
from training.planning import predicted_tokens_per_second, with_vocabulary
from training.train_config import TrainConfig

GIB = 2**30


@dataclass(kw_only=True, slots=True)
class PlanConfig(TrainConfig):
    """A run, and the GPUs to plan it for."""

    gpu: str = "h100"
    gpu_memory_gib: float | None = None  # instead of what `gpu` has
    num_gpus: int = 1
    assumed_mfu: float = 0.4  # share of the GPU's peak that the model's FLOPs reach
    tokens: float | None = None  # tokens to train on; null: max_steps * batch_tokens

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        if self.num_gpus < 1:
            raise SettingError(f"num_gpus={self.num_gpus} must be at least 1.")
        self.gpu = require_gpu(self.gpu).name
        for key in ("gpu_memory_gib", "tokens"):
            if getattr(self, key) is not None and not getattr(self, key) > 0:
                raise SettingError(f"{key}={getattr(self, key)} must be above 0, or null.")
        if not 0 < self.assumed_mfu <= 1:
            raise SettingError(f"assumed_mfu={self.assumed_mfu} must be above 0 and at most 1.")


def main(config: PlanConfig) -> None:
    """Print the plan."""
    config = with_vocabulary(config)
    per_gpu = sequences_per_rank(config, config.num_gpus)
    check_micro_batch(config, per_gpu)
    with reader_may_leave():
        print("\n\n".join([_model(config), _memory(config, per_gpu), _time(config)]))


def _model(config: PlanConfig) -> str:
    model = config.model
    lines = [
        f"{model.name}: {model.num_layers} layers, hidden {model.hidden_size}, {model.num_heads} heads, "
        f"channel mixer {model.glu_size}, vocabulary {model.vocab_size}, attention {model.attention}"
    ]
    lines += [f"  {name:<24}{count:>18,}" for name, count in model.parameter_parts().items()]
    lines += [
        f"  {'parameters':<24}{model.num_parameters():>18,}",
        f"  {'FLOPs per token':<24}{model.flops_per_token(config.seq_len):>18.4g}  (forward and backward)",
    ]
    return "\n".join(lines)


def _memory(config: PlanConfig, per_gpu: int) -> str:
    """Memory by part at the micro-batch that is set, or at the largest that fits."""
    memory_gib = config.gpu_memory_gib or require_gpu(config.gpu).memory_gib
    largest = largest_micro_batch(config, config.num_gpus, memory_gib * GIB)
    size = max(largest, 1) if config.micro_batch_size == "auto" else config.micro_batch_size
    parts = memory_parts(config, config.num_gpus, size)
    lines = [
        f"Memory per GPU in GiB, ZeRO {config.engine.zero_stage}, {config.num_gpus} GPU(s), "
        f"micro-batch of {size} x {config.seq_len} tokens:"
    ]
    lines += [f"  {name:<24}{value / GIB:>18.2f}" for name, value in parts.items()]
    peak_gib = sum(parts.values()) / GIB
    lines += [f"  {'predicted peak':<24}{peak_gib:>18.2f}  of {memory_gib:g} ({peak_gib / memory_gib:.0%})"]
    if largest:
        lines += [f"  {'largest micro-batch':<24}{largest:>18}  sequences of the {per_gpu} a step"]
    else:
        lines += [
            f"Does not fit: not even one sequence of {config.seq_len} tokens. Try",
            f"{ways_to_fit(replace(config, micro_batch_size=1))}.",
        ]
    return "\n".join(lines)


def _time(config: PlanConfig) -> str:
    """Speed at the assumed share of the peak, and the time for the tokens."""
    peak = require_gpu(config.gpu).peak_flops
    flops = config.assumed_mfu * peak
    speed = predicted_tokens_per_second(config, config.num_gpus, flops)
    tokens = config.tokens or config.max_steps * config.batch_tokens
    return (
        f"At an assumed MFU of {config.assumed_mfu:.0%} of {config.gpu}'s "
        f"{peak / 1e12:g} TFLOP/s: {speed:,.0f} tokens/s "
        f"({speed / config.num_gpus:,.0f} a GPU), {1000 * config.batch_tokens / speed:,.0f} ms a step;\n"
        f"{tokens:,.0f} tokens take {_long_duration(tokens / speed)} "
        f"({config.num_gpus * tokens / speed / 3600:,.1f} GPU hours)."
    )


def _long_duration(seconds: float) -> str:
    """As metrics.duration, and days from two days on."""
    days = seconds / 86400
    return duration(seconds) if days < 2 else f"{days:,.1f} days"


if __name__ == "__main__":
    run_command(main, PlanConfig, __doc__, "train")

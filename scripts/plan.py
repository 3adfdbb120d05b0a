"""What a run would need, before it is started: parameters, FLOPs, memory, micro-batch and time. Needs no GPU.

    python -m scripts.plan model=tnl-1b seq_len=8192 engine=zero1 num_gpus=8 gpu=h200 tokens=300e9

Takes every setting of train.py, and gpu (or gpu_memory_gib), num_gpus, assumed_mfu and tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from textwrap import indent

from training.command import reader_may_leave, run_command
from training.errors import SettingError
from training.gpus import require_gpu
from training.memory import memory_parts
from training.micro_batch import check_micro_batch, largest_micro_batch, sequences_per_rank
from training.out_of_memory import ways_to_fit
from training.planning import predicted_tokens_per_second, with_vocabulary
from training.tables import aligned_table, duration
from training.train_config import TrainConfig

GIB = 2**30


@dataclass(kw_only=True, slots=True)
class PlanConfig(TrainConfig):
    """A run, and the GPUs to plan it for."""

    gpu: str = "h100"  # name of a GPU, as h100
    gpu_memory_gib: float | None = None  # instead of what `gpu` has
    num_gpus: int = 1  # GPUs that the run is spread over
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
    head = (
        f"{model.name}: {model.num_layers} layers, hidden {model.hidden_size}, {model.num_heads} heads, "
        f"channel mixer {model.glu_size}, vocabulary {model.vocab_size}, attention {model.attention}"
    )
    rows = [(name, f"{count:,}", "") for name, count in model.parameter_parts().items()]
    rows += [
        ("parameters", f"{model.num_parameters():,}", ""),
        ("FLOPs per token", f"{model.flops_per_token(config.seq_len):.4g}", "(forward and backward)"),
    ]
    return f"{head}\n{_figures(rows)}"


def _memory(config: PlanConfig, per_gpu: int) -> str:
    """Memory by part at the micro-batch that is set, or at the largest that fits."""
    memory_gib = config.gpu_memory_gib or require_gpu(config.gpu).memory_gib
    largest = largest_micro_batch(config, config.num_gpus, memory_gib * GIB)
    size = max(largest, 1) if config.micro_batch_size == "auto" else config.micro_batch_size
    parts = memory_parts(config, config.num_gpus, size)
    head = (
        f"Memory per GPU in GiB, ZeRO {config.engine.zero_stage}, {config.num_gpus} GPU(s), "
        f"micro-batch of {size} x {config.seq_len} tokens:"
    )
    rows = [(name, f"{value / GIB:.2f}", "") for name, value in parts.items()]
    peak_gib = sum(parts.values()) / GIB
    rows.append(("predicted peak", f"{peak_gib:.2f}", f"of {memory_gib:g} ({peak_gib / memory_gib:.0%})"))
    if largest:
        rows.append(("largest micro-batch", str(largest), f"sequences of the {per_gpu} a step"))
        return f"{head}\n{_figures(rows)}"
    return (
        f"{head}\n{_figures(rows)}\n"
        f"Does not fit: not even one sequence of {config.seq_len} tokens. Try\n"
        f"{ways_to_fit(replace(config, micro_batch_size=1))}."
    )


def _figures(rows: list[tuple[str, str, str]]) -> str:
    """Lines of a name, its figure, and a note."""
    return indent(aligned_table((), rows, alignment="<><"), "  ")


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
        f"{tokens:,.0f} tokens take {duration(tokens / speed)} "
        f"({config.num_gpus * tokens / speed / 3600:,.1f} GPU hours)."
    )


if __name__ == "__main__":
    run_command(main, PlanConfig, __doc__, "train")

"""The settings of a training run: what may be set, the defaults, and what is refused.

The groups `model`, `data`, `tokenizer`, `optim` and `schedule` have their dataclasses beside their owners.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from data.config import DataConfig, TokenizerConfig
from models.config import ModelConfig
from training.errors import SettingError
from training.optimizer import OptimConfig, ScheduleConfig, ramped

# What engine.sequence_chunk needs of the model's settings.
CHUNKS_NEED = {"attention": "lightning", "softmax_every": 0, "dropout": 0.0}


@dataclass(kw_only=True, slots=True)
class EngineConfig:
    """How DeepSpeed spreads and computes a step."""

    zero_stage: int = 1  # what is sharded over ranks: 0 nothing, 1 optimizer, 2 + gradients, 3 + weights
    precision: str = "auto"  # of compute: bf16, fp32, or auto: bf16 where this machine has units for it
    fp8: bool = False  # the blocks' linear maps in 8-bit floating point while training (Ada, Hopper, later)
    offload_optimizer: bool = False  # keep optimizer state and masters in CPU memory (stage 2, 3)
    offload_parameters: bool = False  # keep weights in CPU memory (stage 3)
    compile: str = "auto"  # torch.compile of the blocks: auto (on a GPU), true, false
    sequence_chunk: int = 0  # tokens; a longer micro-batch is computed in chunks that carry the state
    timeout_minutes: float = 30.0  # a collective that takes longer ends the run
    join_seconds: float = 50.0  # give up starting if a rank joins this much later than the first
    watchdog_seconds: float = 300.0  # the run ends if no rank makes progress for this long

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise SettingError(f"engine.zero_stage={self.zero_stage}: allowed are 0, 1, 2, 3.")
        if self.precision not in ("auto", "bf16", "fp32"):
            raise SettingError(f"engine.precision={self.precision!r} is unknown. Allowed: auto, bf16, fp32.")
        if self.fp8 and self.precision == "fp32":
            raise SettingError("engine.fp8=true needs engine.precision=bf16, not fp32.")
        self.compile = str(self.compile).lower()
        if self.compile not in ("auto", "true", "false"):
            raise SettingError(f"engine.compile={self.compile!r} is unknown. Allowed: auto, true, false.")
        if self.offload_optimizer and self.zero_stage < 2:
            raise SettingError("engine.offload_optimizer=true needs engine.zero_stage 2 or 3.")
        if self.offload_parameters and self.zero_stage != 3:
            raise SettingError("engine.offload_parameters=true needs engine.zero_stage=3.")
        if self.sequence_chunk < 0:
            raise SettingError(f"engine.sequence_chunk={self.sequence_chunk} must be 0 (whole) or tokens.")
        if not self.timeout_minutes > 0:
            raise SettingError(f"engine.timeout_minutes={self.timeout_minutes} must be above 0.")
        if not self.join_seconds > 0:
            raise SettingError(f"engine.join_seconds={self.join_seconds} must be above 0.")
        if not self.watchdog_seconds > 0:
            raise SettingError(f"engine.watchdog_seconds={self.watchdog_seconds} must be above 0.")

    @property
    def offloads(self) -> bool:
        """Whether anything is kept in CPU memory."""
        return self.offload_optimizer or self.offload_parameters

    def with_precision(self) -> EngineConfig:
        """The same, with the precision that this machine has units for in place of `auto`."""
        return replace(self, precision=native_precision()) if self.precision == "auto" else self


def native_precision() -> str:
    """bf16 on GPUs and CPUs that have units for it; fp32 elsewhere, where it would be emulated."""
    if torch.cuda.is_available():
        has_units = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if has_units else "fp32"


@dataclass(kw_only=True, slots=True)
class WandbConfig:
    """Weights & Biases; without a key in the environment it writes offline files only."""

    enabled: bool = False
    project: str = "transnormer"
    name: str | None = None  # null: the run folder's name


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """One pretraining run; see configs/train.yaml for the defaults and their meaning."""

    seed: int = 0
    run_dir: str = "outputs/run"
    seq_len: int = 1024
    batch_tokens: int = 65536
    micro_batch_size: Any = "auto"
    max_steps: int = 1000
    resume: str = "auto"
    overwrite: bool = False
    init_from: str | None = None
    log_every: int = 10
    eval_every: int = 200
    save_every: int = 200
    sample_every: int = 200
    layer_stats_every: int = 0
    keep_checkpoints: int = 3
    eval_tokens: int = 262144
    sample_prompt: str = "def "
    sample_tokens: int = 128
    max_skipped_steps: int = 10
    spike_action: str = "report"
    allow_changed_data: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    experiment: str | None = None  # the name of the experiment whose settings these are

    def __post_init__(self) -> None:
        counts = ("seq_len", "batch_tokens", "max_steps", "keep_checkpoints", "max_skipped_steps")
        for key in (*counts, "sample_tokens"):
            if getattr(self, key) < 1:
                raise SettingError(f"{key}={getattr(self, key)} must be at least 1.")
        intervals = ("log_every", "eval_every", "save_every", "sample_every", "layer_stats_every")
        for key in (*intervals, "eval_tokens"):
            if getattr(self, key) < 0:
                raise SettingError(f"{key}={getattr(self, key)} must be 0 or more.")
        if self.resume not in ("auto", "never", "must"):
            raise SettingError(f"resume={self.resume!r} is unknown. Allowed: auto, never, must.")
        if self.spike_action not in ("report", "rollback", "none"):
            raise SettingError(
                f"spike_action={self.spike_action!r} is unknown. Allowed: report, rollback, none."
            )
        if self.batch_tokens % self.seq_len:
            lower = self.batch_tokens // self.seq_len * self.seq_len
            raise SettingError(
                f"batch_tokens={self.batch_tokens} is not a multiple of seq_len={self.seq_len}. "
                f"Try batch_tokens={lower or self.seq_len}."
            )
        for key, last in (("ramp_seq_len", self.seq_len), ("ramp_batch_tokens", self.batch_tokens)):
            first = getattr(self.schedule, key)
            if first is not None and (first < 1 or last % first or (last // first).bit_count() != 1):
                raise SettingError(
                    f"schedule.{key}={first} must reach {last} by doubling: try {last // 4 or last}, or null."
                )
        if self.schedule.ramp_batch_tokens is not None and self.schedule.ramp_batch_tokens % self.seq_len:
            raise SettingError(
                f"schedule.ramp_batch_tokens={self.schedule.ramp_batch_tokens} is not a multiple of "
                f"seq_len={self.seq_len}."
            )
        if self.optim.name == "muon" and self.engine.offloads:
            raise SettingError(
                "optim=muon does not work with offloading: use an engine without it, or optim=adamw."
            )
        if not self.run_dir.strip():
            raise SettingError("run_dir= is empty: give the folder of the run, as run_dir=outputs/name.")
        if not -(2**63) <= self.seed < 2**63:
            raise SettingError(f"seed={self.seed} must be a whole number of at most 64 bits.")
        if self.micro_batch_size != "auto" and (
            type(self.micro_batch_size) is not int or self.micro_batch_size < 1
        ):
            raise SettingError(f"micro_batch_size={self.micro_batch_size!r}: a number of sequences, or auto.")
        self._check_sequence_chunk()

    def _check_sequence_chunk(self) -> None:
        """Chunks need layers with a state of constant size, and the same numbers when computed again."""
        for key, allowed in CHUNKS_NEED.items():
            value = getattr(self.model, key)
            if self.engine.sequence_chunk and value != allowed:
                raise SettingError(
                    f"engine.sequence_chunk={self.engine.sequence_chunk} does not work with "
                    f"model.{key}={value!r}: use {allowed!r}, or engine.sequence_chunk=0."
                )

    @property
    def sequences_per_step(self) -> int:
        """Sequences in one optimizer step over all ranks."""
        return self.batch_tokens // self.seq_len

    def sequences_of_step(self, step: int = 0) -> int:
        """Sequences in that step (from 0), the fewest of it and all later ones: the batch may grow."""
        first = self.schedule.ramp_batch_tokens
        return ramped(self.schedule, first, self.batch_tokens, step) // self.seq_len

    @property
    def sequences_of_ramp(self) -> list[int]:
        """Sequences in each of the steps of the schedule's ramp."""
        has_ramp = self.schedule.ramp_batch_tokens is not None
        return [self.sequences_of_step(step) for step in range(self.schedule.ramp_steps if has_ramp else 0)]
